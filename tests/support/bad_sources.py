"""Bad data files and bad base models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from support.bad_input import BAD_RECORDS, GOOD, Site, case, lines


@case("missing data file")
def _(site: Site) -> tuple[list[str], list[str]]:
    (site.root / "chess.jsonl").unlink()
    return site.train(), [site.place("chess.jsonl"), "data.domains.1.train", "no such file", "check the path"]


@case("empty domain")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = site.data("chess.jsonl", "")
    return site.train(), [
        site.place(str(path)),
        "data.domains.1.train",
        "no training example",
        "give it data",
    ]


@case("one example, none for the routers")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("chess.jsonl", lines(GOOD[:1]))
    return site.train(), ["data.domains: chess", "none to spare for the routers", "stage2.data.source"]


def bad_records(suffix: str, write: Callable[[Path], None], place: str) -> None:
    """A record without its completion, the third of a file of this format."""

    @case(f"bad record in {suffix}")
    def spoil(site: Site) -> tuple[list[str], list[str]]:
        path = site.root / f"chess{suffix}"
        write(path)
        site.change(f"{site.root}/chess.jsonl", str(path))
        return site.train(), [f"{path}:{place}: completion", "Fix: "]


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows(
            [["prompt", "completion"], *([r["prompt"], r.get("completion", "")] for r in BAD_RECORDS)]
        )


def write_parquet(path: Path) -> None:
    rows = [{"prompt": r["prompt"], "completion": r.get("completion")} for r in BAD_RECORDS]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_lines(path: Path) -> None:
    path.write_text(lines(BAD_RECORDS))


def write_list(path: Path) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in BAD_RECORDS) + "\n]\n")


bad_records("-bad.jsonl", write_lines, "3")
bad_records(".json", write_list, "4")
bad_records(".csv", lambda path: write_table(path, ","), "4")
bad_records(".tsv", lambda path: write_table(path, "\t"), "4")
bad_records(".parquet", write_parquet, "row 3")


@case("broken JSON in a line")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = site.data("chess.jsonl", lines(GOOD) + '{"prompt": "a", "completion": \n')
    return site.train(), [f"{path}:9", "not valid JSON", "one JSON object a line"]


@case("a damaged parquet file")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = site.data("chess.parquet", "PAR1 and no more")
    site.change(f"{site.root}/chess.jsonl", str(path))
    return site.train(), [str(path), "not a readable parquet file", "replace the file"]


@case("a conversation without a chat template")
def _(site: Site) -> tuple[list[str], list[str]]:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    path = site.data("chess.jsonl", lines(GOOD[:2]) * 2 + json.dumps({"messages": talk}) + "\n")
    more = ["data.domains.1.test=" + str(path)]
    return site.train(*more), [f"{path}:5", "no chat template", "instruction-tuned base"]


@case("a domain column that leaves its folder")
def _(site: Site) -> tuple[list[str], list[str]]:
    path = site.data("all.jsonl", lines([{**record, "kind": "../../etc"} for record in GOOD]))
    arguments = site.train("data.domains=[]", f"data.source={{train: {path}, column: kind}}")
    return arguments, [f"{path}:1: kind", "'../../etc' is not a domain name"]


@case("top-k above the domains that a column names")
def _(site: Site) -> tuple[list[str], list[str]]:
    kinds = ("law", "chess", "law", "chess", "law", "chess", "law", "chess")
    path = site.data("all.jsonl", lines([{**r, "kind": k} for r, k in zip(GOOD, kinds, strict=True)]))
    source = f"data.source={{train: {path}, column: kind}}"
    arguments = site.train("data.domains=[]", source, "stage2.top_k=5")
    return arguments, ["command line: stage2.top_k=5", "5 experts a token, of 2", "write at most 2"]


@case("unknown target module")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.change("targets: [q, v]", "targets: [q, wisdom_proj]")
    return site.train(), [
        site.place("wisdom"),
        "mixer.targets",
        "wisdom_proj matches no projection",
        "q_proj",
    ]


@case("a part of a fused projection")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.change(str(site.bases / "llama"), str(site.bases / "gpt2"))
    return site.train(), [
        site.place("targets"),
        "mixer.targets",
        "c_attn is one fused projection",
        "name all of q, k, v",
    ]


@case("base folder missing")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.change(str(site.bases / "llama"), f"{site.root}/no-model")
    return site.train(), [site.place("no-model"), "base.model", "no such file or folder", "check the path"]


@case("base folder without a model")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("no-model/notes.txt", "nothing here\n")
    site.change(str(site.bases / "llama"), f"{site.root}/no-model")
    return site.train(), [site.place("no-model"), "base.model", "no model configuration", "config.json"]


@case("base of an encoder and a decoder of another kind")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("bart/config.json", '{"model_type": "bart", "is_encoder_decoder": true}')
    site.change(str(site.bases / "llama"), f"{site.root}/bart")
    return site.train(), [
        site.place("bart"),
        "base.model",
        "bart is an encoder-decoder model",
        "choose one of",
    ]


@case("base whose decoder starts from nowhere")
def _(site: Site) -> tuple[list[str], list[str]]:
    site.data("t5/config.json", '{"model_type": "t5", "decoder_start_token_id": null}')
    site.change(str(site.bases / "llama"), f"{site.root}/t5")
    return site.train(), [
        site.place("t5"),
        "base.model",
        "from which token its decoder starts",
        "padding token",
    ]


@case("damaged base weights")
def _(site: Site) -> tuple[list[str], list[str]]:
    copy = site.root / "damaged"
    copy.mkdir()
    for file in (site.bases / "llama").iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    site.change(str(site.bases / "llama"), str(copy))
    return site.train(), [
        site.place("damaged"),
        "base.model",
        "could not be loaded",
        "config.json and safetensors",
    ]


@case("base without a tokenizer")
def _(site: Site) -> tuple[list[str], list[str]]:
    copy = site.root / "mute"
    copy.mkdir()
    for file in (site.bases / "llama").iterdir():
        if "token" not in file.name:
            (copy / file.name).write_bytes(file.read_bytes())
    site.change(str(site.bases / "llama"), str(copy))
    return site.train(), [
        site.place("mute"),
        "base.model",
        "no tokenizer could be loaded",
        "beside the model's",
    ]
