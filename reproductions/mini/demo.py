"""The demo: fine-tune the small LLaVA with and without MDGD, and see what each still sees."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reproductions.mini.figures import draw_demo
from reproductions.mini.finetune import Run
from reproductions.mini.methods import METHODS
from reproductions.mini.parallel import Result, execute_all
from reproductions.mini.questions import PRETRAINED_TASKS

# Settings are chosen on validation examples and seeds from 100 on; see `tune`.
TEST_SEEDS = range(100)


def runs(target: str, seed: int, steps: int, examples: int) -> list[Run]:
    """One run a method, on test examples; the longest first, so that the cores finish together."""
    order = ("mdgd", "step", "mdgd-gm", "fine-tune", "fine-tune-low", "zero-shot")
    return [Run(METHODS[name], target, "test", seed, steps if name != "zero-shot" else 0, examples) for name in order]


def demo(folder: Path, target: str, seed: int, steps: int, examples: int, console: Console) -> list[Result]:
    """Run the demo; writes `results.jsonl`, `demo.json` and `demo.png` to the folder.

    Returns:
        the results in the order of `METHODS`.

    Raises:
        ValueError: the seed is one of those that settings are chosen with.
    """

    if seed not in TEST_SEEDS:
        raise ValueError(f"seed {seed} is kept for choosing settings; take one below {TEST_SEEDS.stop}")
    found = {
        r["method"]: r for r in execute_all(runs(target, seed, steps, examples), folder / "results.jsonl", console)
    }
    results = [found[name] for name in METHODS]
    console.print(table(results, target))
    (folder / "demo.json").write_text(json.dumps(results, indent=1))
    draw_demo(results, target, folder / "demo.png")
    console.print(f"wrote {folder / 'demo.png'} and {folder / 'demo.json'}", soft_wrap=True)
    return results


def table(results: Sequence[Result], target: str) -> Table:
    """Exact-match percentages, with the restricted score behind a slash where it differs."""
    out = Table(title=f"fine-tuned on {target}: exact match of generated answers, % / restricted to the task's answers")
    out.add_column("")
    for result in results:
        out.add_column(result["label"], justify="right")

    def row(name: str, *cells: str, section: bool = False) -> None:
        out.add_row(name, *cells, end_section=section)

    for task in PRETRAINED_TASKS:
        row(task, *(_score(r, task) for r in results), section=task == list(PRETRAINED_TASKS)[-1])
    row(f"target: {target}", *(_score(r, target) for r in results))
    row("P, mean of the pre-trained", *(f"{r['P']:.1f} / {r['P_restricted']:.1f}" for r in results))
    row("Avg, target included", *(f"{r['Avg']:.1f}" for r in results))
    row("H(P, T)", *(f"{r['H']:.1f}" for r in results), section=True)
    for name in results[0]["effective_rank"]:
        row(f"effective rank, {name}", *(f"{r['effective_rank'][name]:.1f}" for r in results))
    row("numbers trained", *(f"{r['trained']:,}" for r in results))
    row("seconds of training", *(f"{r['seconds']:.0f}" for r in results))
    return out


def _score(result: Result, task: str) -> str:
    exact, restricted = result["exact"][task], result["restricted"].get(task)
    return f"{exact:.1f}" if restricted is None or restricted == exact else f"{exact:.1f} / {restricted:.1f}"
