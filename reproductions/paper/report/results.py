"""What runs leave on disk, `<results>/<experiment>/<method>[-seed<n>]/`, read back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from reproductions.paper.config import WHEREABOUTS, differences, method_and_seed
from reproductions.paper.report.published import published
from reproductions.shared.files import FileError, read_json

IGNORED = (
    *WHEREABOUTS, "name", "title", "seed", "evaluation.rank_examples", "evaluation.feature_examples",
    "evaluation.beams", "evaluation.repetition_penalty", "masking", "methods", "data.revisions",
)  # fmt: skip
"""Settings that scores are compared in spite of; those of methods are asked for apart."""


@dataclass(frozen=True)
class Result:
    """The folder of one run; files are read when they are asked for, and what a run has not written yet is empty.

    Attributes:
        folder: see `config.run_name`.
    """

    folder: Path

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return self.folder.parent.name

    @property
    def method(self) -> str:
        """Name of the method."""
        return method_and_seed(self.folder.name)[0]

    @property
    def seed(self) -> int:
        """Of batches and everything random."""
        return method_and_seed(self.folder.name)[1]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration, versions, revision, seed, device."""
        found: dict[str, Any] = read_json(self.folder / "config.json", "configuration")
        return found

    @cached_property
    def status(self) -> dict[str, Any]:
        """The stage that the run has reached, and the seconds it took."""
        path = self.folder / "status.json"
        found: dict[str, Any] = read_json(path, "stage") if path.exists() else {"stage": "begun"}
        return found

    @property
    def smoke(self) -> bool:
        """Whether tiny random models stood in for the real ones."""
        return bool(self.config.get("smoke", False))

    @property
    def done(self) -> bool:
        """Whether everything of the run is there."""
        return self.status.get("stage") == "done"

    @property
    def trained(self) -> int | None:
        """How many numbers might change; None of a run that has not trained, or trains nothing."""
        path = self.folder / "trained.json"
        return int(read_json(path, "trained_numbers")["trained_numbers"]) if path.exists() else None

    @cached_property
    def training(self) -> list[dict[str, float]]:
        """Logged steps."""
        return _lines(self.folder / "training.jsonl")

    @cached_property
    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Task -> metric, scores, effective rank and number of examples."""
        files = sorted((self.folder / "evaluation").glob("*.json"))
        return {file.stem: read_json(file, "scores") for file in files}

    @property
    def scores(self) -> dict[str, float]:
        """Task -> the number for the table, in percent."""
        return {task: float(found["scores"]["score"]) for task, found in self.evaluation.items()}

    @property
    def effective_ranks(self) -> dict[str, float]:
        """Task -> effective rank of the last hidden states at image tokens."""
        ranks = {task: found.get("effective_rank") for task, found in self.evaluation.items()}
        return {task: float(rank) for task, rank in ranks.items() if rank is not None}

    def predictions(self, task: str) -> list[dict[str, Any]]:
        """Of every example: id, question, answers, prediction and score."""
        return _lines(self.folder / "evaluation" / f"{task}.predictions.jsonl")

    def picture(self, task: str, index: int) -> Path | None:
        """Thumbnail of an example, where one was kept."""
        path = self.folder / "evaluation" / f"{task}.pictures" / f"{index}.jpg"
        return path if path.is_file() else None

    def features(self, task: str) -> Mapping[str, Any]:
        """Arrays "visual" and "multimodal", each (examples, hidden); empty where the run kept none.

        Raises:
            FileError: the file is broken.
        """
        path = self.folder / "features" / f"{task}.safetensors"
        if not path.exists():
            return {}
        try:
            return load_file(path)
        # safetensors raises an error of its own, which it does not export.
        except Exception as error:
            raise FileError(f"{path} is not a safetensors file: {error}") from error

    @cached_property
    def masking(self) -> list[dict[str, float]]:
        """Of every masking ratio: ratio, cos and visual_loss."""
        path = self.folder / "analysis" / "masking.json"
        found: list[dict[str, float]] = read_json(path) if path.exists() else []
        return found


def read_results(folder: Path) -> dict[str, dict[str, Result]]:
    """Experiment -> method -> the result of its run with the lowest seed.

    Raises:
        FileError: there is no such folder.
    """
    return {name: {m: runs[0] for m, runs in methods.items()} for name, methods in read_seeds(folder).items()}


def read_seeds(folder: Path) -> dict[str, dict[str, list[Result]]]:
    """Experiment -> method -> its runs by rising seed; runs are the folders with a `config.json`.

    Raises:
        FileError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder} with results")
    found: dict[str, dict[str, list[Result]]] = {}
    for result in _runs(folder):
        found.setdefault(result.experiment, {}).setdefault(result.method, []).append(result)
    for methods in found.values():
        for runs in methods.values():
            runs.sort(key=lambda run: run.seed)
    return found


def settings_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings that scores depend on at which two configurations differ, but for those of methods.

    A step of so many examples is one step, however they are shared out over its passes.
    """
    found = differences(_in_steps(one), _in_steps(other))
    return [key for key in found if not any(key == name or key.startswith(f"{name}.") for name in IGNORED)]


def _in_steps(configuration: Mapping[str, Any]) -> dict[str, Any]:
    training = dict(configuration["training"])
    if {"batch", "accumulation"} <= training.keys():
        training["batch"] *= training.pop("accumulation")
    return {**configuration, "training": training}


def unlike(runs: Mapping[str, Sequence[Result]]) -> list[str]:
    """A note on the runs of an experiment that were made with other settings than its first, or than another seed."""
    every = [(run, some[0]) for some in runs.values() for run in some]
    found = []
    for run, seed in every:
        first, same, ours = (x.config["configuration"] for x in (every[0][0], seed, run))
        keys = settings_apart(first, ours) + differences(same["methods"], ours["methods"])
        # Not known of a folder.
        commits = {x.config["weights"] for x in (every[0][0], run) if x.config.get("weights")}
        keys += ["commit of the weights"] if len(commits) > 1 else []
        if keys:
            found.append(f"{run.folder.name} ({', '.join(keys[:3])})")
    if not found:
        return []
    return [
        f"Not of the settings of {every[0][0].folder.name}, so that neither means over seeds nor differences between "
        f"them mean anything: {', '.join(found)}."
    ]


def _runs(folder: Path) -> Iterator[Result]:
    """In the order of the tables, and what they do not have after it."""
    methods = [*dict.fromkeys(method for experiment in published().values() for method in experiment.rows)]
    places = [{name: i for i, name in enumerate(names)} for names in (published(), methods)]

    def place(config: Path) -> list[tuple[int, str]]:
        names = config.parts[-3], method_and_seed(config.parts[-2])[0]
        return [(known.get(name, len(known)), name) for known, name in zip(places, names, strict=True)]

    for config in sorted(folder.glob("*/*/config.json"), key=place):
        yield Result(config.parent)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    # Not splitlines, for which an answer may hold ends of lines, such as U+2028; errors only in what a kill cut off.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    out = []
    for number, line in enumerate(lines):
        try:
            out.append(json.loads(line))
        except ValueError as error:
            # What stands after the last end of a line: nothing, or what a kill cut off.
            if number == len(lines) - 1:
                break
            raise FileError(f"{path}, line {number + 1} is not JSON: {error}") from error
    return out
