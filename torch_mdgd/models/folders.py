"""Models and processors in folders of this machine: safetensors alone, no code from the folder, no download."""

import os
from pathlib import Path
from typing import Any

import torch

EXTRA = "pip install 'torch-mdgd[transformers]'"


def transformers() -> Any:
    """The module, which no other part of the package needs.

    Raises:
        ImportError: it is not installed, naming the extra.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"models in folders are loaded by transformers: {EXTRA}") from error
    return transformers


def load_model(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> Any:
    """What ``save_pretrained`` wrote, as the class that its configuration names, in evaluation mode.

    Args:
        folder: with ``config.json`` and safetensors files.
        dtype: of the parameters; "auto" for that of the configuration.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no folder, or no configuration in it.
        ValueError: no safetensors files, a class that transformers does not have, or weights are missing; naming the
            folder.
    """
    library, path = transformers(), Path(folder)
    config = _configuration(path)
    require_safetensors(path)
    names = config.architectures or []
    kind = getattr(library, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{path}: its config.json names the class {names}, which transformers does not have")
    model, info = kind.from_pretrained(
        path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise ValueError(f"{path} does not hold the weights of {names[0]}: {len(lacking)} lack, such as {lacking[0]}")
    return model.eval()


def dtype_of(folder: str | os.PathLike[str]) -> torch.dtype | None:
    """What :func:`load_model` makes of "auto": the dtype in a folder's configuration; None if it names none.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no folder, or no configuration in it.
    """
    found = _configuration(Path(folder)).dtype
    dtype: torch.dtype | None = getattr(torch, found) if isinstance(found, str) else found
    return dtype


def load_processor(folder: str | os.PathLike[str]) -> Any:
    """A vision-language model's processor: its tokenizer and what prepares pictures.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder has none, naming it.
    """
    library = transformers()
    try:
        processor = library.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no processor that loads: {error}") from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{folder} has no processor of pictures and text, only a {type(processor).__name__}")
    return processor


def _configuration(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no folder of a model: it has no config.json")
    return transformers().AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def require_safetensors(folder: Path) -> None:
    """A ValueError that names a folder without safetensors files, and the pickles in it."""
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(x.name for x in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        found = f", but pickles, which are not opened: {', '.join(pickles)}" if pickles else ""
        raise ValueError(f"{folder} has no safetensors files{found}")
