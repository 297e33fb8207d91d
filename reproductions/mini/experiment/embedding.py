"""Figures 2 and 5: t-SNE of visual and multimodal features before and after fine-tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.manifold import TSNE  # type: ignore[import-untyped]
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.mini.experiment.finetune import finetune
from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.study import checkpoint_of
from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.mini.world.data import TaskData, prompt_batch, target_data

EMBEDDED = ("zero-shot", "fine-tune", "mdgd")
KINDS = {"visual": "last image token", "multimodal": "last token of the question"}
_EXAMPLES = 150
_SEED = 0


def embed_cells(results: Path, cells: Sequence[CellOutcomes], console: Console) -> list[Path]:
    """Fine-tune again with the chosen settings, and write `tsne-<cell>.npz` where it is not there.

    Args:
        results: folder of the study.
        cells: those whose systems were tested are embedded.
        console: for progress.

    Returns:
        the files, old and new.
    """
    found = []
    for cell in cells:
        path = results / f"tsne-{cell.cell.name}.npz"
        if not path.is_file() and all(name in cell.systems for name in EMBEDDED):
            features = {name: _features_of(cell, name, console) for name in EMBEDDED}
            np.savez_compressed(path, **embed(features))  # type: ignore[arg-type]
        if path.is_file():
            found.append(path)
    return found


def _features_of(cell: CellOutcomes, name: str, console: Console) -> dict[str, NDArray[np.float64]]:
    outcome = cell.systems[name]
    model, tokenizer = load_checkpoint(checkpoint_of(_SEED, cell.cell.architecture))
    if outcome.method is not None and outcome.method.learning_rate is not None:
        console.print(f"t-SNE, {cell.title}: {outcome.system.label}", soft_wrap=True)
        size = next(iter(outcome.runs.values()))
        data = target_data(cell.cell.target, "train", seed=_SEED)  # type: ignore[arg-type]
        torch.manual_seed(_SEED)
        finetune(model, tokenizer, data, outcome.method, seed=_SEED, steps=size["steps"], batch_size=size["batch"])
    return features(model, tokenizer, target_data(cell.cell.target, "test")[:_EXAMPLES])  # type: ignore[arg-type]


@torch.no_grad()
def features(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: TaskData
) -> dict[str, NDArray[np.float64]]:
    """Last hidden layer at the last image token ("visual") and last prompt token ("multimodal"): (examples, 128)."""
    model.eval()
    batch = prompt_batch(data.examples, tokenizer)
    hidden = model.model(**batch).last_hidden_state.double()
    images = batch["input_ids"] == model.config.image_token_id
    last = images.shape[1] - 1 - images.flip(1).int().argmax(1)
    return {"visual": hidden[torch.arange(len(data)), last].numpy(), "multimodal": hidden[:, -1].numpy()}


def embed(features: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float32]]:
    """Place the features of several systems in one plane, so that the same place means alike features.

    Args:
        features: system -> kind -> (examples, width), as many examples each.

    Returns:
        "<kind>/<system>" -> float32 (examples, 2).
    """
    placed: dict[str, NDArray[np.float32]] = {}
    for kind in KINDS:
        together = np.concatenate([found[kind] for found in features.values()])
        centred = together - together.mean(0)
        perplexity = min(30.0, (len(together) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(centred / centred.std())
        parts = np.split(points.astype(np.float32), len(features))
        placed |= {f"{kind}/{name}": part for name, part in zip(features, parts, strict=True)}
    return placed
