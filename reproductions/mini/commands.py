"""`python -m reproductions mini ...`: commands of the small experiment."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reproductions.mini.model.settings import RECIPES

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="A small LLaVA on drawn scenes: runs on two CPU cores.", no_args_is_help=True)


@app.command()
def pretrain(
    output: Annotated[
        Path, typer.Option(help="Folder for the checkpoint; a killed run there is taken up again.")
    ] = Path("runs/mini/pretrained"),
    architecture: Annotated[
        Literal["llava", "llava-10m", "smolvlm"], typer.Option(help="The kind of model, which brings its own settings.")
    ] = "llava",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the batches.")] = 0,
    vision_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the vision tower alone; 0 for the architecture's own.")
    ] = 0,
    language_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the whole model; 0 for the architecture's own.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw the pictures.")] = 1,
    examples: Annotated[int, typer.Option(min=1, help="Validation examples a task, at the end.")] = 500,
) -> None:
    """Make a checkpoint from nothing, reproducibly: a LLaVA takes about 15 minutes on two cores."""
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from reproductions.mini.model import pretrain as pretraining

    transformers.utils.logging.disable_progress_bar()
    own = RECIPES[architecture]
    settings = replace(
        own,
        seed=seed,
        vision_steps=vision_steps or own.vision_steps,
        language_steps=language_steps or own.language_steps,
    )
    console = Console()
    left = TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*left, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bars:
        bar = {
            "vision": bars.add_task("vision", total=settings.vision_steps, loss=float("nan")),
            "language": bars.add_task("language", total=settings.language_steps, loss=float("nan")),
        }

        def show(stage: str, step: int, loss: float, accuracies: dict[str, float] | None) -> None:
            bars.update(bar[stage], completed=step, loss=loss)
            if accuracies is not None:
                console.print(f"step {step}: {_percentages(accuracies)}", soft_wrap=True)

        report = pretraining.pretrain(output, settings, show, workers, final_examples=examples)
    console.print(f"validation: {_percentages(report['validation']['exact'])}", soft_wrap=True)
    console.print(f"wrote {output} after {report['seconds'] / 60:.1f} minutes", soft_wrap=True)


Target = Annotated[Literal["digits", "caption", "tiles"], typer.Option(help="What to fine-tune on.")]
TargetOrAll = Annotated[
    Literal["digits", "caption", "tiles"] | None, typer.Option(help="Of what is run; digits and captions by default.")
]
OptimizerOrAll = Annotated[Literal["adamw", "sgd"] | None, typer.Option(help="Of what is run; both by default.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of each fine-tuning.")]
Examples = Annotated[int, typer.Option(min=1, help="Examples that measure each task.")]


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option(help="Folder for the table's numbers and the figure; what it holds already is not run again."),
    ] = Path("runs/mini/demo"),
    target: Target = "digits",
    seeds: Annotated[
        str, typer.Option(help="Seeds of the batches, separated by commas; several give mean ± deviation.")
    ] = "0",
    methods: Annotated[
        str,
        typer.Option(
            help="Which, separated by commas, beside the pre-trained model and plain AdamW: fine-tune-low, mdgd, "
            "align, anchor (these by default), mdgd-gm, step."
        ),
    ] = "",
    steps: Steps = 300,
    examples: Examples = 200,
) -> None:
    """Fine-tune with and without help and show what is forgotten: under 4 minutes on two cores."""
    from reproductions.mini import demo as demonstration
    from reproductions.mini.experiment.methods import METHODS
    from reproductions.mini.experiment.study import require_known

    names = methods.split(",") if methods else demonstration.DEFAULT
    with _refused():
        require_known("method", names, METHODS)
        numbers = _seeds(seeds)
        demonstration.require_test_seeds(numbers)
    demonstration.demo(output, target, numbers, steps, examples, _console(), names)


@app.command()
def tune(
    output: Annotated[
        Path, typer.Option(help="Folder for the results; those that are there are not run again.")
    ] = Path("runs/mini/tune"),
    target: Target = "digits",
    methods: Annotated[str, typer.Option(help="Which methods, separated by commas; all by default.")] = "",
    steps: Steps = 300,
    examples: Examples = 150,
) -> None:
    """Choose settings on validation examples and on seeds of their own: about half an hour on two cores."""
    from reproductions.mini.experiment import tune as tuning
    from reproductions.mini.experiment.study import require_known

    names = methods.split(",") if methods else list(tuning.GRIDS)
    with _refused():
        require_known("method", names, tuning.GRIDS)
    tuning.tune(output, names, target, steps, examples, _console())


@app.command()
def study(
    output: Annotated[
        Path, typer.Option(help="Folder for the results; those that are there are not run again.")
    ] = Path("runs/mini/study"),
    systems: Annotated[str, typer.Option(help="Which systems, separated by commas; all by default.")] = "",
    seeds: Annotated[str, typer.Option(help="Test seeds; even ones begin with the first checkpoint.")] = "0,1,2,3,4,5",
    target: TargetOrAll = None,
    optimizer: OptimizerOrAll = None,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="One target after another with AdamW, in place of one target.")
    ] = False,
    long: Annotated[bool, typer.Option("--long", help="900 steps of captions with AdamW, in place of 300.")] = False,
    architecture: Annotated[
        Literal["llava", "smolvlm", "llava-10m"], typer.Option(help="The pre-trained models that the runs begin with.")
    ] = "llava",
    stages: Annotated[
        str,
        typer.Option(help="tune, test, cost, frontier; edge: values beyond those that were tried. In this order."),
    ] = "tune,test,cost,frontier",
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread each; 0 for one a core.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of each fine-tuning; 0 for each target's own.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 16,
    examples: Annotated[int, typer.Option(min=1, help="Test examples a task.")] = 200,
    tuning_examples: Annotated[int, typer.Option(min=1, help="Validation examples a task.")] = 150,
) -> None:
    """Run every system: choose its settings, test it, and draw its frontier. Resumes after a kill."""
    from reproductions.mini.experiment import study as studying
    from reproductions.mini.experiment.cells import cells_of
    from reproductions.mini.experiment.systems import SYSTEMS

    names, wanted = systems.split(",") if systems else [], stages.split(",")
    with _refused():
        if long and steps:
            raise ValueError("--long has a number of steps of its own: leave out --steps")
        cells = cells_of(architecture, sequence, target, optimizer, long)
        studying.require_checkpoints(cells)
        studying.require_known("system", names, SYSTEMS)
        studying.require_known("stage", wanted, studying.STAGES)
        numbers = _seeds(seeds)
        studying.require_test_seeds(numbers)
    studying.study(
        output, cells, names, numbers, [stage for stage in studying.STAGES if stage in wanted],
        studying.Size(steps or None, batch, tuning_examples, examples), _console(), workers or None,
    )  # fmt: skip


@app.command()
def leads(
    output: Annotated[Path, typer.Option(help="Folder of the study; what it holds already is not run again.")] = Path(
        "runs/mini/study"
    ),
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread each; 0 for one a core.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of each fine-tuning; 0 for the study's.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 16,
    examples: Annotated[int, typer.Option(min=1, help="Validation examples a task.")] = 150,
) -> None:
    """Try other masks, other layers and other ways to keep a history, on validation examples alone."""
    from reproductions.mini.experiment import leads as leading
    from reproductions.mini.experiment.study import Size

    leading.leads(output, Size(steps or None, batch, examples), _console(), workers or None)


@app.command()
def strength(
    output: Annotated[
        Path, typer.Option(help="Folder for the results; those that are there are not run again.")
    ] = Path("runs/mini/strength"),
    cells: Annotated[str, typer.Option(help="Which cells, separated by commas; all five by default.")] = "",
    strengths: Annotated[
        str, typer.Option(help="Which strengths, and forms such as absolute-0.01; all by default.")
    ] = "",
    factors: Annotated[str, typer.Option(help="Of the cells' learning rates.")] = "1,0.5,2",
    seeds: Annotated[str, typer.Option(help="Of those that settings are chosen with.")] = "100,101",
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread each; 0 for one a core.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of each fine-tuning; 0 for each target's own.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 16,
    examples: Annotated[int, typer.Option(min=1, help="Validation examples a task.")] = 150,
) -> None:
    """Measure which strength of the anchor carries over, on validation examples: about 5 core hours."""
    from reproductions.mini.experiment import strength as measuring
    from reproductions.mini.experiment.study import Size, require_known

    places, forms = cells.split(",") if cells else list(measuring.PLACES), strengths.split(",")
    rates = {f"{factor:g}": factor for factor in measuring.FACTORS}
    with _refused():
        require_known("cell", places, measuring.PLACES)
        require_known("strength", forms if strengths else (), measuring.FORMS)
        require_known("factor", factors.split(","), rates)
        numbers = _seeds(seeds)
        measuring.require_tuning_seeds(numbers)
    measuring.strength(
        output, places, forms if strengths else list(measuring.FORMS), [rates[x] for x in factors.split(",")],
        numbers, Size(steps or None, batch, examples), _console(), workers or None,
    )  # fmt: skip


Results = Annotated[Path, typer.Option(help="Folder of the study's results; they need not be complete.")]
STUDY = Path("reproductions/mini/results/study")


@app.command()
def report(
    results: Results = STUDY,
    output: Annotated[Path, typer.Option(help="Folder for the page, the tables and the figures.")] = Path(
        "runs/mini/report"
    ),
) -> None:
    """Tables, verdicts, figures and answers of the study, on one page."""
    from reproductions.mini.report.page import write_report

    _require(results)
    console = _console()
    page = write_report(results, output, console)
    console.print(f"wrote {page}, tables.md, verdicts.md and figures beside it", soft_wrap=True)


@app.command()
def claims(
    output: Annotated[
        Path, typer.Option(help="Folder for the runs and the verdicts; runs that are there are not run again.")
    ] = Path("runs/mini/claims"),
    settings: Annotated[Path, typer.Option(help="Folder of the study whose chosen settings are used.")] = STUDY,
    seeds: Annotated[str, typer.Option(help="Test seeds; even ones begin with the first checkpoint.")] = "0,1,2,3,4,5",
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread each; 0 for one a core.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of each fine-tuning; 0 for each target's own.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 16,
    examples: Annotated[int, typer.Option(min=1, help="Test examples a task.")] = 200,
    own_examples: Annotated[
        bool, typer.Option("--own-examples", help="Draw test examples for each seed, in place of the study's for all.")
    ] = False,
) -> None:
    """Run the claims that carry the recommendation again, with the study's settings: under an hour on two cores."""
    from reproductions.mini.experiment.study import Size
    from reproductions.mini.report.rerun import rerun

    _require(settings)
    with _refused():
        size = Size(steps or None, batch, examples=examples, own_examples=own_examples)
        rerun(output, settings, _seeds(seeds), size, _console(), workers or None)


@app.command()
def figures(
    results: Results = STUDY,
    output: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("runs/mini/report/figures"),
    tsne: Annotated[bool, typer.Option("--tsne", help="Fine-tune for t-SNE first; kept in the results.")] = False,
    masking: Annotated[
        bool, typer.Option("--masking", help="Fine-tune at every masking ratio first; kept in the results.")
    ] = False,
    target: TargetOrAll = None,
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option(help="Of what is run.")] = "adamw",
) -> None:
    """Draw the study's figures."""
    import torch

    from reproductions.mini.experiment.embedding import embed_cells
    from reproductions.mini.experiment.masking import mask_cells
    from reproductions.mini.experiment.outcomes import load
    from reproductions.mini.report.figures import draw_figures

    _require(results)
    console, cells = _console(), load(results)
    single = [c for c in cells if not c.cell.first and not c.cell.long]
    wanted = [c for c in single if target in (None, c.cell.target) and optimizer == c.cell.base]
    # The model is too small to share among threads, which wait for each other where the machine has other work.
    torch.set_num_threads(1)
    if tsne:
        embed_cells(results, wanted, console)
    if masking:
        mask_cells(results, wanted, console)
    for path in draw_figures(results, cells, output):
        console.print(f"wrote {path}", soft_wrap=True)


def _require(results: Path) -> None:
    if not results.is_dir():
        raise typer.BadParameter(f"there is no folder {results}; `mini study --output {results}` makes it")


@contextmanager
def _refused() -> Iterator[None]:
    """What is wrong with the arguments, without a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None


def _seeds(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"seeds are whole numbers separated by commas, got {text!r}")
    return [int(part) for part in text.split(",")]


def _console() -> "Console":
    """Where to print; as wide as the table needs where the output is no terminal."""
    import sys

    import transformers
    from rich.console import Console

    transformers.utils.logging.disable_progress_bar()
    return Console(width=None if sys.stdout.isatty() else 200)


def _percentages(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{task} {accuracy:.1f}" for task, accuracy in accuracies.items())
