"""One row of a table: train, measure every task, write everything down; skip what is done."""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, set_seed

from reproductions.methods import Method
from reproductions.methods.mdgd_gm import MDGDGM
from reproductions.paper.config import WHEREABOUTS, Experiment, differences, method_of, run_name
from reproductions.paper.models import commit_of_weights
from reproductions.paper.run import ranks
from reproductions.paper.run.evaluate import RESULT, evaluate
from reproductions.paper.run.masking import analyse_masking
from reproductions.paper.run.room import require_room
from reproductions.paper.run.sparing import require_possible
from reproductions.paper.run.train import train
from reproductions.paper.run.weights import CHECKPOINTS, NAME, load_changes
from reproductions.paper.run.work import Workshop, splits_of
from reproductions.shared.fields import ConfigError
from reproductions.shared.files import BusyError, alone_in, read_json, write

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "torch-mdgd")


def run_row(
    experiment: Experiment,
    name: str,
    results: Path,
    *,
    smoke: bool = False,
    device: torch.device | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
) -> Path:
    """Do one row, or what is left of it; several processes do it together.

    Args:
        experiment: the configuration.
        name: of the method.
        results: folder of all results.
        smoke: noted in the results, so that nobody takes them for numbers.
        device: the first GPU, or the CPU where there is none.
        callbacks: more for the Trainer.
        console: for progress.

    Returns:
        the run's folder.

    Raises:
        ConfigError: the folder holds a run with another configuration, or the row cannot be done as it is set.
        BusyError: another process is at this row.
        FileError: a file of the run is broken.
    """
    console = console or Console()
    ranks.join()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = method_of(experiment, name)
    require_possible(experiment, method)
    folder = results / experiment.name / run_name(name, experiment.seed)
    with ranks.in_turn():
        done = require_ready(experiment, name, results, smoke=smoke)
        _write_config(experiment, method, folder, smoke, device)
    if ranks.agree(done):
        console.print(f"{experiment.name} {name}: done already")
        return folder
    status = Status(folder / "status.json")
    with alone_in(folder) if ranks.is_first() else nullcontext():
        _do(experiment, method, folder, status, results, smoke, device, callbacks, console)
    ranks.wait()
    return folder


def _do(
    experiment: Experiment,
    method: Method,
    folder: Path,
    status: "Status",
    results: Path,
    smoke: bool,
    device: torch.device,
    callbacks: Sequence[TrainerCallback],
    console: Console,
) -> None:
    begin = None
    if method.begins_with is not None:
        begin = _trained_by(experiment, method.begins_with, results, smoke, device, callbacks, console)
    console.print(f"{experiment.name} {method.name}: {method.title}, on {device}")
    set_seed(experiment.seed)
    show = not console.quiet
    if method.trains:
        if ranks.agree(not (folder / NAME).is_file()):
            with status.during("training"):
                found = Workshop(experiment, device)
                counts = train(found, method, folder, [Ticking(status), *callbacks], begin, progress=show)
            console.print(
                "  {trained_numbers:,} numbers trained; {changed_numbers:,} of the model's changed".format(**counts)
            )
            del found
        ranks.wait()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    # Read anew, since the Trainer leaves a network that computes under autocast: what is measured is what is on disk.
    work = Workshop(experiment, device)
    if method.trains:
        load_changes(work.network, folder / NAME)
    columns = TextColumn("  {task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with status.during("evaluation"), Progress(*columns, console=console, disable=not show) as bars:
        for task, result in _measured(work, experiment, folder, bars):
            status.tick()
            console.print(f"  {task:12} {result['scores']['score']:6.2f}   rank {result['effective_rank']:.1f}")
    if isinstance(method, MDGDGM) and experiment.evaluation.split == "evaluation":
        # Its models are loaded one after the other.
        del work
        with status.during("analysis"):
            analyse_masking(Workshop(experiment, device), method, folder, progress=show)
    status.set("done")


def _measured(
    work: Workshop, experiment: Experiment, folder: Path, bars: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task and its result; several processes each measure what no other is at, the largest first."""
    tasks = list(experiment.tasks)
    if ranks.world() > 1:
        (folder / "evaluation").mkdir(exist_ok=True)
        for task in sorted(tasks, key=lambda task: -len(work.evaluation_examples(task))):
            try:
                with alone_in(folder / "evaluation", f"{task}.lock"):
                    evaluate(work, task, folder, bars)
            except BusyError:
                continue
        ranks.wait()
    for task in tasks:
        yield task, evaluate(work, task, folder, bars)


class Status:
    """``status.json``: the stage, and the seconds that all calls have taken together; the first process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = read_json(path, "stage", "wall_seconds") if path.is_file() else {}
        self.stage = str(found.get("stage", "new"))
        self.seconds = float(found.get("wall_seconds", 0.0))
        self.since = time.perf_counter()

    def set(self, stage: str) -> None:
        """Write a stage."""
        self.stage = stage
        self.tick()

    def tick(self) -> None:
        """Write the seconds up to now, for a kill leaves no time to."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        if not ranks.is_first():
            return
        write(self.path, json.dumps({"stage": self.stage, "wall_seconds": round(self.seconds, 3)}))

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Write the stage now, and its seconds when it ends, also by an exception."""
        self.set(stage)
        try:
            yield
        finally:
            self.tick()


class Ticking(TrainerCallback):
    """Writes the seconds whenever a checkpoint is written."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write."""
        self.status.tick()


def _trained_by(
    experiment: Experiment,
    name: str,
    results: Path,
    smoke: bool,
    device: torch.device,
    callbacks: Sequence[TrainerCallback],
    console: Console,
) -> Path:
    """What another method of the same experiment changed; it is trained now if it was not."""
    folder = results / experiment.name / run_name(name, experiment.seed)
    folder.mkdir(parents=True, exist_ok=True)
    other = method_of(experiment, name)
    require_possible(experiment, other)
    with ranks.in_turn():
        _write_config(experiment, other, folder, smoke, device)
    if ranks.agree(not (folder / NAME).is_file()):
        if not smoke:
            require_room(experiment, name, folder)
        console.print(f"{experiment.name} {name}: training, for what begins with it")
        status = Status(folder / "status.json")
        with alone_in(folder) if ranks.is_first() else nullcontext(), status.during("training"):
            train(
                Workshop(experiment, device), other, folder, [Ticking(status), *callbacks], progress=not console.quiet
            )
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return folder / NAME


def require_ready(experiment: Experiment, name: str, results: Path, *, smoke: bool) -> bool:
    """Look at what a row finds in its folder, and at the room for what it writes, before hours are spent.

    Returns:
        whether all of it is done.

    Raises:
        ConfigError: the folder holds a run with another configuration, or there is no room.
        FileError: a file of the run is broken.
    """
    folder = results / experiment.name / run_name(name, experiment.seed)
    _require_same(_configuration(experiment, method_of(experiment, name)), folder, smoke)
    status = Status(folder / "status.json")
    done = status.stage == "done" and all(_whole(folder, task) for task in experiment.tasks)
    if not (done or smoke):
        require_room(experiment, name, folder)
    return done


def _require_same(configuration: dict[str, Any], folder: Path, smoke: bool) -> None:
    path = folder / "config.json"
    if not path.is_file() or not _begun(folder):
        return
    there = read_json(path, "configuration", "smoke")
    pairs = [(there["configuration"], configuration), ({"smoke": there["smoke"]}, {"smoke": smoke})]
    keys = ", ".join([key for pair in pairs for key in differences(*pair) if key not in WHEREABOUTS][:5])
    if keys:
        raise ConfigError(
            f"{folder} holds a run with another configuration ({keys}): choose other --results, or remove it"
        )


def _write_config(experiment: Experiment, method: Method, folder: Path, smoke: bool, device: torch.device) -> None:
    """Write down what a run is of, unless it has begun already and is of the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path, configuration = folder / "config.json", _configuration(experiment, method)
    if path.is_file() and _begun(folder):
        _require_same(configuration, folder, smoke)
        return
    if not ranks.is_first():
        return
    config = {
        "configuration": configuration,
        "experiment": experiment.name,
        "title": experiment.title,
        "method": method.name,
        "method_title": method.title,
        "seed": experiment.seed,
        "smoke": smoke,
        "processes": ranks.world(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _revision(),
        "weights": commit_of_weights(experiment.model, experiment.source),
    }
    write(path, json.dumps(config, indent=1))


def _begun(folder: Path) -> bool:
    """Whether a run has left anything but its configuration: what failed before may be set right."""
    left = [folder / NAME, folder / "training.jsonl", *(folder / "evaluation").glob("*.json*")]
    return any(path.is_file() and path.stat().st_size for path in left) or any((folder / CHECKPOINTS).glob("*"))


def _whole(folder: Path, task: str) -> bool:
    """Whether a task's file is there.

    Raises:
        FileError: it is broken.
    """
    path = folder / "evaluation" / f"{task}.json"
    return path.is_file() and bool(read_json(path, *RESULT))


def _configuration(experiment: Experiment, method: Method) -> dict[str, Any]:
    """What a run's results depend on, as JSON has it: not other methods' settings, nor the commits of others' data."""
    values, names = experiment.as_dict(), [name for name in (method.name, method.begins_with) if name]
    values["methods"] = {name: experiment.methods.get(name, {}) for name in names}
    own = [f"{task}/{split}" for task, split in splits_of(experiment, names)]
    revisions = values["data"]["revisions"]
    values["data"]["revisions"] = {split: revisions[split] for split in own if split in revisions}
    # A round trip, so that it compares with what is read: tuples are lists there.
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit of the sources, and whether they were changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
