"""Masks by other scores than the published one: does any of them keep more and learn as much?

Over a few batches of the target's training examples, before anything has moved, and for every number of the weights:

    F = mean of g²                      how much it moves the task loss (the empirical Fisher information)
    V = mean of (∂⟨z, ε⟩ / ∂θ)²         how much it moves the visual features z, by random signs ε

The visual gradient itself cannot score anything then: it is zero at the reference.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torch_mdgd import Given, VisualTap

Batches = Sequence[Mapping[str, Tensor]]
Score = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def _task(F: list[Tensor], V: list[Tensor]) -> list[Tensor]:
    return F


def _ratio(F: list[Tensor], V: list[Tensor]) -> list[Tensor]:
    """F / (V + ε), with ε the mean of V: what moves the loss and leaves the features alone."""
    epsilon = torch.cat([v.reshape(-1) for v in V]).mean()
    return [f / (v + epsilon) for f, v in zip(F, V, strict=True)]


def _still(F: list[Tensor], V: list[Tensor]) -> list[Tensor]:
    return [-v for v in V]


def _rows(F: list[Tensor], V: list[Tensor]) -> list[Tensor]:
    """Whole rows of matrices, by their mean of F."""
    return [f.mean(1, keepdim=True).expand_as(f) if f.dim() == 2 else f for f in F]


def _mixed(F: list[Tensor], V: list[Tensor]) -> list[Tensor]:
    """Places by F and places at random, in turn: half of the mask is the one's, half the other's."""
    scores = torch.cat([f.reshape(-1) for f in F])
    ranks = scores.argsort(descending=True, stable=True).argsort()
    drawn = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    best = -torch.minimum(2 * ranks, 2 * drawn + 1).double()
    return [part.view_as(f) for part, f in zip(best.split([f.numel() for f in F]), F, strict=True)]


SCORES: dict[str, Score] = {"task": _task, "ratio": _ratio, "still": _still, "rows": _rows, "mixed": _mixed}


def scored_mask(
    kind: str, fraction: float, model: torch.nn.Module, parameters: Sequence[Tensor], batches: Batches
) -> Given:
    """The fraction of all numbers with the highest score, ties to the lowest index.

    Args:
        kind: of `SCORES`.
        fraction: in (0, 1].
        model: not changed.
        parameters: whose numbers are scored.
        batches: for `model(**batch)`, with labels.
    """
    scores = SCORES[kind](*squared_gradients(model, parameters, batches))
    flat = torch.cat([score.reshape(-1) for score in scores])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(1, round(fraction * len(flat)))]] = True
    return Given([m.view_as(p) for m, p in zip(chosen.split([p.numel() for p in parameters]), parameters, strict=True)])


def squared_gradients(
    model: torch.nn.Module, parameters: Sequence[Tensor], batches: Batches
) -> tuple[list[Tensor], list[Tensor]]:
    """F and V: float64 tensors of the parameters' shapes."""
    tap, generator = VisualTap.for_model(model), torch.Generator().manual_seed(0)
    F, V = ([torch.zeros_like(p, dtype=torch.float64) for p in parameters] for _ in "FV")
    for batch in batches:
        output, z = tap(model, batch)
        signs = torch.randint(0, 2, z.shape, generator=generator) * 2.0 - 1
        for sums, value in ((V, (z * signs).sum()), (F, output.loss)):
            found = torch.autograd.grad(value, parameters, retain_graph=sums is V, allow_unused=True)
            for total, x in zip(sums, found, strict=True):
                if x is not None:
                    total += x.double().square() / len(batches)
    return F, V
