"""Several rows after each other, and several GPUs beside each other."""

import gc
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from reproductions.paper.config import ConfigError, Experiment, experiment_names, load_experiment
from reproductions.paper.methods import METHODS, methods_of

Rows = Mapping[str, Sequence[str]]
"""Methods by experiment."""


class RowsFailedError(RuntimeError):
    """Some rows failed; the message names them."""


def chosen(
    experiment: str | None, method: str | None, all_rows: bool, beyond: bool, smoke: bool, overrides: Sequence[str]
) -> Rows:
    """The rows that a command line asks for.

    With ``smoke``, all rows include each method beyond the paper once.

    Raises:
        ConfigError: it asks for none, or for one that there is not.
    """
    if experiment is None and not all_rows:
        raise ConfigError(f"name an experiment ({', '.join(experiment_names())}) or pass --all")
    if method is None and not all_rows:
        raise ConfigError(f"pass --method ({', '.join(METHODS)}) or --all")
    if method is not None and method not in METHODS:
        raise ConfigError(f"no method {method!r}; there are {', '.join(METHODS)}")
    names = experiment_names() if experiment is None else [experiment]
    found: dict[str, Sequence[str]] = {}
    for place, name in enumerate(names):
        more = [m for m in METHODS if not METHODS[m].in_paper]
        if not beyond:
            more = more[place :: len(names)] if smoke and experiment is None else []
        rows = methods_of(load_experiment(name, overrides).model)
        found[name] = [method] if method else [*rows, *more]
    return found


def run_rows(rows: Rows, overrides: Sequence[str], results: Path, *, smoke: bool, console: Console) -> None:
    """Do rows; experiments are dealt out to the GPUs if there are several of both."""
    devices = visible_devices()
    if len(devices) > 1 and len(rows) > 1 and not smoke:
        _beside(rows, overrides, results, devices, console)
        return
    _quiet()
    from reproductions.paper.run import run_row

    assets = None
    if smoke:
        from reproductions.paper.smoke import Assets

        assets = Assets(results / "assets").write()
    # What was imported lives on; the collections after each training need not look through it.
    failed: list[str] = []
    gc.freeze()
    try:
        for name, methods in rows.items():
            experiment: Experiment = assets.experiment(name, overrides) if assets else load_experiment(name, overrides)
            for method in methods:
                try:
                    run_row(experiment, method, results, smoke=smoke, console=console)
                except Exception:
                    if sum(map(len, rows.values())) == 1:
                        raise
                    # The others can still be done; this one is taken up by the next call.
                    console.print_exception()
                    failed.append(f"{name} {method}")
    finally:
        gc.unfreeze()
    _report(failed)


def say_what_is_lacking(rows: Rows, overrides: Sequence[str], console: Console) -> None:
    """Name data that cannot be fetched and is not there, before anything has run for hours."""
    from reproductions.paper.data import DATASETS, DataError
    from reproductions.paper.work import Workshop

    for name, methods in rows.items():
        experiment = load_experiment(name, overrides)
        target = DATASETS[experiment.target]
        if target.training in target.by_hand and any(METHODS[method].trains for method in methods):
            try:
                Workshop(experiment, torch.device("cpu")).training_examples()
            except DataError as error:
                console.print(f"{name}: only zero-shot can run. {error}", style="red", markup=False, soft_wrap=True)


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [x.strip() for x in named.split(",")][:count] if named else [str(i) for i in range(count)]


def commands(rows: Rows, overrides: Sequence[str], results: Path, devices: Sequence[str]) -> list[list[list[str]]]:
    """For each device the commands that it runs, one after the other: whole experiments, dealt out in turn.

    The halves of Table 1 are the long ones, and come first, so that two devices get one each.
    """
    out: list[list[list[str]]] = [[] for _ in devices]
    for place, (name, methods) in enumerate(rows.items()):
        for method in methods:
            command = [
                sys.executable,
                "-m",
                "reproductions",
                "run",
                name,
                "--method",
                method,
                "--results",
                str(results),
            ]
            for override in overrides:
                command += ["--set", override]
            out[place % len(devices)].append(command)
    return out


def _beside(rows: Rows, overrides: Sequence[str], results: Path, devices: Sequence[str], console: Console) -> None:
    results.mkdir(parents=True, exist_ok=True)
    queues = commands(rows, overrides, results, devices)
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while any(queues) or running:
            for device, queue in zip(devices, queues, strict=True):
                if device in running or not queue:
                    continue
                command = queue.pop(0)
                console.print(f"GPU {device}: {' '.join(command[3:])}")
                log = (results / f"gpu-{device}.log").open("ab")
                running[device] = subprocess.Popen(
                    command, env={**os.environ, "CUDA_VISIBLE_DEVICES": device}, stdout=log, stderr=subprocess.STDOUT
                )
            for device, process in list(running.items()):
                try:
                    code = process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
                del running[device]
                if code:
                    what = " ".join(map(str, process.args[4:7]))  # type: ignore[index]
                    failed.append(f"{what}: see {results}/gpu-{device}.log")
    finally:
        for process in running.values():
            process.terminate()
    _report(failed)


def _report(failed: Sequence[str]) -> None:
    if failed:
        raise RowsFailedError(f"{len(failed)} rows failed, and are taken up by the next call:\n" + "\n".join(failed))


def _quiet() -> None:
    """Leave the bars of reading a file away: there are hundreds of them."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
