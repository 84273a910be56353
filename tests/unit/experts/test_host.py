"""The kernels in C++: on any number of threads, without copies, and where they can't be had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.form_cases import Case, exact_of, gradients, leaves_of, plain_formula, run_form, scaling_of
from torch.utils._python_dispatch import TorchDispatchMode

from dsmixer.config.errors import UserError
from dsmixer.experts import host_library
from dsmixer.experts.assignment import Assignment
from dsmixer.experts.bank import ExpertBank
from dsmixer.experts.choice import MEASURED, pairs_form, suited_pairs
from dsmixer.experts.forms import forms
from dsmixer.experts.host import HostPairs, add_answers, can_multiply
from dsmixer.experts.pairs import sort_pairs

CPU = MEASURED.costs["cpu"]
CASE = Case(
    T=70, D=300, O=40, E=5, R=6, K=2, absent=True, dtype=torch.float32, bank_dtype=torch.float32, spread=True
)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder of extensions, and a process that has not asked for the kernels yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cached = (host_library.host_library, host_library.has_host_library)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    case, threads, found = Case(**{**vars(CASE), "dtype": dtype}), torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            leaves, indices_TK = leaves_of(case)
            y = run_form(forms["fused"], leaves, indices_TK, case)
            found.append((y.detach(), *gradients(y, leaves, case).values()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("bank", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rank", "width", "num_tokens"), [(1, 16, 1), (6, 37, 3), (8, 15, 2), (64, 300, 1)], ids=str
)
def test_answers_to_a_few_tokens_equal_the_sum_in_float64_on_any_number_of_threads(
    rank: int, width: int, num_tokens: int, given: torch.dtype, bank: torch.dtype
) -> None:
    case = Case(T=num_tokens, D=33, O=width, E=4, R=rank, K=3, absent=True, dtype=given, bank_dtype=bank)
    leaves, indices_TK = leaves_of(case)
    given_TO = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(1)).to(given)
    expected = given_TO.double() + plain_formula(exact_of(leaves), indices_TK, case).detach()
    x, a, b, weights = (leaf.detach() for leaf in leaves.values())
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(given_TO.clone())
            add_answers(found[-1], x, a, b, scaling_of(case), indices_TK, weights)
    finally:
        torch.set_num_threads(threads)
    assert (found[0].double() - expected).norm() <= {4: 1e-6, 2: 3e-3}[given.itemsize] * expected.norm()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.fixture
def two_tokens() -> dict[str, torch.Tensor]:
    """Arguments of ``add_answers`` but ``y_TO``."""
    case = Case(T=2, D=8, O=8, E=4, R=8, K=2, dtype=torch.float32, bank_dtype=torch.float32)
    leaves, indices_TK = leaves_of(case)
    x, a, b, weights = (leaf.detach() for leaf in leaves.values())
    named = {"x_TD": x, "a_ERD": a, "b_ERO": b, "s_E": scaling_of(case)}
    return named | {"indices_TK": indices_TK, "weights_TK": weights}


def test_an_index_above_the_last_expert_is_told_before_anything_is_read(
    two_tokens: dict[str, torch.Tensor],
) -> None:
    two_tokens["indices_TK"][1, 0] = 4
    y_TO = torch.zeros(2, 8)
    with pytest.raises(IndexError, match="above 3, the last expert"):
        add_answers(y_TO, **two_tokens)
    assert not y_TO.any()


def test_indices_of_32_bits_are_those_of_64(two_tokens: dict[str, torch.Tensor]) -> None:
    wide_TO, narrow_TO = torch.zeros(2, 8), torch.zeros(2, 8)
    add_answers(wide_TO, **two_tokens)
    add_answers(narrow_TO, **{**two_tokens, "indices_TK": two_tokens["indices_TK"].int()})
    assert wide_TO.any() and torch.equal(wide_TO, narrow_TO)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_TD", lambda x_TD: x_TD[:, :-1]),
        ("a_ERD", lambda a_ERD: a_ERD.transpose(1, 2)),
        ("b_ERO", lambda b_ERO: b_ERO.bfloat16()),
        ("b_ERO", lambda b_ERO: b_ERO[:, :-1]),
        ("s_E", lambda s_E: s_E.double()),
        ("weights_TK", lambda weights_TK: weights_TK.double()),
    ],
)
def test_what_does_not_fit_never_reaches_the_kernel(
    two_tokens: dict[str, torch.Tensor], name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises(AssertionError):
        add_answers(torch.zeros(2, 8), **{**two_tokens, name: change(two_tokens[name])})


@torch.no_grad()
def test_banks_of_two_dtypes_are_answered_by_the_other_way(two_tokens: dict[str, torch.Tensor]) -> None:
    x, a, b, s_E, indices_TK, weights_TK = two_tokens.values()
    assignment = Assignment(4, indices_TK=indices_TK, weights_TK=weights_TK)
    same, mixed = (forms["few"](x, a, bank, s_E, assignment, None) for bank in (b, b.bfloat16()))
    assert (same - mixed).norm() <= 1e-2 * same.norm()


@torch.no_grad()
def test_a_bank_made_under_another_default_dtype_answers_the_same() -> None:
    bank = ExpertBank("abcd", 8, 8, ranks=[8] * 4, alphas=[8.0, 16.0, 24.0, 32.0])
    for weights in (bank.lora_A, bank.lora_B):
        weights.normal_(generator=torch.Generator().manual_seed(1))
    x_TD, found = torch.randn(1, 8, generator=torch.Generator().manual_seed(2)), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            bank.forget()
            y_TO = torch.zeros(1, 8, dtype=torch.float32)
            bank.served.add(y_TO, x_TD, torch.tensor([[3, 1]]), torch.ones(1, 2, dtype=torch.float32))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(y_TO)
    assert found[0].any() and all(torch.equal(found[0], other) for other in found)


class _Made(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, views left out."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.known, self.largest = {of.untyped_storage().data_ptr() for of in given}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, out.nbytes)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_copies_neither_tokens_nor_banks(dtype: torch.dtype) -> None:
    case = Case(T=24, D=256, O=16, E=3, R=2, K=2, dtype=dtype, bank_dtype=torch.float32)
    leaves, indices_TK = leaves_of(case)
    with _Made([*leaves.values(), indices_TK]) as made, torch.no_grad():
        run_form(forms["fused"], leaves, indices_TK, case)
    assert 0 < made.largest < leaves["a"].numel() * dtype.itemsize < leaves["x"].nbytes


def test_short_rows_are_multiplied_where_they_lie_and_long_ones_in_blocks() -> None:
    short, long = torch.arange(60).view(20, 3) % 6, torch.arange(1200).view(400, 3) % 6
    assert isinstance(suited_pairs(sort_pairs(short, 6), 64, CPU, on_host=True), HostPairs)
    assert not isinstance(suited_pairs(sort_pairs(long, 6), 64, CPU, on_host=True), HostPairs)
    assert not isinstance(suited_pairs(sort_pairs(short, 6), 64, CPU, on_host=False), HostPairs)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-one", "there is no compiler 'no-such-one'"), ("false", "false fails: it says nothing")],
)
def test_without_a_compiler_the_form_is_refused_and_the_choice_does_without(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    leaves, indices_TK = leaves_of(CASE)
    with pytest.raises(UserError, match=message):
        run_form(forms["fused"], leaves, indices_TK, CASE)
    assert not can_multiply(torch.float32, torch.float32)
    blocks = run_form(forms["blocked"], leaves, indices_TK, CASE)
    assert torch.equal(run_form(pairs_form, leaves, indices_TK, CASE), blocks)
    assert not list(elsewhere.rglob("*.part"))


def test_the_kernels_are_kept_and_a_file_that_is_none_is_made_again(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_library.has_host_library()
    (kept,) = elsewhere.rglob("*.so")
    assert kept.parent == elsewhere / "dsmixer"
    other = elsewhere / "other" / "dsmixer" / kept.name  # a path that this process has not loaded
    other.parent.mkdir(parents=True)
    other.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(elsewhere / "other"))
    host_library.host_library.cache_clear()
    assert host_library.host_library()._name == str(other)
    assert other.stat().st_size == kept.stat().st_size


def test_ranks_that_compile_at_once_all_get_a_whole_file(elsewhere: Path) -> None:
    program = "from dsmixer.experts.host_library import host_library; print(host_library()._name)"
    start = partial(subprocess.Popen, [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    running = [start() for _ in range(3)]
    named = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (kept,) = (elsewhere / "dsmixer").iterdir()
    assert named == {str(kept)}
