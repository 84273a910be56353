"""``dsmixer generate``: write on from a prompt, with a mixture, one of its experts or its base."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from dsmixer.cli.loading import add_model_arguments, load
from dsmixer.config.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "generate",
        help="write text with a mixture",
        description="Writes on from a prompt and shows the text as it comes. The routers choose the experts "
        "of each token, unless one expert or the base is asked for.",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt (default: standard input)")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the tokenizer's chat template"
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--expert", metavar="NAME", help="send every token to this expert")
    who.add_argument("--base", action="store_true", help="use the base model alone")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token; above: drawn (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--json", action="store_true", help="print prompt and text as JSON when done")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate and print; 0 on success.

    Raises:
        UserError: the mixture can't be loaded, the expert is unknown, or there is no prompt.
    """
    import torch

    if args.max_new_tokens < 1:
        raise UserError(f"{args.max_new_tokens} new tokens", where="--max-new-tokens", fix="give 1 or more")
    if not 0.0 <= args.temperature < math.inf:
        raise UserError(f"temperature {args.temperature}", where="--temperature", fix="give 0 or more")
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    model, tokenizer = load(args)
    ids = torch.tensor([_prompt_ids(prompt, tokenizer, args.chat)], device=model.device)
    torch.manual_seed(args.seed)
    with _routed(model, args), torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation_config(args, model, tokenizer),
            streamer=None if args.json else _streamer(tokenizer),
        )
    if args.json:
        written = output[0, ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        method = "base" if args.base else f"expert:{args.expert}" if args.expert else "mixture"
        answer = {"prompt": prompt, "text": text, "method": method, "num_tokens": len(written)}
        print(json.dumps(answer, ensure_ascii=False))
    return 0


def _prompt_ids(prompt: str, tokenizer: Any, chat: bool) -> list[int]:
    """The prompt's tokens, as training made them."""
    from dsmixer.data.encode import encode_prompts

    if chat:
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", where="--chat", fix="leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (ids,) = encode_prompts(tokenizer, [prompt], templated=chat)
    if not ids:
        raise UserError("the prompt is empty", where="--prompt", fix="give some text")
    return ids


def _routed(model: Any, args: argparse.Namespace) -> Any:
    from contextlib import nullcontext

    from dsmixer.model.inject import route_to

    return route_to(model, args.expert) if args.base or args.expert is not None else nullcontext()


def _generation_config(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from dsmixer.data.encode import pad_token_id
    from dsmixer.evaluation.generation import greedy_config

    config = greedy_config(model, tokenizer, args.max_new_tokens, pad_token_id(tokenizer))
    if args.temperature > 0.0:
        config.update(do_sample=True, temperature=args.temperature, top_k=0)
    return config


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
