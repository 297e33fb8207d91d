"""`python -m reproductions export`: a run's model as a folder that transformers, vLLM and others load by its path."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reproductions.paper.config import Experiment
from reproductions.paper.models import MODELS
from reproductions.paper.run.weights import NAME, load_changes
from reproductions.paper.run.work import Workshop
from reproductions.shared.fields import ConfigError, build
from reproductions.shared.files import read_json, write

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def export_run(run: Path, output: Path) -> str:
    """Write weights in the published format and, beside them, every other file of the published folder.

    Args:
        run: folder of a run, such as runs/paper/llava-okvqa/mdgd.
        output: a new or an empty folder.

    Returns:
        how the folder is loaded, a line each.

    Raises:
        ConfigError: the folder holds no run, or the output is not empty.
        FileError: a file of the run is broken.
    """
    if not (run / "config.json").is_file():
        raise ConfigError(f"{run} holds no run")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty: choose another folder")
    experiment = build(Experiment, read_json(run / "config.json")["configuration"], str(run))
    work = Workshop(experiment, torch.device("cpu"))
    if (run / NAME).is_file():
        load_changes(work.network, run / NAME)
    output.mkdir(parents=True, exist_ok=True)
    save_weights(work.network, output)
    for file in published_files(experiment):
        if file.is_file() and not file.name.endswith(WEIGHTS):
            # Over what this release of transformers writes, which older ones and other programs do not read.
            shutil.copyfile(file, output / file.name)
    name_dtype(output / "config.json", experiment.dtype)
    return how_to_load(experiment.model, output)


def published_files(experiment: Experiment) -> list[Path]:
    """The files beside the published weights: configuration, tokenizer, image processor, chat template, code."""
    source = experiment.source or MODELS[experiment.model].source
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, ignore_patterns=[f"*{ending}" for ending in WEIGHTS])
    return sorted(Path(source).iterdir())


def save_weights(network: Any, folder: Path) -> None:
    """In transformers' format, or by their published names where the network is not one of transformers."""
    if hasattr(network, "save_pretrained"):
        network.save_pretrained(folder)
    else:
        # Of the adapter around MiniCPM-V-2.0, whose names are the published ones.
        weights = {name: x.contiguous() for name, x in network.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def name_dtype(config: Path, dtype: str) -> None:
    """Let a configuration name the dtype of the weights, wherever it names one."""

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: dtype if key in ("dtype", "torch_dtype") else renamed(x) for key, x in value.items()}

    values = renamed(read_json(config))
    if not {"dtype", "torch_dtype"} & values.keys():
        values["torch_dtype"] = dtype
    write(config, json.dumps(values, indent=2))


def how_to_load(model: str, folder: Path) -> str:
    """Lines that load the folder elsewhere; they are written down, and were not run with those programs here."""
    lmms_eval, vlmevalkit = MODELS[model].elsewhere
    code = ", trust_remote_code=True" if model == "minicpm-v-2" else ""
    lines = [
        f"transformers: AutoModelForImageTextToText.from_pretrained({json.dumps(str(folder))}{code})",
        f"vLLM: vllm serve {folder}{' --trust-remote-code' if code else ''}",
    ]
    if lmms_eval:
        lines.append(f"lmms-eval: python -m lmms_eval --model {lmms_eval} --model_args pretrained={folder} --tasks gqa")
    if vlmevalkit:
        lines.append(f"VLMEvalKit, in vlmeval/config.py: partial({vlmevalkit}, model_path={json.dumps(str(folder))})")
    return "\n".join(lines)
