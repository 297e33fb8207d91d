"""Figures 3b and 3c: how well g̃ and g̃₀ agree, and how far vision has drifted, against the ratio of MDGD-GM."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from reproductions.methods.base import train_last
from reproductions.methods.mdgd_gm import MDGDGM
from reproductions.paper.models import load_model
from reproductions.paper.run import ranks
from reproductions.paper.run.train import train
from reproductions.paper.run.weights import NAME, load_changes
from reproductions.paper.run.work import Workshop
from reproductions.shared.files import read_json, write
from reproductions.shared.masked_cosine import masked_cosine
from torch_mdgd import MDGDOptimizer, mdgd_backward

KINDS = ("task", "visual", "reference_task", "reference_visual")


def analyse_masking(work: Workshop, method: MDGDGM, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Fine-tune shortly at every ratio from the published weights, and measure; ratios that are there are kept.

    Returns:
        what ``analysis/masking.json`` holds: for each ratio ρ, cos(M ⊙ g̃, M ⊙ g̃₀) with M the numbers that moved, and
        L_v.
    """
    path = folder / "analysis" / "masking.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, float]] = ranks.agree(read_json(path) if path.is_file() else [])
    e = work.experiment
    training = replace(e.training, steps=e.masking.steps, save_every=e.masking.steps)
    for ratio in e.masking.ratios:
        run = path.parent / f"ratio-{ratio:g}"
        if any(entry["ratio"] == ratio for entry in found):
            # Left where a kill came between the measure and its removal: checkpoints of many gigabytes.
            shutil.rmtree(run, ignore_errors=True)
            continue
        short = Workshop(replace(e, training=training), work.device)
        if ranks.agree(not (run / NAME).is_file()):
            train(short, type(method)(replace(method.settings, ratio=ratio)), run, progress=progress)
        if ranks.is_first():
            found.append({"ratio": ratio, **measure(short, run / NAME)})
            write(path, json.dumps(found, indent=1))
            shutil.rmtree(run)
        found = ranks.agree(found)
    return found


def measure(work: Workshop, trained: Path) -> dict[str, float]:
    """cos(M ⊙ g̃, M ⊙ g̃₀) and L_v, means over batches of the target task.

    Args:
        work: with a network of the method's trained parameters; its weights end as the fine-tuned ones.
        trained: what the fine-tuning changed.
    """
    e = work.experiment
    work.model = load_model(e.model, e.source, e.dtype, work.device, trust_remote_code=e.trust_remote_code)
    network = work.network.train()
    parameters = train_last(network, e.layers)
    for p in parameters:
        p.data = p.data.float()
    before = [p.detach().clone() for p in parameters]
    load_changes(network, trained)
    # Never stepped: it holds φ, the published weights, and captures gradients.
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.0))
    optimizer.set_reference(before)
    moved = [p.detach() != x for p, x in zip(parameters, before, strict=True)]
    found = []
    for batch in work.target_batches(e.masking.batches):
        with torch.autocast(work.device.type, torch.bfloat16, enabled=e.dtype == "bfloat16"):
            mdgd_backward(network, optimizer, batch, tap=work.model.tap(), combine=False)
        cos = masked_cosine([optimizer.captured[kind] for kind in KINDS], moved)
        found.append({"cos": cos, "visual_loss": float(optimizer.diagnostics["visual_loss"])})
        optimizer.zero_grad()
    return {name: fmean(entry[name] for entry in found) for name in ("cos", "visual_loss")}
