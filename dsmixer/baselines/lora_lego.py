"""LoRA-LEGO: take all experts apart into rank-one pieces, cluster them, build one LoRA of the centres.

Shapes: N pieces of all experts, k clusters, D input width, O output width, R LoRA rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from dsmixer.adapters.peft_format import LoraPair
from dsmixer.baselines.extras import imported
from dsmixer.baselines.interface import Fitted, Given
from dsmixer.baselines.merged import Merged, pairs_of


@dataclass(frozen=True)
class LoraLego:
    """LoRA-LEGO (arXiv 2409.16167).

    A piece is a row of A with its column of B, each with the root of the expert's scale: the sum of the
    products ``b a^T`` is the expert. The pieces of all experts on a projection go through k-means; the
    centres are the rows and columns of a LoRA of rank k. Two weightings follow. A centre is shorter than
    its members are: it is scaled to their mean norm. And the whole is scaled by ``sqrt(R / k)``, R the
    experts' mean rank, since the spread of what a LoRA puts out grows with its rank; this second one is our
    reading of the paper's "dual reweighting", and is 1 at the default k.

    Attributes:
        rank: k; None: the experts' largest rank.
        reweight_centres: whether centres get their members' mean norm.
        reweight_output: whether the whole is scaled.
        num_starts: k-means starts, of which the best is taken.
    """

    trains: ClassVar[bool] = False

    rank: int | None = None
    reweight_centres: bool = True
    reweight_output: bool = True
    num_starts: int = 10

    def __call__(self, given: Given) -> Fitted:
        """Cluster each projection; arguments as ``Method``.

        ``found``: ``rank``.

        Raises:
            UserError: scikit-learn is not installed.
        """
        mixture = given.mixture
        rank = max(mixture.config.rank_list) if self.rank is None else self.rank
        matrices = {path: self._merge(pairs_of(mixture, path), rank, given.seed) for path in mixture.mixers}
        merged = Merged(matrices)
        return Fitted(lambda _: merged.under(mixture), found={"rank": rank}, merged=merged)

    def _merge(self, pairs: Sequence[LoraPair], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[k, D]`` and B ``[O, k]`` of one projection."""
        width = pairs[0].a_RD.shape[1]
        pieces_NF = torch.cat([pieces(pair) for pair in pairs])
        pieces_NF = pieces_NF[pieces_NF.any(1)]  # an expert that has nothing here has no pieces
        centres_kF = pieces_NF.new_zeros(rank, width + pairs[0].b_OR.shape[0])
        num_clusters = min(rank, len(pieces_NF))
        if num_clusters:
            centres_kF[:num_clusters] = self._centres(pieces_NF, num_clusters, seed)
        own_rank = sum(pair.a_RD.shape[0] for pair in pairs) / len(pairs)
        scale = math.sqrt(own_rank / rank) if self.reweight_output else 1.0
        return centres_kF[:, :width].contiguous(), scale * centres_kF[:, width:].T

    def _centres(self, pieces_NF: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
        cluster = imported("sklearn.cluster", "LoRA-LEGO")
        kmeans = cluster.KMeans(num_clusters, n_init=self.num_starts, random_state=seed)
        labels_N = torch.from_numpy(kmeans.fit_predict(pieces_NF.cpu().double().numpy()).astype("int64"))
        labels_N = labels_N.to(pieces_NF.device)
        centres = [pieces_NF[labels_N == c].mean(0) for c in range(num_clusters)]
        if self.reweight_centres:
            norms_N = pieces_NF.norm(dim=1)
            sizes = [norms_N[labels_N == c].mean() for c in range(num_clusters)]
            tiny = torch.finfo(pieces_NF.dtype).tiny
            centres = [c * (size / c.norm().clamp_min(tiny)) for c, size in zip(centres, sizes, strict=True)]
        return torch.stack(centres)


def pieces(pair: LoraPair) -> torch.Tensor:
    """Each rank of an expert as one vector, the row of A and then the column of B, ``[R, D + O]``."""
    root = math.sqrt(pair.scaling)
    return torch.cat([root * pair.a_RD, root * pair.b_OR.T], dim=1).float()
