"""A run's tokenizer encodes on all cores, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmixer.config.errors import UserError
from dsmixer.data.parallel import SERIAL, VARIABLE, tokenizer_threads
from dsmixer.data.records import Example
from dsmixer.data.tokenize import tokenize_examples

SCRIPT = """
import os, sys
from transformers import AutoTokenizer
from dsmixer.data.records import Example
from dsmixer.data.tokenize import tokenize_examples
from dsmixer.training.progress import quiet_libraries

quiet_libraries()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
pairs = [Example(f"Question {i}? ", f"Answer {i}.", "a") for i in range(3000)]
chats = [
    Example("", "", "a", messages=({"role": "user", "content": ""}, {"role": "assistant", "content": str(i)}))
    for i in range(500)
]
before = len(os.listdir("/proc/self/task"))
stores = [
    tokenize_examples(of, [0] * len(of), tokenizer, max_length=16, decoder_start=start)
    for of, start in ((pairs, None), (pairs, 0), (chats, None))
]
print(len(os.listdir("/proc/self/task")) - before, [store.columns.to_pylist() for store in stores])
sys.stdout.flush()
if os.fork() == 0:
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_run_takes_threads_gives_the_same_tokens_and_a_child_says_nothing(
    chat_tokenizer: Any, tmp_path: Path
) -> None:
    chat_tokenizer.save_pretrained(tmp_path)
    found = {}
    for given in (None, "false"):
        inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
        environment = {**inherited, **({} if given is None else {VARIABLE: given}), "RAYON_NUM_THREADS": "3"}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert VARIABLE not in done.stderr
        found[given] = done.stdout.split(maxsplit=1)
    assert found[None][1] == found["false"][1] and found[None][1].count("input_ids") == 3000 + 3000 + 500
    assert (int(found[None][0]), int(found["false"][0])) == (3, 0)


@pytest.mark.parametrize("before", [None, SERIAL])
def test_threads_are_for_a_while_and_end_with_an_error_too(
    before: str | None, monkeypatch: pytest.MonkeyPatch, plain_tokenizer: Any
) -> None:
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)
    with tokenizer_threads():
        assert os.environ[VARIABLE] == "true"
    assert os.environ.get(VARIABLE) == before
    with pytest.raises(UserError, match="no token to learn"):
        tokenize_examples([Example("", "", "a")], [0], plain_tokenizer, max_length=8)
    assert os.environ.get(VARIABLE) == before


@pytest.mark.parametrize("said", ["false", "true", "0"])
def test_what_a_user_has_said_stays(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, said)
    with tokenizer_threads():
        assert os.environ[VARIABLE] == said
    assert os.environ[VARIABLE] == said
