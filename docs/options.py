"""``python docs/options.py FRAMEWORK``: write a framework's option names to ``docs/options/FRAMEWORK.txt``.

The recipes are held to these lists, so that no recipe has an option that its framework does not know. The first line is
the framework's version, each further line a name. Frameworks: ms-swift, llamafactory, axolotl, trl, unsloth.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch_mdgd.integrations.transformers import MDGDTrainerMixin


def loaded(path: str) -> Any:
    """The object of this dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def fields(*paths: str) -> set[str]:
    """Of dataclasses."""
    return {field.name for path in paths for field in dataclasses.fields(loaded(path))}


def arguments(*paths: str) -> set[str]:
    """Of functions and classes."""
    return {name for path in paths for name in inspect.signature(loaded(path)).parameters}


def ours() -> set[str]:
    """Those that the mixin adds to a trainer."""
    return set(inspect.signature(MDGDTrainerMixin.__init__).parameters) - {"self", "args", "kwargs"}


def axolotl() -> set[str]:
    """Keys of Axolotl's file, with the plugin's, and those of one of its data sets."""
    models = [
        loaded("axolotl.utils.schemas.config.AxolotlInputConfig"),
        loaded("axolotl.utils.schemas.datasets.SFTDataset"),
        loaded("torch_mdgd.integrations.axolotl.MDGDArgs"),
    ]
    return {name for model in models for name in model.model_fields}


def llamafactory() -> set[str]:
    """Keys of LLaMA-Factory's file, with those of its launcher here."""
    arguments = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    return fields(*(f"llamafactory.hparams.{name}" for name in arguments)) | {"mdgd_rule", "mdgd_mask"}


def trl() -> set[str]:
    """Arguments of TRL's configuration, of its trainer and of peft's adapters."""
    return fields("trl.SFTConfig", "peft.LoraConfig") | arguments("trl.SFTTrainer") | ours()


def unsloth() -> set[str]:
    """Arguments of Unsloth's loaders, read from its source since it imports others without a GPU, and of TRL's."""
    spec = importlib.util.find_spec("unsloth")
    assert spec is not None
    assert spec.origin is not None
    found = trl()
    for file in ("loader", "vision"):
        tree = ast.parse((Path(spec.origin).parent / "models" / f"{file}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in ("from_pretrained", "get_peft_model", "for_training"):
                found |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
    return found


FRAMEWORKS: dict[str, Callable[[], Iterable[str]]] = {
    "ms-swift": lambda: fields("swift.arguments.SftArguments"),
    "llamafactory": llamafactory,
    "axolotl": axolotl,
    "trl": trl,
    "unsloth": unsloth,
}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in FRAMEWORKS:
        raise SystemExit(f"usage: python docs/options.py {{{','.join(FRAMEWORKS)}}}")
    lines = [f"{name} {version(name)}", *sorted(FRAMEWORKS[name]())]
    (Path(__file__).parent / "options" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
