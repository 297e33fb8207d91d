"""`python -m reproductions mini ...`: commands of the small experiment."""

from pathlib import Path
from typing import Annotated

import typer

from reproductions.mini.settings import PRETRAIN, PretrainSettings

app = typer.Typer(help="A small LLaVA on drawn scenes: runs on two CPU cores.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the command's name necessary while there is only one."""


@app.command()
def pretrain(
    output: Annotated[
        Path, typer.Option(help="Folder for the checkpoint; a killed run there is taken up again.")
    ] = Path("runs/mini/pretrained"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the batches.")] = PRETRAIN.seed,
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone.")] = PRETRAIN.vision_steps,
    language_steps: Annotated[int, typer.Option(min=1, help="Steps of the whole model.")] = PRETRAIN.language_steps,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw the pictures.")] = 1,
    examples: Annotated[int, typer.Option(min=1, help="Validation examples a task, at the end.")] = 500,
) -> None:
    """Make the checkpoint from nothing, reproducibly: about 15 minutes on two cores."""
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from reproductions.mini import pretrain as pretraining

    transformers.utils.logging.disable_progress_bar()
    settings = PretrainSettings(seed=seed, vision_steps=vision_steps, language_steps=language_steps)
    console = Console()
    left = TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*left, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bars:
        bar = {
            "vision": bars.add_task("vision", total=vision_steps, loss=float("nan")),
            "language": bars.add_task("language", total=language_steps, loss=float("nan")),
        }

        def show(stage: str, step: int, loss: float, accuracies: dict[str, float] | None) -> None:
            bars.update(bar[stage], completed=step, loss=loss)
            if accuracies is not None:
                console.print(f"step {step}: {_percentages(accuracies)}", soft_wrap=True)

        report = pretraining.pretrain(output, settings, show, workers, final_examples=examples)
    console.print(f"validation: {_percentages(report['validation']['exact'])}", soft_wrap=True)
    console.print(f"wrote {output} after {report['seconds'] / 60:.1f} minutes", soft_wrap=True)


def _percentages(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{task} {accuracy:.1f}" for task, accuracy in accuracies.items())
