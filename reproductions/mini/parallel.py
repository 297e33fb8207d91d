"""Many runs over the cores, one thread each, with a progress bar a run and results that survive a kill."""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from reproductions.mini.finetune import Run, execute

Result = dict[str, Any]
_reports: Any = None


def key(run: Run) -> str:
    """What a result is found again by: everything that it depends on."""
    return json.dumps({**asdict(run), "checkpoint": run.checkpoint.name}, sort_keys=True)


def read_results(path: Path) -> dict[str, Result]:
    """The results in a file of JSON lines, by key; a last line cut short by a kill is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[result["key"]] = result
    return found


def execute_all(runs: Sequence[Run], path: Path, console: Console, workers: int | None = None) -> list[Result]:
    """Do the runs that the file does not hold yet; return the results of all, in order.

    Args:
        runs: what to do.
        path: JSON lines. Each result is added as soon as it is there, so that a killed call is taken up again.
        console: for the progress bars.
        workers: processes; one a core by default.
    """
    done = read_results(path)
    todo = [run for run in runs if key(run) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    processes = max(1, min(workers or os.cpu_count() or 1, len(todo)))
    with (
        ProcessPoolExecutor(processes, context, _attach, (reports,)) as pool,
        Progress(*columns, TextColumn("{task.fields[doing]}"), console=console) as progress,
    ):
        bars = {
            key(run): progress.add_task(
                f"{run.method.label}, {run.target}, seed {run.seed}", total=run.steps, doing="waits", start=False
            )
            for run in todo
        }
        pending = {pool.submit(_work, run) for run in todo}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not reports.empty():
                _show(progress, bars, *reports.get())
            for future in finished:
                result = future.result()
                done[result["key"]] = result
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                progress.update(bars[result["key"]], completed=result["steps"], doing="done")
                progress.stop_task(bars[result["key"]])
    return [done[key(run)] for run in runs]


def _show(progress: Progress, bars: dict[str, TaskID], name: str, step: int, loss: float) -> None:
    bar = bars[name]
    if step == 0:
        progress.start_task(bar)
    progress.update(bar, completed=step + 1, doing=f"loss {loss:.3f}")


def _attach(reports: Any) -> None:
    global _reports
    _reports = reports
    transformers.utils.logging.disable_progress_bar()


def _work(run: Run) -> Result:
    name = key(run)
    result = execute(run, lambda step, loss: _reports.put((name, step, loss)))
    return {"key": name, **result}
