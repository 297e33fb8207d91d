"""What the figures draw, from what runs left on disk: ranks, embeddings of features, curves, masking ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import TSNE  # type: ignore[import-untyped]

from reproductions.paper.report.results import Result

Kind = Literal["visual", "multimodal"]
EMBEDDED = 500
"""Examples of each system that t-SNE places."""


@dataclass(frozen=True)
class Embedding:
    """Features of several systems placed in one plane.

    Attributes:
        points: method -> float (examples, 2).
    """

    points: Mapping[str, NDArray[np.float64]]


def ranks(runs: Mapping[str, Result], methods: Sequence[str], tasks: Sequence[str]) -> dict[str, list[float]]:
    """Effective rank of each method on each task, NaN where it is not measured; methods without any are left out."""
    found = {m: [runs[m].effective_ranks.get(task, np.nan) for task in tasks] for m in methods if m in runs}
    return {method: values for method, values in found.items() if not np.isnan(values).all()}


def embed(runs: Mapping[str, Result], methods: Sequence[str], task: str, kind: Kind) -> Embedding | None:
    """t-SNE of the features of several systems together, so that the same place means alike features.

    Args:
        runs: by method.
        methods: whose features; those without any are left out, and those that diverged to NaN or Inf.
        task: of which data set.
        kind: "visual", at the last image token, or "multimodal", at the last token of the instruction.

    Returns:
        None where fewer than two methods have features, or all together have fewer than four examples.
    """
    kept = {m: runs[m].features(task) for m in methods if m in runs}
    arrays = {m: np.asarray(found[kind], dtype=np.float64)[:EMBEDDED] for m, found in kept.items() if kind in found}
    arrays = {method: array for method, array in arrays.items() if np.isfinite(array).all()}
    together = np.concatenate([*arrays.values()]) if arrays else np.empty((0, 0))
    if len(arrays) < 2 or len(together) < 4:
        return None
    # Hidden states differ in scale from model to model, on which the steps of t-SNE depend.
    centred = together - together.mean(0)
    alike = not centred.any()
    # scikit-learn divides by the spread of the first principal component, and crashes where there is none.
    start = "random" if alike or together.shape[1] == 1 else "pca"
    # t-SNE wants the perplexity well below the number of points.
    tsne = TSNE(perplexity=min(30.0, (len(together) - 1) / 3), init=start, random_state=0)
    points = tsne.fit_transform(centred / (1.0 if alike else centred.std()))
    placed = np.split(points, np.cumsum([len(array) for array in arrays.values()])[:-1])
    return Embedding(dict(zip(arrays, placed, strict=True)))


def curve(run: Result) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Learning curve, empty without a log: steps, losses, and running means, NaN where those would pass an end."""
    lines = [line for line in run.training if "loss" in line]
    steps = np.array([line["step"] for line in lines], dtype=float)
    losses = np.array([line["loss"] for line in lines], dtype=float)
    smooth, reach = np.full(len(losses), np.nan), len(losses) // 25
    if len(losses):
        smooth[reach : len(losses) - reach] = np.convolve(losses, np.full(2 * reach + 1, 1 / (2 * reach + 1)), "valid")
    return steps, losses, smooth


def masking(runs: Mapping[str, Result]) -> dict[str, NDArray[np.float64]]:
    """Figures 3b and 3c of an experiment: "ratio", "cos" and "visual_loss", by rising ratio; empty without them."""
    entries = next((run.masking for run in runs.values() if run.masking), [])
    rising = sorted(entries, key=lambda entry: entry["ratio"])
    return (
        {key: np.array([entry[key] for entry in rising]) for key in ("ratio", "cos", "visual_loss")} if rising else {}
    )
