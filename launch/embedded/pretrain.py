"""Makes the embedded base: a byte-level tokenizer and a small Llama trained on the general text.

One thread and one seed, so that the same versions of torch and transformers on the same kind of processor
give the same weights. Shapes: ``B`` texts in a batch, ``S`` bytes and marks in the longest of them.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from general import Text, draw_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PAD_ID, BOS_ID, EOS_ID, FIRST_BYTE_ID = 0, 1, 2, 3
VOCABULARY_SIZE = FIRST_BYTE_ID + 256
MAX_LENGTH = 128


@dataclass(frozen=True)
class Pretraining:
    """How the base is trained: optimizer steps, texts a step, and peak learning rates.

    Attributes:
        prompt_weight: weight of a prompt's tokens in the loss, against 1 for the tokens that answer it;
            small, because most prompts are drawn evenly and cannot be foretold.
        pool: batches drawn together and sorted by length, so that padding stays small.
    """

    steps: int = 2400
    batch_size: int = 96
    matrix_rate: float = 4e-3
    other_rate: float = 3e-3
    warmup: int = 100
    prompt_weight: float = 0.1
    pool: int = 8
    seed: int = 7

    def rate_at(self, step: int) -> float:
        """The share of the peak rate at a step from 0: warm-up, flat, a linear fall over the last 40 %."""
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / (0.4 * self.steps))


@dataclass(frozen=True)
class Batch:
    """Texts as ids and loss weights, both [B, S]; the weight at t is of the token at t, 0 on padding."""

    input_ids: torch.Tensor
    weights: torch.Tensor


def byte_characters() -> list[str]:
    """The 256 printable characters that byte-level tokenizers write bytes 0 to 255 as (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id a byte (id = 3 + byte) and ``<pad>``, ``<bos>``, ``<eos>`` as 0, 1, 2.

    It puts ``<bos>`` before a text that is encoded with special tokens.
    """
    marks = {PAD: PAD_ID, BOS: BOS_ID, EOS: EOS_ID}
    letters = {character: FIRST_BYTE_ID + byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=marks | letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """The untrained base in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def collate(texts: list[Text], prompt_weight: float) -> Batch:
    """Turns (prompt, completion) pairs into one right-padded batch with ``<bos>`` and ``<eos>``."""
    rows, weights = [], []
    for prompt, completion in texts:
        asked, answered = prompt.encode(), completion.encode()
        rows.append([BOS_ID, *(FIRST_BYTE_ID + byte for byte in asked + answered), EOS_ID])
        weights.append([0.0, *[prompt_weight] * len(asked), *[1.0] * (len(answered) + 1)])
    width = max(map(len, rows))
    return Batch(
        torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows]),
        torch.tensor([weight + [0.0] * (width - len(weight)) for weight in weights]),
    )


def batches(settings: Pretraining) -> Iterator[Batch]:
    """Endless batches of general text, the same for the same settings."""
    rng = random.Random(f"pretraining {settings.seed}")
    while True:
        texts = [draw_text(rng) for _ in range(settings.batch_size * settings.pool)]
        texts.sort(key=lambda text: len(text[0]) + len(text[1]))
        starts = list(range(0, len(texts), settings.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(texts[start : start + settings.batch_size], settings.prompt_weight)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean over tokens of the next-token loss, in nats."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    weights = batch.weights[:, 1:]
    return (losses * weights).sum() / weights.sum()


def make_optimizers(model: LlamaForCausalLM, settings: Pretraining) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    muon = torch.optim.Muon(
        matrices, lr=settings.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def pretrain(settings: Pretraining) -> LlamaForCausalLM:
    """Trains the base from nothing, on one thread, and returns it in float32."""
    torch.set_num_threads(1)
    model = make_model(settings.seed)
    optimizers = make_optimizers(model, settings)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate_at) for optimizer in optimizers]
    started, stream = time.monotonic(), batches(settings)
    for step in range(settings.steps):
        loss = weighted_loss(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {loss.item():.4f} {seconds:.0f} s", file=sys.stderr, flush=True)
    return model.eval()


def write_base(folder: Path, settings: Pretraining) -> None:
    """Pretrains and writes the model (bfloat16) and the tokenizer into the folder."""
    model = pretrain(settings)
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
