"""Ways to compute the same sum over experts, and the choice between them.

    y_t = sum_e gate_te * s_e * B_e A_e x_t

``loop`` is the reference. ``dense`` makes one wide product of all experts, for pools where E*R is small.
``pairs`` lays the pairs of a token and an expert out by expert, so that each expert's rows meet its own
matrices, in the way that suits: ``grouped`` one after the other, ``blocked`` in blocks of one length,
``fused`` where they lie, by kernels that bring tokens to their experts themselves, in C++ for the CPU and in
Triton for GPUs on which ``F.grouped_mm`` has none of its own. ``few`` takes each pair by itself: for the few
tokens of a decoding step, where no gradient is wanted.

All but ``loop`` and ``few`` keep for the backward pass their input, the weights of the pairs and which
experts they name, all as they were given, and nothing else: the products of size T*E*R are made again, and so
is the mask of dropout, from its seed. So projections that read one input share what is kept of it. The
parameters themselves are kept, not casts or views of them, so that ZeRO-3 may release and gather them between
the two passes.

They take from a bank only the C experts that the pairs name, so that their cost follows the chosen experts
and not the pool; where that is most of the bank, it is taken as it is, without a copy. On the CPU C is
counted. On a device a count would make the host wait: C is then a bound, the number of pairs. What still
grows with the pool is the zeros of a gradient that has the shape of the bank (``empty_gradient``).

Shapes: T tokens, D input width, O output width, E experts, C chosen experts, R LoRA rank, K experts a token,
N pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.blocked import blocked_pairs
from dsmixer.experts.choice import MEASURED, FormTable, choose_form, pairs_form
from dsmixer.experts.dense import dense_form
from dsmixer.experts.dropout import Dropout, drop
from dsmixer.experts.few import few_form, is_small, suits_few
from dsmixer.experts.grouped import sorted_pairs
from dsmixer.experts.host import host_pairs
from dsmixer.experts.pairs import by_pairs

# (x_TD, a_ERD, b_ERO, s_E, assignment, dropout of x) -> y_TO
Form = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Assignment, Dropout | None], torch.Tensor
]


def auto_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
    table: FormTable = MEASURED,
) -> torch.Tensor:
    """The form that is fastest for the tokens and how they chose, as the table says."""
    num_experts, rank = a_ERD.shape[:2]
    if suits_few(x_TD, assignment, num_experts, small=is_small(num_experts, rank)):
        return few_form(x_TD, a_ERD, b_ERO, s_E, assignment, dropout)
    if choose_form(x_TD, rank, assignment, table) == "dense":
        return dense_form(x_TD, a_ERD, b_ERO, s_E, assignment, dropout)
    return pairs_form(x_TD, a_ERD, b_ERO, s_E, assignment, dropout, table)


def loop_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """One expert after the other, each over all tokens: slow, plain, and what the others are held to."""
    x_TD = drop(x_TD, dropout)
    gate_TE = assignment.as_gate()
    y_TO = x_TD.new_zeros(x_TD.shape[0], b_ERO.shape[2])
    for e in range(assignment.num_experts):
        h_TR = x_TD @ a_ERD[e].to(x_TD.dtype).T
        out_TO = h_TR @ b_ERO[e].to(x_TD.dtype)
        y_TO = y_TO + out_TO * (gate_TE[:, e, None] * s_E[e]).to(x_TD.dtype)
    return y_TO


def fused_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """The pairs multiplied where they lie: ``experts.host`` on the CPU, ``experts.fused`` elsewhere.

    Raises:
        ImportError: triton is not installed.
        UserError: there is no compiler for the kernels of the CPU.
        ValueError: there is no kernel for the dtypes.
    """
    if x_TD.device.type == "cpu":
        return by_pairs(x_TD, a_ERD, b_ERO, s_E, assignment, dropout, layout=host_pairs)
    from dsmixer.experts.fused import fused_pairs  # triton is there only beside a GPU

    return by_pairs(x_TD, a_ERD, b_ERO, s_E, assignment, dropout, layout=fused_pairs)


forms: dict[str, Form] = {
    "loop": loop_form,
    "dense": dense_form,
    "pairs": pairs_form,
    "grouped": partial(by_pairs, layout=sorted_pairs),
    "blocked": partial(by_pairs, layout=blocked_pairs),
    "fused": fused_form,
    "few": few_form,
}
