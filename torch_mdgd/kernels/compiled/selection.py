"""Exact top-k: a bracket from a sample, as in :mod:`torch_mdgd.kernels.selection`, and then one pass over the scores.

It masks what lies above the bracket and collects what lies inside.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_mdgd.kernels import selection
from torch_mdgd.kernels.compiled import chunks, kernels
from torch_mdgd.kernels.selection import Source
from torch_mdgd.kernels.types import Tensors


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    source, masks = selection.of_scores(scores)
    wide = any(x.dtype == torch.float64 for x in scores)
    _Search(source, masks, [scores], np.empty(0), np.float64 if wide else np.float32).run(k)
    return masks


def top_k_similarity_masks(g: Tensors, v: Tensors, g0: Tensors, a: Tensor | None, k: int) -> list[Tensor | None]:
    """See :func:`torch_mdgd.kernels.top_k_similarity_masks`."""
    source, masks, present = selection.of_similarities(g, v, g0, a)
    scale = np.empty(0) if a is None else a.double().numpy()[present]
    vectors = [[vector[t] for t in present] for vector in (g, v, g0)]
    _Search(source, masks, vectors, scale, np.float64).run(k)
    found = iter(masks)
    return [next(found) if t in present else None for t in range(len(g))]


class _Search:
    """The masks of the k largest scores of a list.

    Args:
        source: reads scores for the sample.
        masks: T contiguous bool tensors, to be filled.
        vectors: one of scores, or the three that scores are computed from.
        scale: float64, shape (T,): a of :func:`top_k_similarity_masks`; empty without.
        dtype: of the scores.
    """

    def __init__(
        self, source: Source, masks: list[Tensor], vectors: Sequence[Tensors], scale: chunks.Array, dtype: type
    ) -> None:
        self.source, self.masks, self.dtype = source, masks, dtype
        # Held, since kernels know addresses only.
        self.lists: list[Tensors] = [masks, *(chunks.contiguous(vector) for vector in vectors)]
        self.at, self.kinds = chunks.addresses(self.lists)
        self.scale = scale
        self.parts = chunks.cut(chunks.lengths(masks), np.ones(len(masks), dtype=bool))

    def run(self, k: int) -> None:
        """Fill the masks.

        Raises:
            ValueError: k is out of range, or a score is NaN.
        """
        flat = [mask.view(-1) for mask in self.masks]
        total = sum(map(len, flat))
        if total <= selection.SAMPLE or not 1 <= k <= total:
            selection.select(self.source, self.masks, k)
            return
        sample = selection.sample_of(self.source, flat, total)
        for attempt in itertools.count():
            low, high = selection.bracket(sample, k / total, selection.SPREAD * 8**attempt)
            edge = self._try_between(k, low, high) if low < high else low
            if edge is None or self._try_ties(k, edge):
                return

    def _try_between(self, k: int, low: float, high: float) -> float | None:
        """As that of :mod:`torch_mdgd.kernels.selection`."""
        out = np.empty((len(self.parts), 3), dtype=np.int64)
        bounds = self.dtype(low), self.dtype(high)

        def run(first: int, end: int) -> tuple[chunks.Array, chunks.Array]:
            inside: tuple[chunks.Array, chunks.Array] = kernels.between(
                first, end, *self._tables(), self.scale, *bounds, self._scratch(), out
            )
            return inside

        places, found = (np.concatenate(x) for x in zip(*chunks.spread(run, len(self.parts)), strict=True))
        nan = out[:, 2] > 0
        if nan.any():
            raise ValueError(selection.has_nan(self.source, self.parts[nan.argmax(), 0]))
        at_high = int(out[:, 0].sum())
        if k < at_high:
            return high
        if k > at_high + len(found):
            return low
        kernels.mark(places[_largest(found, k - at_high)])
        return None

    def _try_ties(self, k: int, threshold: float) -> bool:
        """As that of :mod:`torch_mdgd.kernels.selection`."""
        out = np.empty((len(self.parts), 2), dtype=np.int64)
        taken = np.zeros(len(self.parts), dtype=np.int64)

        def fill(first: int, end: int) -> None:
            kernels.ties(first, end, *self._tables(), self.scale, self.dtype(threshold), self._scratch(), taken, out)

        chunks.spread(fill, len(self.parts))
        above, equal = out.sum(0).tolist()
        if not above <= k <= above + equal:
            return False
        before = out[:, 1].cumsum() - out[:, 1]
        taken[:] = np.clip(k - above - before, 0, out[:, 1])
        chunks.spread(fill, len(self.parts))
        return True

    def _tables(self) -> tuple[chunks.Array, chunks.Array, chunks.Array]:
        return self.parts, self.at, self.kinds

    def _scratch(self) -> chunks.Array:
        return chunks.scratch(2, self.dtype)


def _largest(scores: chunks.Array, k: int) -> chunks.Array:
    """A bool mask of the k largest scores, without NaN, k ≥ 0, the first of those that tie."""
    if not k:
        return np.zeros(len(scores), dtype=bool)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    chosen: chunks.Array = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    chosen[ties[: k - np.count_nonzero(chosen)]] = True
    return chosen
