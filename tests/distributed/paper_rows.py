"""Rows of the paper's tables in every process of a test, and in one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from reproductions.paper.run import ranks
from reproductions.paper.run.row import run_row
from reproductions.paper.run.rows import _quiet
from reproductions.paper.run.smoke import Assets
from tests import accelerate_state
from tests.distributed import integrations
from tests.reproductions.paper.running import SHORT

METHOD = "mdgd"
FORMS: dict[str, tuple[str, ...]] = {"copies": (), "parts": ("training.shard=true",)}
"""Both are killed on the way, and taken up."""


class Killed(TrainerCallback):
    """Stops after the second step's checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def row(folder: Path, form: str, world: int) -> dict[str, Any]:
    """What a row leaves."""
    _quiet()
    more = FORMS[form]
    # Steps of two passes each; Adam enlarges rounding where a gradient is small.
    settings = [*SHORT, "training.accumulation=2", "training.learning_rate=1e-3", *(more if world > 1 else ())]
    with ranks.in_turn():
        experiment = Assets(folder / "assets").experiment("llava-okvqa", settings)
    device, quiet = torch.device("cpu"), Console(quiet=True)
    with accelerate_state.accelerators() if world > 1 and more else accelerate_state.fresh():
        for callbacks in ([Killed()], []) if world > 1 else ([],):
            try:
                run = run_row(
                    experiment, METHOD, folder / f"{form} {world}", smoke=True, device=device, callbacks=callbacks,
                    console=quiet,
                )  # fmt: skip
            except KeyboardInterrupt:
                continue
    evaluation = {path.name: json.loads(path.read_text()) for path in sorted((run / "evaluation").glob("*.json"))}
    log = [json.loads(line) for line in (run / "training.jsonl").read_text().splitlines()]
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.suffix not in (".lock", "")}
    board = {name for name in files if name.startswith("tensorboard")}
    return {
        "weights": load_file(run / "trained.safetensors"), "log": log, "evaluation": evaluation,
        "files": sorted(files - board), "status": json.loads((run / "status.json").read_text())["stage"],
    }  # fmt: skip


def run(case: Callable[..., None], folder: Path, rank: int, world: int) -> None:
    # Lightning takes it away.
    integrations.environment(rank, world)
    for form in FORMS:
        case(f"row, {form}", row, folder / "rows", form, world)
