"""The fused form against one plain formula in float64: its kernels in C++, and those in Triton, on a GPU
if there is one and else by interpretation."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from support.form_cases import LEAVES, Case, Leaves, exact_of, gradients, leaves_of, plain_formula, run_form
from torch.utils._python_dispatch import TorchDispatchMode

from dsmixer.experts.host import host_pairs
from dsmixer.experts.pairs import Layout, by_pairs, sort_pairs

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if HAS_TRITON:
    with pytest.MonkeyPatch.context() as environment:
        if DEVICE == "cpu":
            environment.setenv("TRITON_INTERPRET", "1")  # is looked at where a kernel is defined
            importlib.import_module("triton.experimental.gluon")  # a first launch would find the setting gone
        from dsmixer.experts.fused import fused_pairs
else:
    fused_pairs = None  # type: ignore[assignment]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


@dataclass(frozen=True)
class Kernels:
    """One implementation, and where it runs."""

    layout: Layout
    device: str

    def drawn(self, case: Case) -> tuple[Leaves, torch.Tensor]:
        return leaves_of(case, self.device)

    def run(self, leaves: Leaves, indices_TK: torch.Tensor, case: Case) -> torch.Tensor:
        return run_form(partial(by_pairs, layout=self.layout), leaves, indices_TK, case)


KERNELS = {"triton": Kernels(fused_pairs, DEVICE), "c++": Kernels(host_pairs, "cpu")}


@pytest.fixture(params=[pytest.param("triton", marks=needs_triton), "c++"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return KERNELS[request.param]


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies their bits as integers (seen in 3.9.0); float32 holds the values and their products."""
    if DEVICE != "cpu" or not HAS_TRITON:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.create_fp_ext(of, tl.float32) if of.dtype == tl.bfloat16 else of for of in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def case_of(**of: Any) -> Case:
    """In float32, unless it says something else."""
    return Case(**{"dtype": torch.float32, "bank_dtype": torch.float32, **of})


CASES = {
    "one token": case_of(T=1, D=8, O=8, E=4, R=8, K=1),
    "no token": case_of(T=0, D=8, O=8, E=4, R=8, K=2),
    "no token for most experts": case_of(T=7, D=8, O=8, E=4, R=8, K=2, lonely=True),
    "absent pairs": case_of(T=40, D=24, O=40, E=3, R=8, K=3, absent=True),
    "rank 1": case_of(T=9, D=32, O=16, E=4, R=1, K=2),
    "rank 6": case_of(T=9, D=32, O=16, E=4, R=6, K=2, summed=True),
    "rank 64": case_of(T=50, D=48, O=32, E=2, R=64, K=2),
    "rank above a tile": case_of(T=20, D=16, O=16, E=2, R=130, K=1),
    "widths above a tile": case_of(T=70, D=150, O=300, E=3, R=16, K=2),
    "odd widths": case_of(T=33, D=37, O=19, E=4, R=8, K=2),
    "not contiguous": case_of(T=33, D=20, O=12, E=4, R=6, K=2, strided=True),
    "gradient of stride 0": case_of(T=33, D=20, O=12, E=4, R=8, K=2, spread=True),
    "gradient of one number": case_of(T=33, D=20, O=12, E=4, R=8, K=2, summed=True),
    "dropout": case_of(T=33, D=32, O=16, E=4, R=8, K=2, dropout=0.25),
    "hard routing": case_of(T=64, D=32, O=16, E=6, R=8, K=1),
    "hard routing, some without": case_of(T=64, D=32, O=16, E=2, R=8, K=1, absent=True),
    "one expert": case_of(T=150, D=16, O=24, E=1, R=8, K=1),
    "more experts than pairs": case_of(T=2, D=16, O=16, E=40, R=4, K=2),
    "bfloat16": case_of(T=70, D=32, O=160, E=4, R=8, K=2, absent=True, dtype=torch.bfloat16),
    "bfloat16, not contiguous": case_of(T=20, D=22, O=18, E=3, R=6, K=2, strided=True, dtype=torch.bfloat16),
    "bfloat16 banks": case_of(
        T=20, D=32, O=16, E=3, R=8, K=2, dtype=torch.bfloat16, bank_dtype=torch.bfloat16
    ),
    "bfloat16 banks, wide": case_of(
        T=70, D=270, O=37, E=3, R=6, K=2, dtype=torch.bfloat16, bank_dtype=torch.bfloat16
    ),
    "bfloat16 banks under float32": case_of(T=20, D=32, O=16, E=3, R=8, K=2, bank_dtype=torch.bfloat16),
    "bfloat16, dropout": case_of(T=20, D=32, O=16, E=3, R=8, K=2, dropout=0.25, dtype=torch.bfloat16),
    "float16": case_of(T=20, D=32, O=16, E=3, R=8, K=2, dtype=torch.float16),
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Of the largest value; where a GPU rounds to bfloat16, the interpreter cuts bits off."""


def assert_near(got: torch.Tensor, wanted: torch.Tensor, case: Case) -> None:
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    if got.numel():
        bound = max(TOLERANCES[case.dtype], TOLERANCES[case.bank_dtype]) * float(wanted.detach().abs().max())
        assert float((got.double() - wanted).detach().abs().max()) <= bound


@pytest.mark.parametrize("name", list(CASES))
def test_the_fused_form_equals_the_formula_in_outputs_and_all_gradients(kernels: Kernels, name: str) -> None:
    case = CASES[name]
    if kernels.device == "cpu" and case.dtype == torch.float16 and kernels.layout is host_pairs:
        pytest.skip("the kernels in C++ refuse float16, see below")
    leaves, indices_TK = kernels.drawn(case)
    exact = exact_of(leaves)
    y, expected = kernels.run(leaves, indices_TK, case), plain_formula(exact, indices_TK, case)
    assert y.dtype == case.dtype
    assert_near(y, expected, case)
    got, wanted = gradients(y, leaves, case), gradients(expected, exact, case)
    for leaf in LEAVES:
        assert got[leaf].dtype == leaves[leaf].dtype
        assert_near(got[leaf], wanted[leaf], case)


def test_pairs_without_an_expert_get_exactly_nothing(kernels: Kernels) -> None:
    case = case_of(T=5, D=8, O=8, E=3, R=8, K=2)
    leaves, indices_TK = kernels.drawn(case)
    indices_TK[1] = -1
    indices_TK[3, 0] = -1
    y = kernels.run(leaves, indices_TK, case)
    of = gradients(y, leaves, case)
    assert not y[1].any() and not of["x"][1].any() and not of["weights"][1].any()
    assert not of["weights"][3, 0] and of["weights"][3, 1]


def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero(kernels: Kernels) -> None:
    case = CASES["no token for most experts"]
    leaves, indices_TK = kernels.drawn(case)
    of = gradients(kernels.run(leaves, indices_TK, case), leaves, case)
    assert of["a"][0].any() and not of["a"][1:].any()
    assert of["b"][0].any() and not of["b"][1:].any()


@pytest.mark.parametrize("frozen", [("x",), ("a",), ("b",), ("weights",), ("a", "b"), ("x", "weights")])
def test_what_needs_no_gradient_gets_none_and_changes_no_other(
    kernels: Kernels, frozen: tuple[str, ...]
) -> None:
    case = case_of(T=12, D=20, O=12, E=3, R=8, K=2, absent=True, dropout=0.25)
    leaves, indices_TK = kernels.drawn(case)
    everything = gradients(kernels.run(leaves, indices_TK, case), leaves, case)
    some = {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    got = gradients(kernels.run(some, indices_TK, case), some, case)
    assert got.keys() == set(LEAVES) - set(frozen)
    for name, gradient in got.items():
        assert torch.equal(gradient, everything[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_the_same_bit_for_bit(kernels: Kernels, dtype: torch.dtype) -> None:
    case = case_of(T=70, D=36, O=20, E=3, R=8, K=2, absent=True, dtype=dtype)
    runs = []
    for _ in range(2):
        leaves, indices_TK = kernels.drawn(case)
        y = kernels.run(leaves, indices_TK, case)
        runs.append((y.detach(), *gradients(y, leaves, case).values()))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("named", ["x", "bank"])
def test_float64_is_refused_and_the_forms_that_take_it_are_named(kernels: Kernels, named: str) -> None:
    case = case_of(T=4, D=8, O=8, E=2, R=4, K=1)
    leaves, indices_TK = kernels.drawn(case)
    leaves = {key: leaf.double() if (key == "x") == (named == "x") else leaf for key, leaf in leaves.items()}
    with pytest.raises(ValueError, match=r"not torch\.float64: take the form `grouped`"):
        kernels.run(leaves, indices_TK, case)


@needs_triton
@pytest.mark.parametrize(
    "indices_TK",
    [
        torch.randint(-1, 5, (97, 3), generator=torch.Generator().manual_seed(0)),
        torch.full((97, 3), -1),
        torch.full((97, 3), 4),
        torch.arange(5)[:, None].repeat(1, 3),
    ],
    ids=["some absent", "all absent", "one expert", "three rows each"],
)
def test_every_row_is_in_one_block_and_every_block_of_one_expert(indices_TK: torch.Tensor) -> None:
    pairs = fused_pairs(sort_pairs(indices_TK.to(DEVICE), 5))
    covered = []
    for group, first in zip(pairs.group_B.tolist(), pairs.first_B.tolist(), strict=True):
        rows = range(first, min(first + pairs.block_length, int(pairs.limit_L[group + 1])))
        assert all(int(pairs.expert_I[row]) == group for row in rows)
        covered += rows
    assert covered == list(range(indices_TK.numel()))


class _Watched(TorchDispatchMode):
    """Notes what operations return, and refuses those whose result a host would wait for."""

    WAITED_FOR = re.compile(r"aten\.(_local_scalar_dense|nonzero|equal|is_nonzero|masked_select|unique)")

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not self.WAITED_FOR.match(str(func)), f"a host waits for {func}"
        out = func(*args, **(kwargs or {}))
        self.made += [each for each in (out if isinstance(out, tuple | list) else [out]) if _is_tensor(each)]
        return out

    def sizes(self, but: list[torch.Tensor]) -> Iterator[int]:
        """Bytes of what was made, views left out."""
        known = {of.untyped_storage().data_ptr() for of in but}
        for each in self.made:
            if each.untyped_storage().data_ptr() not in known:
                yield each.nbytes


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_tokens_or_banks_is_made_and_no_host_waits(dtype: torch.dtype) -> None:
    case = case_of(T=24, D=256, O=16, E=3, R=2, K=2, absent=True, dtype=dtype)
    leaves, indices_TK = KERNELS["triton"].drawn(case)
    leaves["x"] = leaves["x"].detach()
    inputs = [*leaves.values(), indices_TK]
    with _Watched() as forward:
        y = KERNELS["triton"].run(leaves, indices_TK, case)
    cast_bytes = leaves["a"].numel() * dtype.itemsize
    assert max(forward.sizes(but=inputs)) < cast_bytes < leaves["x"].nbytes
    with _Watched() as backward:
        gradients(y, leaves, replace(case, spread=True))
    large = [size for size in backward.sizes(but=inputs) if size >= cast_bytes]
    assert set(large) == {leaves["a"].nbytes}  # its gradient


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsmixer.experts.fused import _multiply_kernel, _outer_kernel, _tiles
pointers = dict(pair_I="*i64", group_B="*i64", first_B="*i64", limit_L="*i64")
for capability, rows, bank in ((80, "bf16", "bf16"), (86, "fp32", "fp32"), (89, "bf16", "fp32")):
    pointers |= dict(left="*" + rows, matrices_EXY="*" + bank, out="*" + rows)
    pointers |= dict(left_IX="*" + rows, right_TY="*" + rows, out_EXY="*" + bank)
    empty = dict(bf16=torch.empty(1, 512, 512, dtype=torch.bfloat16), fp32=torch.empty(1, 512, 512))
    x_tile, y_tile = _tiles(empty[rows][0], empty[bank])
    tiles = dict(M=64, TILE_X=x_tile, TILE_Y=y_tile)
    for kernel, constants, stages in (
        (_multiply_kernel, dict(FROM_TOKENS=True, x_stride=1, **tiles), 3),
        (_multiply_kernel, dict(FROM_TOKENS=False, y_stride=1, **tiles), 3),
        (_outer_kernel, dict(M=32, TILE_X=64, TILE_Y=64), 5),
    ):
        names = kernel.arg_names
        types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
        values = {(names.index(n),): value for n, value in constants.items()}
        sixteens = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
        options = dict(num_warps=4, num_stages=stages)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, types, values, sixteens), target=target, options=options)
        print(made.metadata.shared, len(made.asm["cubin"]))
"""


@needs_triton
def test_the_kernels_compile_for_gpus_that_are_not_here_within_their_shared_memory(tmp_path: Any) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    printed = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert printed.returncode == 0, printed.stderr
    lines = [tuple(map(int, line.split())) for line in printed.stdout.splitlines()]
    assert len(lines) == 9
    assert all(shared <= 99 * 1024 and size for shared, size in lines)
