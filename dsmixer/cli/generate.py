"""``dsmixer generate``: write on from a prompt, or answer a file of requests, with a mixture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from dsmixer.cli.loading import add_model_arguments, find_mixture, load
from dsmixer.config.errors import UserError

TERMINAL = ""
"""``--trace`` without a file."""


def add_parser(subparsers: Any) -> None:
    """Add the command to ``dsmixer``."""
    parser = subparsers.add_parser(
        "generate",
        help="write text with a mixture",
        description="Writes on from a prompt and shows the text as it comes. The routers choose the experts "
        "of each token, unless one expert or the base is asked for. With --requests it answers a file of "
        "prompts in batches, each with its own expert, and prints one JSON object a line.",
    )
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="the prompt (default: standard input)")
    what.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help='JSONL of {"prompt", "expert", "max_new_tokens", "id"}; expert: a name, null for the base, '
        "absent for the routers' choice",
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the tokenizer's chat template"
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--expert", metavar="NAME", help="send every token to this expert")
    who.add_argument("--base", action="store_true", help="use the base model alone")
    parser.add_argument(
        "--trace",
        nargs="?",
        const=TERMINAL,
        metavar="FILE.html",
        help="show which experts spoke at each token, in the terminal and in a page if a file is named; with "
        "--json in numbers",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="requests that are decoded together (default: 8)"
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
        UserError: the mixture can't be loaded, the expert is unknown, there is no prompt, or a request is
            wrong.
    """
    _check(args)
    return _answer_file(args) if args.requests is not None else _answer_prompt(args)


def _check(args: argparse.Namespace) -> None:
    for flag, value in (("--max-new-tokens", args.max_new_tokens), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{value} is not above 0", where=flag, fix="give 1 or more")
    if not 0.0 <= args.temperature < math.inf:
        raise UserError(f"temperature {args.temperature}", where="--temperature", fix="give 0 or more")
    one_way = args.base or args.expert is not None
    if args.requests is not None and (one_way or args.trace is not None):
        problem = "each request of the file says who answers it, and none is traced"
        raise UserError(problem, where="--requests", fix="leave --expert, --base and --trace out")
    if args.trace is not None and one_way:
        problem = "nothing to trace: no router is asked where all tokens go one way"
        raise UserError(problem, where="--trace", fix="leave --expert and --base out")
    if args.trace:
        from dsmixer.report.trace_page import check_target

        check_target(Path(args.trace))


def _answer_prompt(args: argparse.Namespace) -> int:
    import torch

    from dsmixer.model.streams import is_encoder_decoder

    prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    model, tokenizer = _load(args)
    prompt_ids = _prompt_ids(prompt, model, tokenizer, args.chat, "--prompt")
    _check_room(model, len(prompt_ids), args.max_new_tokens, "--max-new-tokens")
    ids = torch.tensor([prompt_ids], device=model.device)
    torch.manual_seed(args.seed)
    with _routed(model, args) as kept, torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation_config(args, model, tokenizer, args.max_new_tokens),
            streamer=None if args.json or kept is not None else _streamer(tokenizer),
        )
    output_ids = output[0].tolist()
    written = output_ids[1 if is_encoder_decoder(model.config) else len(prompt_ids) :]
    trace = None
    if kept is not None:
        from dsmixer.cli.trace import trace_of

        folder = find_mixture(args.folder).resolve()
        name = folder.parent.name if folder.name == "mixture" else folder.name
        trace = trace_of(model, tokenizer, kept, prompt_ids, output_ids, name)
    if args.json:
        method = "base" if args.base else f"expert:{args.expert}" if args.expert else "mixture"
        answer = {
            "prompt": prompt,
            "text": _text(tokenizer, written),
            "method": method,
            "num_tokens": len(written),
        }
        _print_json(answer, trace)
    elif trace is not None:
        _show(trace)
    if args.trace:
        _write_page(trace, Path(args.trace), told=not args.json)
    return 0


def _answer_file(args: argparse.Namespace) -> int:
    import torch

    from dsmixer.adapters.mixture_folder import read_description
    from dsmixer.cli.requests import read_requests
    from dsmixer.evaluation.answers import Asked, answers

    _, config = read_description(find_mixture(args.folder))
    requests = read_requests(args.requests, config.experts)
    model, tokenizer = _load(args)
    asked = [
        Asked(
            _prompt_ids(request.prompt, model, tokenizer, args.chat, f"{request.location}: prompt"),
            request.to,
            request.max_new_tokens or args.max_new_tokens,
        )
        for request in requests
    ]
    for request, one in zip(requests, asked, strict=True):
        _check_room(model, len(one.prompt_ids), one.max_new_tokens, f"{request.location}: max_new_tokens")
    torch.manual_seed(args.seed)
    written = answers(
        model,
        asked,
        batch_size=args.batch_size,
        configured=lambda limit: _generation_config(args, model, tokenizer, limit),
    )
    for request, ids in zip(requests, written, strict=True):
        answer = {} if request.id is None else {"id": request.id}
        answer |= {"prompt": request.prompt, "text": _text(tokenizer, ids), "method": request.method}
        print(json.dumps(answer | {"num_tokens": len(ids)}, ensure_ascii=False), flush=True)
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = load(args)
    from dsmixer.model.serving import ready_to_serve

    return ready_to_serve(model), tokenizer


def _prompt_ids(prompt: str, model: Any, tokenizer: Any, chat: bool, where: str) -> list[int]:
    """The prompt's tokens, as training made them."""
    from dsmixer.data.encode import encode_prompts
    from dsmixer.model.streams import is_encoder_decoder

    if chat:
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", where="--chat", fix="leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for_encoder = is_encoder_decoder(model.config)
    (ids,) = encode_prompts(tokenizer, [prompt], templated=chat, for_encoder=for_encoder)
    if not prompt or not ids:
        raise UserError("the prompt is empty", where=where, fix="give some text")
    return ids


def _check_room(model: Any, num_prompt: int, max_new_tokens: int, where: str) -> None:
    """Refuse what would run past the positions that the base has learned."""
    from dsmixer.evaluation.answers import learned_positions

    limit = learned_positions(model)
    # the last token is written and never read
    if limit is None or num_prompt + max_new_tokens - 1 <= limit:
        return
    left = limit - num_prompt + 1
    problem = (
        f"the prompt has {num_prompt} tokens, and with {max_new_tokens} more it is longer than the {limit} "
        "that the base reads"
    )
    fix = f"give {left} or fewer (max_new_tokens)" if left > 0 else "give a shorter prompt"
    raise UserError(problem, where=where, fix=fix)


def _routed(model: Any, args: argparse.Namespace) -> Any:
    from contextlib import nullcontext

    from dsmixer.cli.trace import tracing
    from dsmixer.model.inject import route_to

    if args.trace is not None:
        return tracing(model)
    return route_to(model, args.expert) if args.base or args.expert is not None else nullcontext()


def _generation_config(args: argparse.Namespace, model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    from dsmixer.data.encode import pad_token_id
    from dsmixer.evaluation.generation import greedy_config

    config = greedy_config(model, tokenizer, max_new_tokens, pad_token_id(tokenizer))
    if args.temperature > 0.0:
        config.update(do_sample=True, temperature=args.temperature, top_k=0)
    return config


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _print_json(answer: dict[str, Any], trace: Any) -> None:
    if trace is not None:
        from dsmixer.cli.trace import trace_json

        answer["trace"] = trace_json(trace)
    print(json.dumps(answer, ensure_ascii=False))


def _show(trace: Any) -> None:
    from dsmixer.report.trace_terminal import show_trace
    from dsmixer.training.progress import console

    show_trace(trace, console())


def _write_page(trace: Any, target: Path, *, told: bool) -> None:
    from dsmixer.report.trace_page import trace_page

    target.write_text(trace_page(trace), encoding="utf-8")
    if told:
        print(f"the same as a page: {target}")
