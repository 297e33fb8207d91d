"""Figures 3b and 3c: how well g̃ and g̃₀ agree, and how far vision has drifted, against the ratio of MDGD-GM."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

from reproductions.mini.experiment.finetune import finetune, trainable_parameters
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.study import checkpoint_of
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.mini.world.data import target_data, training_batch
from reproductions.shared.masked_cosine import masked_cosine
from reproductions.shared.results import add_line, read_lines
from torch_mdgd import MDGDOptimizer, mdgd_backward
from torch_mdgd.rules.base import KINDS

FILE = "masking.jsonl"
RATIOS = (0.05, 0.1, 0.3, 0.5, 0.7, 1.0)
SEEDS = (0, 1)
_BATCHES = 8


def mask_cells(results: Path, cells: Sequence[CellOutcomes], console: Console) -> None:
    """Train MDGD-GM at every ratio with MDGD's chosen settings, and measure; resumes from `masking.jsonl`.

    The learning rate stays the same, since it is the ratio that is asked about: MDGD-GM's own is ten times as high,
    which destroys a model all of whose numbers move.

    Args:
        results: folder of the study.
        cells: those with MDGD tested are run.
        console: for progress.
    """
    done = {(line["cell"], line["ratio"], line["seed"]) for line in read_lines(results / FILE)}
    for cell in cells:
        outcome = cell.systems.get("mdgd")
        if outcome is None or outcome.method is None:
            continue
        size = next(iter(outcome.runs.values()))
        settings = {
            **(outcome.method.wrap or {}),
            "learning_rate": outcome.method.learning_rate,
            "base": cell.cell.base,
        }
        for seed in SEEDS:
            for ratio in RATIOS:
                if (cell.cell.name, ratio, seed) in done:
                    continue
                console.print(f"masking, {cell.title}: ratio {ratio:g}, seed {seed}", soft_wrap=True)
                method = SYSTEMS["mdgd-gm"].method.with_settings(**settings, fraction=ratio)
                checkpoint = checkpoint_of(seed, cell.cell.architecture)
                found = agreement(method, cell.cell.target, seed, size["steps"], size["batch"], checkpoint)
                add_line(results / FILE, {"cell": cell.cell.name, "ratio": ratio, "seed": seed, **found})


def agreement(method: Method, target: str, seed: int, steps: int, batch: int, checkpoint: Path) -> dict[str, float]:
    """Fine-tune, then measure on batches of the target's validation examples.

    Returns:
        "cos": cos(M ⊙ g̃, M ⊙ g̃₀), M the numbers that moved; "visual_loss": L_v. Means over batches.
    """
    torch.manual_seed(seed)
    model, tokenizer = load_checkpoint(checkpoint)
    parameters = trainable_parameters(model)
    before = [p.detach().clone() for p in parameters]
    train = target_data(target, "train", seed=seed)  # type: ignore[arg-type]
    finetune(model, tokenizer, train, method, seed=seed, steps=steps, batch_size=batch)
    # Never stepped: it holds φ, the pre-trained weights, and captures gradients.
    observer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.0))
    observer.set_reference(before)
    moved = [p.detach() != x for p, x in zip(parameters, before, strict=True)]
    examples = target_data(target, "validation").examples  # type: ignore[arg-type]
    found = []
    for i in range(min(_BATCHES, len(examples) // batch)):
        chosen = training_batch(examples[i * batch : (i + 1) * batch], tokenizer)
        mdgd_backward(model, observer, chosen, combine=False)
        cos = masked_cosine([observer.captured[kind] for kind in KINDS], moved)
        found.append({"cos": cos, "visual_loss": float(observer.diagnostics["visual_loss"])})
        observer.zero_grad()
    return {name: fmean(each[name] for each in found) for name in ("cos", "visual_loss")}
