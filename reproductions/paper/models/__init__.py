"""The models of the tables and those of today, and how they are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from reproductions.paper.models.base import FILES, Batch, ModelError, VisionLanguageModel, to_device
from reproductions.paper.models.internvl3_5 import InternVL351B, InternVL354B
from reproductions.paper.models.llava import Llava
from reproductions.paper.models.minicpm_v2 import MiniCPMV2Model
from reproductions.paper.models.minicpm_v4 import MiniCPMV4Model
from reproductions.paper.models.qwen2_5_vl import Qwen25VL3B, Qwen25VL7B
from reproductions.paper.models.qwen3_vl import Qwen3VL2B, Qwen3VL4B
from reproductions.paper.models.smolvlm2 import SmolVLM2

__all__ = [
    "MODELS", "Batch", "ModelError", "VisionLanguageModel", "commit_of_weights", "fetch_weights", "load_model",
    "skeleton", "to_device",
]  # fmt: skip

MODELS: dict[str, type[VisionLanguageModel]] = {
    family.name: family
    for family in (
        Llava, MiniCPMV2Model, MiniCPMV4Model, Qwen25VL3B, Qwen25VL7B, Qwen3VL2B, Qwen3VL4B, InternVL351B,
        InternVL354B, SmolVLM2,
    )
}  # fmt: skip
"""By name: the models of the tables, then those of today. A new one is a file with a class, and stands here."""


def fetch_weights(name: str, source: str | Path | None) -> None:
    """Bring a model's files from the hub, or find them in its cache; a folder is left alone.

    Args:
        name: one of ``MODELS``.
        source: a folder or a repository; the published weights if None or empty.

    Raises:
        ModelError: they cannot be had: no network, no such repository, or one that asks for a login.
    """
    from huggingface_hub import snapshot_download

    where = str(source or MODELS[name].source)
    if not Path(where).is_dir():
        with _named(name, where):
            snapshot_download(where, allow_patterns=list(FILES))


def commit_of_weights(name: str, source: str | Path | None) -> str | None:
    """The commit of a model's files in the hub's cache, which they are loaded from; None of a folder, or before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    where = str(source or MODELS[name].source)
    try:
        found = None if Path(where).is_dir() else try_to_load_from_cache(where, "config.json")
    # The name of a folder that is not there, which whoever reads it says.
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def load_model(
    name: str, source: str | Path | None, dtype: str, device: torch.device, *, trust_remote_code: bool = False
) -> VisionLanguageModel:
    """A model in evaluation mode, on a device.

    Args:
        name: one of ``MODELS``.
        source: a folder; the published weights from the hub if None or empty.
        dtype: such as "bfloat16".
        device: where to.
        trust_remote_code: run code that comes with the weights.

    Raises:
        ModelError: the weights cannot be had, or do not fit.
    """
    family = MODELS[name]
    where = source or family.source
    with _named(name, where):
        model = family.load(where, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    model.network.eval()
    return model.to(device)


@contextmanager
def _named(name: str, where: str | Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    # No network, no such repository and a broken file are different errors, of several libraries.
    except Exception as error:
        raise ModelError(
            f"{name}: could not read {where}: {str(error).rstrip('.')}. A folder with its files can be passed "
            "(--set source=FOLDER)."
        ) from error


def skeleton(name: str) -> nn.Module:
    """A model's network in its published size, without numbers."""
    return MODELS[name].skeleton()
