"""Checkpoints of small models, and those that come with the repository."""

import json
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, SmolVLMForConditionalGeneration

from reproductions.mini.model.smolvlm import take_one_picture

_FOLDER = Path(__file__).parents[1] / "checkpoints"

CHECKPOINT = _FOLDER / "pretrained"
"""The pre-trained model that comes with the repository, a LLaVA."""

SECOND_CHECKPOINT = CHECKPOINT.with_name("second")
"""Another, pre-trained from other random weights on other pictures."""

CHECKPOINTS: dict[str, tuple[Path, Path]] = {
    "llava": (CHECKPOINT, SECOND_CHECKPOINT),
    "smolvlm": (_FOLDER / "smolvlm-0", _FOLDER / "smolvlm-1"),
    "llava-10m": (Path("runs/mini/llava-10m-0"), Path("runs/mini/llava-10m-3")),
}
"""Two of each architecture, pre-trained independently. All but the larger ones come with the repository."""

_OPTIONS = {
    "llava": ("", "--seed 3 --language-steps 1800"),
    "smolvlm": ("--architecture smolvlm", "--architecture smolvlm --seed 3 --language-steps 1800"),
    "llava-10m": ("--architecture llava-10m", "--architecture llava-10m --seed 3"),
}
"""What makes each of them."""

REPORT_FILE = "training.json"


def save_checkpoint(
    model: Any, tokenizer: PreTrainedTokenizerFast, path: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write weights (safetensors, of this type), configuration and tokenizer to the folder `path`.

    The model is rounded in place.
    """
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)


def load_checkpoint(path: Path = CHECKPOINT) -> tuple[Any, PreTrainedTokenizerFast]:
    """Read a checkpoint from the folder `path`, without network: a float32 model in evaluation mode, its tokenizer.

    Raises:
        FileNotFoundError: `path` holds no checkpoint.
    """
    require_checkpoint(path)
    model = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    if isinstance(model, SmolVLMForConditionalGeneration):
        take_one_picture(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


def require_checkpoint(path: Path) -> None:
    """Raise FileNotFoundError if the folder `path` holds no checkpoint, with the command that makes it."""
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"{path} holds no checkpoint (model.safetensors); `{command(path)}` makes one")


def command(path: Path) -> str:
    """What makes the checkpoint in the folder `path`: of `CHECKPOINTS` the very one, elsewhere the first LLaVA."""
    made = {folder: _OPTIONS[name][i] for name, folders in CHECKPOINTS.items() for i, folder in enumerate(folders)}
    return " ".join(
        ["python -m reproductions mini pretrain", *filter(None, [made.get(path)]), f"--output {quote(str(path))}"]
    )


def knows_facts(path: Path) -> bool:
    """Whether pre-training asked this checkpoint questions without a picture."""
    report = path / REPORT_FILE
    return report.is_file() and json.loads(report.read_text())["settings"].get("facts", False)
