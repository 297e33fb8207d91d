"""The smoke test's sizes: tiny models and small files on disk, and a configuration that points to them.

Everything else is that of the real runs: bfloat16 under autocast, activations computed again, weights read with
``from_pretrained``, data from parquet files in the hub's own schemas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproductions.paper.config import Experiment, load_experiment
from reproductions.paper.data import DATASETS
from reproductions.paper.models import MODELS

EXAMPLES, ROWS = 3, 16
SETTINGS: dict[str, Any] = {
    "layers": 2,
    "training": {
        "steps": 2, "batch": 1, "accumulation": 2, "learning_rate": 1e-2, "warmup": 0.0, "save_every": 1,
        "log_every": 1, "workers": 0,
    },
    "evaluation": {"batch": EXAMPLES, "examples": EXAMPLES, "answer_tokens": 2},
    "masking": {"ratios": [0.1, 1.0], "steps": 2, "batches": 1},
    "methods": {
        "lora": {"rank": 2}, "corda": {"rank": 2, "samples": 2}, "ewc": {"samples": 2}, "model-tailor": {"samples": 2},
        "replay": {"share": 0.5}, "anchor": {"samples": 2}, "lora-all": {"rank": 2}, "lora-all-lv": {"rank": 2},
        "lora-all-anchor": {"rank": 2, "samples": 2}, "model-dowser": {"prompts": 2, "probes": 1},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Assets:
    """A folder with tiny models and sample files, each written when it is first asked for."""

    folder: Path

    def model(self, name: str) -> Path:
        """Folder of a model."""
        folder = self.folder / "models" / name
        if not (folder / "config.json").is_file():
            MODELS[name].write_tiny(folder)
        return folder

    @property
    def data(self) -> Path:
        """Folder of all data sets."""
        folder = self.folder / "data"
        for name, data in DATASETS.items():
            marker = folder / name / "written"
            if not marker.is_file():
                for split in dict.fromkeys((data.evaluation, data.training, data.validation)):
                    if split is not None:
                        data.write_sample(folder / name, split, ROWS, 0)
                marker.touch()
        return folder

    def experiment(self, name: str, overrides: Sequence[str] = ()) -> Experiment:
        """An experiment in the smoke test's sizes."""
        chosen = load_experiment(name, overrides).model
        more = {**SETTINGS, "source": str(self.model(chosen)), "data": {"source": str(self.data)}}
        return load_experiment(name, overrides, more)
