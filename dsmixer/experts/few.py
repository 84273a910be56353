"""A few pairs of a token and an expert, each by itself: what one decoded token needs, and no more.

No sorting, no gate over the pool, nothing read of experts that are not chosen. On a device nothing here has
to be waited for, and no shape depends on what is chosen.

Shapes: T tokens, D input width, O output width, E experts, R LoRA rank, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dsmixer.experts.assignment import Assignment
from dsmixer.experts.dropout import Dropout, drop
from dsmixer.experts.host import add_answers, can_multiply

MAX_PAIRS = 64  # from there on sorting costs less than to take each pair's matrices
SMALL_POOL = 512
"""E*R up to which one wide product of the whole pool is the other way for a few tokens."""


def is_small(num_experts: int, rank: int) -> bool:
    """Whether a few tokens can as well meet the whole pool."""
    return num_experts * rank <= SMALL_POOL


def suits_few(x_TD: torch.Tensor, assignment: Assignment, num_experts: int, *, small: bool) -> bool:
    """Whether pairs one by one beat the other forms; never where gradients are wanted.

    Args:
        x_TD: the tokens.
        assignment: their experts.
        num_experts: E.
        small: whether one wide product of the whole pool is the other way.
    """
    if assignment.indices_TK is None or torch.is_grad_enabled():
        return False
    return _are_few(assignment.indices_TK.numel(), num_experts, small, _reads_in_place(x_TD))


def most_tokens(like: torch.Tensor, top_k: int, num_experts: int, *, small: bool) -> int:
    """How many tokens are few, of the dtype and on the device of ``like``; the rest as ``suits_few``."""
    in_place = _reads_in_place(like)
    found = (T for T in range(1, MAX_PAIRS + 1) if _are_few(T * top_k, num_experts, small, in_place))
    return max(found, default=0)


def _are_few(num_pairs: int, num_experts: int, small: bool, in_place: bool) -> bool:
    # where the matrices are copied before they are read, a pair costs about twice
    cost = num_pairs if in_place else 2 * num_pairs
    return num_pairs <= MAX_PAIRS and (cost <= num_experts or not small)


def few_form(
    x_TD: torch.Tensor,
    a_ERD: torch.Tensor,
    b_ERO: torch.Tensor,
    s_E: torch.Tensor,
    assignment: Assignment,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Each pair by itself: by a kernel that reads its matrices where they lie, or ``A_e x`` of each, then one
    weighted sum over the rows of the pairs' ``B_e``."""
    x_TD = drop(x_TD, dropout)
    indices_TK, weights_TK = assignment.indices_TK, assignment.weights_TK
    if indices_TK is not None and weights_TK is not None and _reads_in_place(x_TD, a_ERD, b_ERO):
        a_ERD, b_ERO = a_ERD.contiguous(), b_ERO.contiguous()
        y_TO = x_TD.new_zeros(x_TD.shape[0], b_ERO.shape[2])
        add_answers(y_TO, x_TD, a_ERD, b_ERO, s_E.float(), indices_TK, weights_TK.float())
        return y_TO
    indices_TK, weights_TK = assignment.as_pairs()
    scaled_TK = (weights_TK * s_E.to(weights_TK.dtype)[indices_TK]).to(x_TD.dtype)
    return _up(_down(x_TD, a_ERD, indices_TK) * scaled_TK[:, :, None], b_ERO, indices_TK)


def _reads_in_place(x_TD: torch.Tensor, *banks: torch.Tensor) -> bool:
    """Whether a kernel reads the pairs' matrices where they lie, without a copy: on the CPU, in banks of one
    dtype."""
    if x_TD.device.type != "cpu" or torch.is_grad_enabled():
        return False
    dtypes = {bank.dtype for bank in banks}
    return len(dtypes) <= 1 and can_multiply(x_TD.dtype, *dtypes)


def _down(x_TD: torch.Tensor, a_ERD: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """``A_e x`` of every pair, ``[T, K, R]``."""
    num_tokens, top_k = indices_TK.shape
    a_TFD = _matrices(a_ERD, indices_TK, x_TD.dtype)
    return torch.bmm(a_TFD, x_TD[:, :, None]).view(num_tokens, top_k, a_ERD.shape[1])


def _up(h_TKR: torch.Tensor, b_ERO: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """``sum_k B_e h`` of every token, ``[T, O]``."""
    num_experts, rank, width = b_ERO.shape
    h_TF = h_TKR.flatten(1)
    if b_ERO.dtype != h_TF.dtype:
        return torch.bmm(h_TF[:, None, :], _matrices(b_ERO, indices_TK, h_TF.dtype)).squeeze(1)
    # a weighted sum over rows of the bank, which copies none
    rows_TKR = indices_TK[:, :, None] * rank + torch.arange(rank, device=h_TF.device)
    bank_FO = b_ERO.reshape(num_experts * rank, width)
    return F.embedding_bag(rows_TKR.flatten(1), bank_FO, mode="sum", per_sample_weights=h_TF)


def _matrices(bank_ERX: torch.Tensor, indices_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrices of each token's experts below each other, ``[T, K*R, X]``."""
    num_tokens, top_k = indices_TK.shape
    _, rank, width = bank_ERX.shape
    chosen_NRX = bank_ERX.index_select(0, indices_TK.flatten()).to(dtype)
    return chosen_NRX.view(num_tokens, top_k * rank, width)


class ServedBank:
    """A bank's weights laid out for tokens that are only to be answered: what is the same for every token is
    made once. Its tensors are views of the bank's, so that it costs no memory.

    Args:
        a_ERD: ``lora_A``.
        b_ERO: ``lora_B``, of the same dtype.
        scaling: s of each expert.
    """

    def __init__(self, a_ERD: torch.Tensor, b_ERO: torch.Tensor, scaling: Sequence[float]) -> None:
        num_experts, rank, width = b_ERO.shape
        self._places = a_ERD.data_ptr(), b_ERO.data_ptr()
        self._a_ERD, self._b_ERO = a_ERD, b_ERO
        self._b_FO = b_ERO.view(num_experts * rank, width)
        self._same = scaling[0] if len(set(scaling)) == 1 else None
        with torch.inference_mode(False):  # what is made inside could not be used outside of it
            self._s_E = torch.tensor(scaling, dtype=torch.float32, device=a_ERD.device)
            self._rows_ER = torch.arange(num_experts * rank, device=a_ERD.device).view(num_experts, rank)

    def shows(self, a_ERD: torch.Tensor, b_ERO: torch.Tensor) -> bool:
        """Whether these are the tensors that it shows."""
        return self._places == (a_ERD.data_ptr(), b_ERO.data_ptr()) and a_ERD.dtype == self._a_ERD.dtype

    def add(
        self, y_TO: torch.Tensor, x_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """``y_t + sum_k w_tk s_e B_e A_e x_t``, in ``y_TO`` itself where a kernel does it.

        Args:
            y_TO: the projection's own output, of the bank's dtype, contiguous, which nobody else holds.
            x_TD: its input, of the bank's dtype.
            indices_TK: the experts of each token, none absent.
            weights_TK: their weights, float32.
        """
        if not _reads_in_place(x_TD):
            return y_TO + self._gathered(x_TD, indices_TK, weights_TK)
        add_answers(y_TO, x_TD, self._a_ERD, self._b_ERO, self._s_E, indices_TK, weights_TK)
        return y_TO

    def _gathered(
        self, x_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        num_tokens, top_k = indices_TK.shape
        _, rank, width = self._a_ERD.shape
        indices_N = indices_TK.view(-1)
        scale = self._s_E.take(indices_TK) if self._same is None else self._same
        scaled_TK1 = (weights_TK * scale).to(x_TD.dtype)[:, :, None]
        a_TFD = self._a_ERD.index_select(0, indices_N).view(num_tokens, top_k * rank, width)
        h_TKR = torch.bmm(a_TFD, x_TD[:, :, None]).view(num_tokens, top_k, rank) * scaled_TK1
        rows_TF = self._rows_ER.index_select(0, indices_N).view(num_tokens, top_k * rank)
        h_TF = h_TKR.view(num_tokens, top_k * rank)
        return F.embedding_bag(rows_TF, self._b_FO, mode="sum", per_sample_weights=h_TF)
