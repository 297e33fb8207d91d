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
    """Lines that load the folder elsewhere, as far as the others load this model."""
    lmms_eval, vlmevalkit = MODELS[model].elsewhere
    path = json.dumps(str(folder))
    if model == "minicpm-v-2":
        # Its code, which needs transformers 4, knows AutoModel alone, and vLLM does not load what is published.
        lines = [f"transformers 4: AutoModel.from_pretrained({path}, trust_remote_code=True)"]
        arguments, with_four = f"pretrained={folder}", " with transformers 4"
    else:
        lines = [
            f"transformers: AutoModelForImageTextToText.from_pretrained({path})",
            f"vLLM: vllm serve {folder} --generation-config vllm",
        ]
        # transformers 5 refuses the empty device_map that is the default of llava_hf.
        arguments, with_four = f"pretrained={folder},device_map=auto", ""
    if lmms_eval:
        lines.append(
            f"lmms-eval{with_four}: python -m lmms_eval --model {lmms_eval} --model_args {arguments} --tasks gqa"
        )
    if vlmevalkit:
        named = json.dumps({"class": vlmevalkit, "model_path": str(folder)})
        lines.append(f"VLMEvalKit{with_four}: run.py --config FILE, which has a model {named}")
    return "\n".join(lines)
