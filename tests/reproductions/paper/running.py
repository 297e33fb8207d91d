"""Rows on tiny models, and what they leave."""

import torch
from rich.console import Console
from safetensors.torch import load_file

from reproductions.paper.run.row import run_row

CPU = torch.device("cpu")
EXACT = ("dtype=float32", "training.checkpointing=false")
"""What can be compared closely, and is quicker on a CPU; as real runs are, everything runs in ``test_smoke.py``."""
SHORT = (
    *EXACT, 'pretrained=["textvqa"]', "masking.ratios=[0.5]", "training.steps=3", "training.save_every=1",
    "evaluation.examples=3",
)  # fmt: skip


def row(assets, results, method, *more, name="llava-okvqa", callbacks=()):
    experiment = assets.experiment(name, [*SHORT, *more])
    return run_row(
        experiment, method, results, smoke=True, device=CPU, callbacks=callbacks, console=Console(quiet=True)
    )


def contents(folder):
    """All that a row leaves, but for times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: x.tolist() for key, x in load_file(path).items()}
        elif path.suffix in (".json", ".jsonl") and name not in ("status.json", "config.json"):
            found[name] = path.read_text()
    return found
