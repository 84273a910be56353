"""Small real tokenizers, and stores of given lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsmixer.data.store import SCHEMA, TokenStore, record_batch

CORPUS = [
    "Question: what is 12 + 7? Answer: 19",
    "Review: a fine film. Sentiment: positive",
    "Review: a dull film. Sentiment: negative",
    "user assistant system answer the question",
] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Puts <s> before a text by itself; </s> ends; has a chat template that writes both."""
    backend = byte_level_bpe()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """No beginning of sequence, no padding token, no chat template; </s> ends."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="</s>")


@pytest.fixture(scope="session")
def make_store() -> Callable[..., TokenStore]:
    def make(
        lengths: Sequence[int],
        domain_ids: Sequence[int] | None = None,
        target_starts: Sequence[int] | None = None,
        vocab_size: int = 90,
    ) -> TokenStore:
        random = np.random.default_rng(0)
        tokens = [random.integers(3, vocab_size, length).tolist() for length in lengths]
        starts = list(target_starts or [1] * len(lengths))
        table = pa.Table.from_batches([record_batch(tokens, starts)], SCHEMA)
        ids = np.array(domain_ids if domain_ids is not None else [0] * len(lengths), dtype=np.int64)
        return TokenStore(table, ids, [f"f:{i}" for i in range(len(lengths))], f"store of {list(lengths)}")

    return make
