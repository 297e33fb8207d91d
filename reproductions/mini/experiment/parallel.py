"""Many runs over the cores, one thread each, with a progress bar a run and results that survive a kill."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from reproductions.mini.experiment.run import Run, execute
from reproductions.shared.results import Result, add_line, read_results

_FEW = 12
_reports: Any = None


def execute_all(runs: Sequence[Run], path: Path, console: Console, workers: int | None = None) -> list[Result]:
    """Do the runs that the file does not hold yet; return the results of all, in order.

    A run whose loss does not stay finite has a result too: its error under "failed", and no scores.

    Args:
        runs: what to do, in this order.
        path: JSON lines. Each result is added as soon as it is there, so that a killed call is taken up again.
        console: for the progress bars.
        workers: processes; one a core by default. One is this process itself.
    """
    done = read_results(path)
    todo = list({run.key: run for run in runs if run.key not in done}.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if todo:
        with _Bars(todo, console) as bars:
            for result in _results(todo, max(1, min(workers or os.cpu_count() or 1, len(todo))), bars):
                done[result["key"]] = result
                add_line(path, result)
                bars.finish(result)
    return [done[run.key] for run in runs]


class _Bars:
    """A bar for all runs and one for each that has begun; of many runs, only those at work are shown."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[doing]}"), console=console)
        self.console = console
        self.few = len(runs) <= _FEW
        self.all = self.progress.add_task("runs", total=len(runs), doing="")
        self.bars = {
            run.key: self.progress.add_task(
                f"{run.method.label}, {run.target}, seed {run.seed}",
                total=run.steps, doing="waits", start=False, visible=self.few,
            )
            for run in runs
        }  # fmt: skip

    def __enter__(self) -> "_Bars":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)

    def step(self, key: str, step: int, loss: float) -> None:
        if step == 0:
            self.progress.start_task(self.bars[key])
        self.progress.update(self.bars[key], completed=step + 1, doing=f"loss {loss:.3f}", visible=True)

    def finish(self, result: Result) -> None:
        bar, outcome = self.bars[result["key"]], "failed" if "failed" in result else "done"
        self.progress.update(bar, completed=result["steps"], doing=outcome, visible=self.few)
        self.progress.stop_task(bar)
        self.progress.advance(self.all)
        if not self.few and not self.console.is_terminal:
            task = self.progress.tasks[self.all]
            self.console.print(
                f"{task.completed:.0f} of {task.total:.0f}: {self.progress.tasks[bar].description}, {outcome}",
                soft_wrap=True,
            )


def _results(runs: Sequence[Run], processes: int, bars: _Bars) -> Iterator[Result]:
    if processes == 1:
        for run in runs:
            yield _work(run, bars.step)
        return
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    with ProcessPoolExecutor(processes, context, _attach, (reports,)) as pool:
        pending = {pool.submit(_work_there, run) for run in runs}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not reports.empty():
                bars.step(*reports.get())
            for future in finished:
                yield future.result()


def _work(run: Run, report: Callable[[str, int, float], None]) -> Result:
    try:
        result = execute(run, lambda step, loss: report(run.key, step, loss))
    except FloatingPointError as error:
        told = {"settings": run.method.settings, "target": run.target, "seed": run.seed, "steps": run.steps}
        result = {"method": run.method.name, "label": run.method.label, **told, "failed": str(error)}
    return {"key": run.key, **result}


def _attach(reports: Any) -> None:
    global _reports
    _reports = reports
    transformers.utils.logging.disable_progress_bar()


def _work_there(run: Run) -> Result:
    return _work(run, lambda *report: _reports.put(report))
