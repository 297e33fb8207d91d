"""A probe: a picture, a question, its right answer, and the answers that are allowed."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {"image", "question", "answer", "choices", "task"}


@dataclass(frozen=True)
class Probe:
    """A question about a picture.

    Args:
        picture: an image of Pillow, or the path of one.
        question: as a user would ask it.
        answer: the right one.
        choices: the answers that are allowed, the right one among them; empty where there is no such list.
        task: under which name scores are gathered.

    Raises:
        ValueError: no question or answer; choices that are fewer than two, repeat or lack the answer.
    """

    picture: Any
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    task: str = "probes"

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise ValueError("a probe needs a question and an answer that are not empty")
        if self.choices and (len(self.choices) < 2 or len(set(self.choices)) < len(self.choices)):
            raise ValueError(f"choices must be two or more different answers, got {list(self.choices)}")
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"the answer {self.answer!r} is none of the choices {list(self.choices)}")

    def image(self) -> Any:
        """The picture, an RGB image of Pillow."""
        if not isinstance(self.picture, str | os.PathLike):
            return self.picture.convert("RGB")
        with pillow().open(self.picture) as opened:
            return opened.convert("RGB")

    @property
    def chance(self) -> float | None:
        """The share of guesses that are right; None without choices."""
        return 1 / len(self.choices) if self.choices else None


def is_right(given: str, wanted: str) -> bool:
    """Whether two answers are the same, whatever their case, the white space around them and a full stop at the end."""
    first, second = (" ".join(x.split()).casefold().removesuffix(".").rstrip() for x in (given, wanted))
    return first == second


def read_probes(path: str | os.PathLike[str]) -> list[Probe]:
    """Probes from a file of JSON lines.

    A line is ``{"image": "cat.png", "question": "What is it?", "answer": "a cat", "choices": ["a cat", "a dog"],
    "task": "animals"}``, with ``choices`` and ``task`` left out at will. Pictures are named from the file's folder.

    Args:
        path: the file, or a folder that holds just one ``*.jsonl``.

    Raises:
        FileNotFoundError: no such file or folder, or no one JSON lines file in it.
        ValueError: a line is wrong, or there is none; naming file and line.
    """
    file = _file(Path(path))
    probes = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    probes.append(_probe(line, file))
                except (ValueError, OSError) as error:
                    raise ValueError(f"{file}, line {number}: {error}") from error
    if not probes:
        raise ValueError(f"{file} holds no probes")
    return probes


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no file or folder {path}")
        return path
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(x.name for x in found) or "none"
        raise FileNotFoundError(f"{path} should hold one file *.jsonl, and holds {names}: name the file")
    return found[0]


def _probe(line: str, file: Path) -> Probe:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"not an object with the keys {', '.join(sorted(KEYS))}")
    unknown = sorted(found.keys() - KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    texts = {key: _text(found, key) for key in ("image", "question", "answer")}
    choices = found.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(x, str) and x.strip() for x in choices):
        raise ValueError(f"'choices' must be a list of texts, got {choices!r}")
    if "choices" in found and not choices:
        raise ValueError("'choices' is empty: leave it out")
    task = _text(found, "task") if "task" in found else file.stem
    picture = file.parent / texts["image"]
    if not picture.is_file():
        raise ValueError(f"there is no picture {picture}")
    with pillow().open(picture) as opened:
        opened.verify()
    return Probe(picture, texts["question"], texts["answer"], tuple(choices), task)


def _text(found: dict[str, Any], key: str) -> str:
    if key not in found:
        raise ValueError(f"the key {key!r} is missing")
    value = found[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a text that is not empty, got {value!r}")
    return value


def is_batch(item: Any) -> bool:
    """Whether this is a batch of a user's own, and no probe.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(item, Probe):
        return False
    if hasattr(item, "keys") and "labels" in item:
        return True
    raise TypeError(f"ForgettingReport: probes are Probe objects or batches with 'labels', got a {type(item).__name__}")


def tasks_of(probes: Sequence[Probe]) -> list[str]:
    """Names of tasks, each once, in the order of the probes."""
    return list(dict.fromkeys(probe.task for probe in probes))


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ImportError: Pillow is not installed, naming the extra.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("probes are pictures of Pillow: pip install 'torch-mdgd[transformers]'") from error
    return Image
