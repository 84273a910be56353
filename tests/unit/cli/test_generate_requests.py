"""``dsmixer generate`` with ``--requests`` and ``--trace``: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from support.tiny import byte_tokenizer, write_base
from transformers import AutoModelForCausalLM

from dsmixer import MixerConfig, attach_mixers, route_to, save_mixture
from dsmixer.cli.main import main

NAMES = ("law", "chess", "sums")
REQUESTS = [
    {"prompt": "4 + 4 =", "expert": "sums"},
    {"prompt": "Who?", "id": "q-2", "max_new_tokens": 3},
    {"prompt": "A longer prompt than the others", "expert": None, "id": 7},
    {"prompt": "e4 e5", "expert": "chess", "max_new_tokens": 11},
    {"prompt": "x"},
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """In memory, and beside it as a folder on its base."""
    folder = tmp_path_factory.mktemp("serving")
    write_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    mixture = attach_mixers(
        model, MixerConfig(targets=("q", "v", "o"), experts=NAMES, rank=4, alpha=8, top_k=2, router_std=0.3)
    )
    with torch.no_grad():
        for mixer in mixture.mixers.values():
            mixer.bank.lora_B[:, :4].normal_(0.0, 0.2, generator=torch.Generator().manual_seed(1))
    save_mixture(mixture, folder / "mixture", tokenizer=byte_tokenizer(), base=str(folder / "base"))
    return mixture, folder / "mixture"


def alone(mixture, request, longest):
    tokenizer, prompt = byte_tokenizer(), request["prompt"]
    ids = torch.tensor([tokenizer.encode(prompt)])
    ways = {} if "expert" not in request else {"expert": request["expert"]}
    limit = request.get("max_new_tokens", longest)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": limit, "do_sample": False}
    if not ways:
        output = mixture.model.generate(ids, **options)
    else:
        with route_to(mixture.model, ways["expert"]):
            output = mixture.model.generate(ids, **options)
    return output[0, ids.shape[1] :].tolist()


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_file_of_requests_is_answered_in_order_each_as_it_would_be_alone(mixture, tmp_path, capsys):
    in_memory, folder = mixture
    file = write(tmp_path / "asked.jsonl", REQUESTS)
    flags = ["--requests", file, "--batch-size", "2", "--max-new-tokens", "7"]
    assert main(["generate", str(folder), *flags]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = [alone(in_memory, request, 7) for request in REQUESTS]
    assert [answer["prompt"] for answer in found] == [request["prompt"] for request in REQUESTS]
    assert [answer["text"] for answer in found] == [
        byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in wanted
    ]
    assert [answer["num_tokens"] for answer in found] == [len(ids) for ids in wanted]
    assert [answer.get("id") for answer in found] == [None, "q-2", 7, None, None]
    methods = [answer["method"] for answer in found]
    assert methods == ["expert:sums", "mixture", "base", "expert:chess", "mixture"]
    assert len({answer["text"] for answer in found}) == 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x", ', "asked.jsonl:2: not valid JSON"),
        ('["x"]', "asked.jsonl:2: expected an object"),
        ({"prompt": 3}, "asked.jsonl:2: prompt: expected text"),
        ({"prompt": ""}, "asked.jsonl:2: prompt: the text is empty"),
        ({"expert": "law"}, "asked.jsonl:2: prompt: the field is missing"),
        ({"prompt": "x", "expert": "physics"}, "asked.jsonl:2: expert: no expert is called 'physics'"),
        ({"prompt": "x", "expert": 1}, "asked.jsonl:2: expert: 1 is no name"),
        ({"prompt": "x", "experts": "law"}, "asked.jsonl:2: experts: unknown field"),
        ({"prompt": "x", "max_new_tokens": 0}, "asked.jsonl:2: max_new_tokens: 0 is no number"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens: True is no number"),
        ({"prompt": "x", "max_new_tokens": "9"}, "max_new_tokens: '9' is no number"),
        ({"prompt": "x", "id": [1]}, "asked.jsonl:2: id: [1] is neither"),
    ],
)
def test_a_bad_line_is_one_message_before_the_base_is_looked_for(line, reason, mixture, tmp_path, capsys):
    file = write(tmp_path / "asked.jsonl", [{"prompt": "fine"}, line])
    flags = ["--requests", file, "--base-model", str(tmp_path / "nowhere")]
    assert main(["generate", str(mixture[1]), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and reason in printed.err and printed.err.count("Fix: ") == 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--requests", "{tmp}/absent.jsonl"], "no such file"),
        (["--requests", "{tmp}/empty.jsonl"], "no requests in the file"),
        (["--requests", "{tmp}/empty.jsonl", "--base"], "leave --expert, --base and --trace out"),
        (["--requests", "{tmp}/empty.jsonl", "--trace"], "leave --expert, --base and --trace out"),
        (["--prompt", "x", "--trace", "--expert", "law"], "nothing to trace"),
        (["--prompt", "x", "--trace", "{tmp}/page.txt"], "ends in .html"),
        (["--prompt", "x", "--trace", "{tmp}/mine.html"], "is there already and no trace"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size: 0 is not above 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_the_base_is_looked_for(
    flags, reason, mixture, tmp_path, capsys
):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "mine.html").write_text("mine")
    filled = [flag.format(tmp=tmp_path) for flag in flags]
    assert main(["generate", str(mixture[1]), *filled, "--base-model", str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and reason in printed.err and "Fix: " in printed.err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_trace_is_shown_written_as_a_page_and_given_as_numbers(mixture, tmp_path, capsys):
    in_memory, folder = mixture
    page = tmp_path / "trace.html"
    arguments = ["generate", str(folder), "--prompt", "4 + 4 =", "--max-new-tokens", "6"]
    assert main([*arguments, "--trace", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = alone(in_memory, {"prompt": "4 + 4 ="}, 6)
    assert lines[0] == "prompt" and lines[1] == "4 + 4 =" and lines[3] == "answer"
    assert set(lines[2].lower()) <= set("abc") and lines[-1].endswith("trace.html")
    assert page.read_text().count("<details") == 7 + len(wanted)  # the last token has none, the table one
    assert main([*arguments, "--trace", str(page), "--json"]) == 0  # its own page is written anew
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == byte_tokenizer().decode(wanted, skip_special_tokens=True)
    assert [token["id"] for token in answer["trace"]["tokens"][7:]] == wanted
    assert main([*arguments, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    del answer["trace"]
    assert plain == answer
