"""The paper's experiments on the command line."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

RESULTS, SMOKE = Path("runs/paper"), Path("runs/paper-smoke")
Results = Annotated[
    Path | None, typer.Option(help=f"Folder of results; {RESULTS}, or {SMOKE} with --smoke, if not given.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny random models and small files, in minutes on a CPU.")]
Model = Annotated[str | None, typer.Option(help="Another model, such as minicpm-v-4.6.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as training.learning_rate=1e-5.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("list")(list_rows)
    app.command("run")(run)
    app.command("table")(table)
    app.command("figures")(figures)
    app.command("report")(report)
    app.command("harness")(harness)
    app.command("tune")(tune)
    app.command("export")(export)


def list_rows(
    beyond: Annotated[bool, typer.Option("--beyond", help="The methods beyond the paper too.")] = False,
    model: Model = None,
    overrides: Overrides = None,
    results: Results = None,
) -> None:
    """Every row of both tables and every figure: numbers trained, hours, memory, disk, data, and what has run."""
    with _refusals():
        from reproductions.paper.run.listing import print_list

        print_list(_settings(overrides, model), results or RESULTS, _console(), beyond=beyond)


def run(
    experiment: Annotated[
        str | None, typer.Argument(help="Such as llava-flickr30k, or a TOML file; all of them with --all.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Such as mdgd; see `list`.")] = None,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Every row of the tables, on all GPUs that there are.")
    ] = False,
    beyond: Annotated[bool, typer.Option(help="With --all: the methods beyond the paper too.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="hour or day: the claim in the small, on one card of 24 GB.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2: each row with each; tables show means.")] = "",
    smoke: Smoke = False,
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with one folder a data set; the hub for what it lacks.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with MiniCPM-V-2.0's weights.")
    ] = False,
    overrides: Overrides = None,
    results: Results = None,
) -> None:
    """Fine-tune and measure; what is done is skipped, and what was killed is taken up where it stopped."""
    settings = _settings(overrides, None if preset else model, data)
    settings += ["trust_remote_code=true"] * trust_remote_code
    with _refusals():
        from reproductions.paper.run import rows

        console, folder = _console(), _folder(results, smoke)
        try:
            if preset is not None:
                from reproductions.paper.run.preset import run_preset
                from reproductions.shared.fields import ConfigError

                if experiment or method or all_rows or seeds:
                    raise ConfigError("--preset names model, rows and seeds itself: pass no other rows and no --seeds")
                run_preset(preset, model, settings, folder, smoke=smoke, console=console)
            else:
                found = rows.chosen(experiment, method, all_rows, beyond, smoke, settings)
                for seed in rows.seeds_of(seeds, settings):
                    rows.run_rows(found, [*settings, *seed], folder, smoke=smoke, console=console)
        except rows.RowsFailedError:
            _print_tables(folder, console)
            raise
        if all_rows or preset is not None:
            _print_tables(folder, console)
        if smoke and all_rows:
            import time

            told = f"{sum(map(len, found.values()))} rows in {time.process_time() / 60:.1f} minutes of processor time"
            console.print(told)


def table(results: Results = None, smoke: Smoke = False) -> None:
    """The tables in the paper's layout: published, ours, and the difference."""
    with _refusals():
        _print_tables(_folder(results, smoke), _console())


def figures(
    results: Results = None,
    smoke: Smoke = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the figures; in the results if not given.")] = None,
) -> None:
    """Draw Figures 1 to 5 from the results."""
    folder = _folder(results, smoke)
    with _refusals():
        from reproductions.paper.report.figures import draw_all

        for path in draw_all(folder, output or folder / "figures"):
            _console().print(f"wrote {path}")


def report(
    results: Results = None,
    smoke: Smoke = False,
    output: Annotated[Path | None, typer.Option(help="The page; in the results if not given.")] = None,
) -> None:
    """One self-contained page with every table and figure."""
    folder = _folder(results, smoke)
    with _refusals():
        from reproductions.paper.report.page import write_report

        page = output or folder / "report.html"
        write_report(folder, page)
        _console().print(f"wrote {page}")


def harness(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/paper/llava-okvqa/mdgd.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lmms-eval, separated by commas, such as gqa,pope.")],
    tasks_folder: Annotated[Path | None, typer.Option(help="Task files of one's own, in place of lmms-eval's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
) -> None:
    """Measure a run's model with lmms-eval, which has to be installed beside this."""
    if not (folder / "config.json").is_file():
        typer.secho(f"{folder} holds no run", err=True, fg="red")
        raise typer.Exit(2)
    with _refusals():
        import torch

        from reproductions.paper.run import harness as outer

        model = outer.load_run(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        found = outer.measure(model, tasks.split(","), tasks_folder=tasks_folder, limit=limit)
        _console().print_json(json.dumps(found, default=str))


def tune(
    experiment: Annotated[str, typer.Argument(help="Such as minicpm-pathvqa, hour, or a TOML file.")],
    methods: Annotated[str, typer.Option(help="Methods, separated by commas, such as fine-tune,fine-tune-lv,mdgd.")],
    smoke: Smoke = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder with one folder a data set; the hub for what it lacks.")
    ] = None,
    overrides: Overrides = None,
    results: Results = None,
) -> None:
    """Choose settings on validation examples, with the same number of candidates for every method."""
    settings = _settings(overrides, None, data)
    with _refusals():
        from reproductions.paper.config import PRESET_NAMES, load_preset
        from reproductions.paper.run import rows
        from reproductions.paper.run.tune import tune as choose

        folder = _folder(results, smoke)
        name = str(load_preset(experiment)[0]) if experiment in PRESET_NAMES else experiment
        load = rows.smoke_loader(folder) if smoke else rows.pinned(folder)
        names = [method.strip() for method in methods.split(",")]
        rows.known(names)
        choose(load(name, settings), names, folder, smoke=smoke, console=_console())


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/paper/llava-okvqa/mdgd.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
) -> None:
    """Write a run's model as a folder for from_pretrained, vLLM, lmms-eval and VLMEvalKit."""
    with _refusals():
        from reproductions.paper.run.export import export_run

        typer.echo(export_run(folder, output))


def _settings(overrides: list[str] | None, model: str | None, data: Path | None = None) -> list[str]:
    """Overrides, those that have options of their own among them."""
    named = {"model": model, "data.source": data}
    return [*(overrides or []), *(f"{key}={json.dumps(str(x))}" for key, x in named.items() if x is not None)]


def _print_tables(folder: Path, console: "Console") -> None:
    from reproductions.paper.report import tables

    for found in tables.rich_tables(folder):
        console.print(found)


def _folder(results: Path | None, smoke: bool) -> Path:
    return results or (SMOKE if smoke else RESULTS)


class _refusals:  # noqa: N801
    """What is wrong with the request is told in a line, without a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("reproductions"):
            what = "lmms-eval" if error.name == "lmms_eval" else "-e '.[paper]'"
            typer.secho(f"{error.name} is not installed: pip install {what}", err=True, fg="red")
            raise typer.Exit(2) from error
        from reproductions.paper.data import DataError
        from reproductions.paper.models import ModelError
        from reproductions.paper.run.rows import RowsFailedError
        from reproductions.shared.fields import ConfigError
        from reproductions.shared.files import BusyError, FileError

        told = BusyError | ConfigError | DataError | FileError | ModelError | RowsFailedError
        if isinstance(error, told):
            typer.secho(str(error), err=True, fg="red")
            raise typer.Exit(1 if isinstance(error, RowsFailedError) else 2) from error


def _console() -> "Console":
    """Where to print; as wide as the tables need where the output is no terminal. Of several processes one prints."""
    import os
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, quiet=os.environ.get("RANK", "0") != "0")
