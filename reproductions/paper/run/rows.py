"""Several rows after each other, and several GPUs beside each other."""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from reproductions.methods import METHODS
from reproductions.paper.config import Experiment, experiment_names, load_experiment, method_of, methods_of
from reproductions.paper.models import MODELS, ModelError, fetch_weights
from reproductions.shared.fields import ConfigError
from reproductions.shared.files import BusyError, FileError, alone_in, read_json, write

if TYPE_CHECKING:
    from reproductions.paper.data import DataError

Rows = Mapping[str, Sequence[str]]
"""Methods by experiment."""
Row = tuple[str, str]
"""An experiment and a method."""
REVISIONS = "revisions.json"
OUT_OF_MEMORY = (
    ": out of GPU memory. While it was trained: halve training.batch and double training.accumulation, which is the "
    "same step, and remove its folder first; while it was measured: lower evaluation.batch and call again"
)


class RowsFailedError(RuntimeError):
    """Some rows failed; the message names them."""


def chosen(
    experiment: str | None, method: str | None, all_rows: bool, beyond: bool, smoke: bool, overrides: Sequence[str]
) -> Rows:
    """The rows that a command line asks for.

    With ``smoke``, all rows include each method beyond the paper once, and every model.

    Raises:
        ConfigError: it asks for none, or for one that there is not.
    """
    if experiment is None and not all_rows:
        raise ConfigError(f"name an experiment ({', '.join(experiment_names())}) or pass --all")
    if method is None and not all_rows:
        raise ConfigError(f"pass --method ({', '.join(METHODS)}) or --all")
    if method is not None:
        known([method])
    names = experiment_names() if experiment is None else [experiment]
    found: dict[str, Sequence[str]] = {}
    for place, name in enumerate(names):
        more = [m for m in METHODS if not METHODS[m].in_paper]
        if not beyond:
            more = more[place :: len(names)] if smoke and experiment is None else []
        rows = methods_of(load_experiment(name, overrides).model)
        found[name] = [method] if method else [*rows, *more]
    if smoke and experiment is None and method is None and not any(x.startswith("model=") for x in overrides):
        # Every model of today too, with the rows of the tables and what users train most.
        for model in MODELS:
            if model not in {load_experiment(name).model for name in names}:
                name = f"{names[-1]}@{model}"
                found[name] = [*methods_of(model), "fine-tune-lv", "anchor", "lora-all"]
    return found


def known(methods: Sequence[str]) -> None:
    """Raise ConfigError for a method that there is not."""
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"no method {method!r}; there are {', '.join(METHODS)}")


def seeds_of(text: str, overrides: Sequence[str]) -> list[list[str]]:
    """Overrides for each of the seeds that a command line names, such as "0,1,2"; none for "".

    Raises:
        ConfigError: it names something else, or an override names a seed too.
    """
    if not text:
        return [[]]
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds: {text!r} is not of the form 0,1,2")
    if any(override.startswith("seed=") for override in overrides):
        raise ConfigError("--seeds and --set seed both name seeds: pass one of them")
    return [[f"seed={seed}"] for seed in dict.fromkeys(int(part) for part in text.split(","))]


def run_rows(rows: Rows, overrides: Sequence[str], results: Path, *, smoke: bool, console: Console) -> None:
    """Do rows, one at a time on each GPU, or one on all GPUs where `torchrun` began a process for each.

    Raises:
        RowsFailedError: some failed.
        ConfigError: settings cannot be used; or there is one row only, and its folder holds one of other settings.
        DataError: there is one row only, whose data cannot be had or are broken.
        ModelError: there is one row only, whose model cannot be had.
        FileError: there is one row only, and a file of it is broken.
    """
    from reproductions.paper.run import ranks
    from reproductions.paper.run.estimate import require_layers
    from reproductions.paper.run.room import require_room_for_rows, require_room_to_fetch
    from reproductions.paper.run.row import require_ready
    from reproductions.paper.run.sparing import require_possible

    _quiet()
    ranks.join()
    single = sum(map(len, rows.values())) == 1
    load = smoke_loader(results) if smoke else pinned(results)
    with ranks.in_turn():
        experiments = {name: load(name, overrides) for name in rows}
    for experiment in experiments.values():
        require_reporting(experiment)
    for name, method in row_list(rows):
        require_possible(experiments[name], method_of(experiments[name], method))
        if not smoke:
            require_layers(experiments[name])
        if single:
            # Of several, one that cannot be done keeps no other.
            require_ready(experiments[name], method, results, smoke=smoke)
    devices = visible_devices()
    if not (smoke or single):
        require_room_for_rows(experiments, rows, results, len(devices) if ranks.world() == 1 and devices else 1)
    with ranks.in_turn():
        if not smoke:
            require_room_to_fetch(experiments, rows)
        for error in chain(look_at_weights(experiments), look_at_data(rows, experiments, console)):
            if single:
                raise error
            console.print(f"{error}", style="red", markup=False, soft_wrap=True)
        if not smoke:
            pin(results)
    if not smoke:
        experiments = {name: pinned(results)(name, overrides) for name in rows}
    if len(devices) > 1 and not single and not smoke and ranks.world() == 1:
        beside(rows, overrides, results, devices, console)
    else:
        _in_turn(rows, experiments, results, smoke, console)
    if smoke and not single and ranks.is_first():
        from reproductions.paper.run.oracle import run_oracle

        for experiment in experiments.values():
            run_oracle(experiment, results, console)


def look_at_weights(experiments: Mapping[str, Experiment]) -> Iterator[ModelError]:
    """Fetch what models there are: the last of many rows would be late to learn that its own asks for a login.

    Yields:
        what cannot be had; only rows that need it fail.
    """
    for model, source in dict.fromkeys((e.model, e.source) for e in experiments.values()):
        try:
            fetch_weights(model, source)
        except ModelError as error:
            yield error


def look_at_data(rows: Rows, experiments: Mapping[str, Experiment], console: Console) -> Iterator["DataError"]:
    """Read every split that rows need, but for pictures, and fetch it if it is not there: hours later would be late.

    Yields:
        what cannot be had or is broken; only rows that need it fail.
    """
    from reproductions.paper.data import DATASETS, DataError
    from reproductions.paper.run.work import Workshop, splits_of

    seen = set()
    for name, methods in rows.items():
        for task, split in splits_of(experiments[name], methods):
            if (task, split) in seen:
                continue
            seen.add((task, split))
            try:
                found = Workshop(experiments[name], torch.device("cpu")).examples(task, split)
                found.require_whole()
            except DataError as error:
                yield error
            else:
                console.print(f"{DATASETS[task].title}, {split}: {len(found):,} examples", soft_wrap=True)


def _in_turn(rows: Rows, experiments: Mapping[str, Experiment], results: Path, smoke: bool, console: Console) -> None:
    from reproductions.paper.data import DataError
    from reproductions.paper.run import ranks
    from reproductions.paper.run.row import run_row

    failed: list[str] = []
    # What was imported lives on; the collections after each training need not look through it. What the caller had
    # frozen stays so.
    thaw = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        for name, method in row_list(rows):
            try:
                run_row(experiments[name], method, results, smoke=smoke, console=console)
            except Exception as error:
                hint = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else ""
                if ranks.world() > 1 or (sum(map(len, rows.values())) == 1 and not hint):
                    # Other processes cannot go on without this one: torchrun ends them all.
                    raise
                # The others can still be done; this one is taken up by the next call.
                # Not rich's own, which holds on to what the frames held: a model on the device.
                told = isinstance(error, BusyError | ConfigError | DataError | FileError | ModelError)
                text = str(error) if told else traceback.format_exc()
                console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
                failed.append(f"{name} {method}{hint}")
            # Also what a row that failed left on the device: the next one needs the room.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        if thaw:
            gc.unfreeze()
    _report(failed)


def row_list(rows: Rows) -> list[Row]:
    """Rows one by one."""
    return [(name, method) for name, methods in rows.items() for method in methods]


def take(waiting: list[Row], running: Collection[Row]) -> Row | None:
    """Take out the first row that can be done now: one that begins with another's result waits for that one."""
    for name, method in waiting:
        if (name, METHODS[method].begins_with) not in [*waiting, *running]:
            waiting.remove((name, method))
            return name, method
    return None


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [x.strip() for x in named.split(",")][:count] if named else [str(i) for i in range(count)]


def command(row: Row, overrides: Sequence[str], results: Path) -> list[str]:
    """What does one row, in a process of its own."""
    name, method = row
    run = [sys.executable, "-m", "reproductions", "run", name, "--method", method, "--results", str(results)]
    return [*run, *(part for override in overrides for part in ("--set", override))]


def beside(rows: Rows, overrides: Sequence[str], results: Path, devices: Sequence[str], console: Console) -> None:
    """Do rows in processes, one on each GPU at a time; whichever is free takes the next.

    Raises:
        RowsFailedError: some failed.
    """
    results.mkdir(parents=True, exist_ok=True)
    waiting = row_list(rows)
    running: dict[str, tuple[Row, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for device in devices:
                row = None if device in running else take(waiting, [row for row, _ in running.values()])
                if row is None:
                    continue
                log = results / f"gpu-{device}.log"
                console.print(f"GPU {device}: {' '.join(row)}, in {log}", soft_wrap=True)
                with log.open("ab") as file:
                    running[device] = row, subprocess.Popen(
                        command(row, overrides, results), env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
                        stdout=file, stderr=subprocess.STDOUT, preexec_fn=_die_with_the_parent,
                    )  # fmt: skip
            for device, (row, process) in list(running.items()):
                try:
                    code = process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
                del running[device]
                console.print(f"GPU {device}: {' '.join(row)} {'failed' if code else 'is done'}", soft_wrap=True)
                if code:
                    failed.append(f"{' '.join(row)}: see {results}/gpu-{device}.log")
    finally:
        for _, process in running.values():
            process.terminate()
    _report(failed)


def _die_with_the_parent() -> None:
    """On Linux, also where the parent is killed: what lives on would hold its GPU while the next call wants it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _report(failed: Sequence[str]) -> None:
    if failed:
        raise RowsFailedError(f"{len(failed)} rows failed, and are taken up by the next call:\n" + "\n".join(failed))


def smoke_loader(results: Path) -> Callable[[str, Sequence[str]], Experiment]:
    """What loads experiments in the smoke test's sizes."""
    from reproductions.paper.run.smoke import Assets

    return Assets(results / "assets").experiment


def pinned(results: Path) -> Callable[[str, Sequence[str]], Experiment]:
    """What loads experiments with the commits of data sets that a folder of results began with.

    Raises:
        FileError: their file is broken.
    """
    path = results / REVISIONS
    more = {"data": {"revisions": read_json(path)}} if path.is_file() else {}
    return lambda name, overrides: load_experiment(name, overrides, more)


def pin(results: Path) -> dict[str, str]:
    """Write down the commits of the splits that came from the hub, for those that have none yet; returns all."""
    from reproductions.paper.run.work import commits

    path = results / REVISIONS
    results.mkdir(parents=True, exist_ok=True)
    # Jobs of a cluster write here at the same time.
    with alone_in(results, f"{REVISIONS}.lock", wait=True):
        before = read_json(path) if path.is_file() else {}
        now = {**commits(), **before}
        if now != before:
            write(path, json.dumps(now, indent=1))
    return now


def require_reporting(experiment: Experiment) -> None:
    """Refuse to report to what is not installed, before a model is loaded.

    Raises:
        ConfigError: it is not, or transformers knows no such integration.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    name, found = experiment.training.report_to, get_available_reporting_integrations()
    if name not in ("none", "tensorboard", *found):
        raise ConfigError(
            f"{experiment.name}: training.report_to: {name} is not installed, or is none of transformers' "
            f"integrations; there are none, {', '.join(dict.fromkeys(['tensorboard', *found]))}"
        )


def _quiet() -> None:
    """Leave away the bars of reading a file, of which there are hundreds, and what a reader can do nothing about."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Of names that peft and this release of transformers have different ideas of.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    datasets.disable_progress_bars()
