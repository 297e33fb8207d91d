"""`run --preset`: the claim in the small, with its controls and several seeds, and first what it takes."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from reproductions.methods import METHODS
from reproductions.paper.config import load_experiment, load_preset
from reproductions.paper.run.estimate import CARDS, copies, downloads, estimate
from reproductions.paper.run.rows import RowsFailedError, run_rows
from reproductions.shared.fields import ConfigError


def run_preset(
    name: str, model: str | None, overrides: Sequence[str], results: Path, *, smoke: bool, console: Console
) -> None:
    """Tell what a preset takes, and do its rows, seed by seed.

    Raises:
        ConfigError: no such preset, or settings that cannot be used.
        RowsFailedError: some rows failed.
    """
    path, preset = load_preset(name)
    key = f"{path}@{model}" if model else str(path)
    if any(override.startswith("seed=") for override in overrides):
        raise ConfigError(f"--preset {name} has seeds of its own ({', '.join(map(str, preset.seeds))})")
    tell(name, key, overrides, console)
    failed = []
    for i, seed in enumerate(preset.seeds):
        # What trains nothing is the same for every seed.
        methods = [method for method in preset.rows if METHODS[method].trains or i == 0]
        try:
            run_rows({key: methods}, [*overrides, f"seed={seed}"], results, smoke=smoke, console=console)
        except RowsFailedError as error:
            failed.append(f"seed {seed}: {error}")
    if failed:
        raise RowsFailedError("\n".join(failed))


def tell(name: str, key: str, overrides: Sequence[str], console: Console) -> None:
    """Print hours, memory, disk and what is fetched, for the published size of the model."""
    _, preset = load_preset(name)
    experiment, card = load_experiment(key, overrides), CARDS[preset.card]
    found = {method: estimate(experiment, method, preset.card) for method in preset.rows}
    times = {method: len(preset.seeds) if METHODS[method].trains else 1 for method in preset.rows}
    hours = sum(times[method] * row.hours for method, row in found.items())
    memory, worst = max((row.memory, method) for method, row in found.items())
    disk = sum(times[method] * row.disk for method, row in found.items()) + max(r.checkpoints for r in found.values())
    fetched, copied = (sum(of(experiment, preset.rows).values()) for of in (downloads, copies))
    console.print(
        f"{experiment.title}: {preset.about}\n{len(preset.rows)} rows, {len(preset.seeds)} seeds, "
        f"{len(experiment.tasks)} tasks. About {hours:.1f} hours on one {card.title} ({preset.card}), at most "
        f"{memory / 1e9:.0f} GB of its memory ({worst}) and {max(r.host for r in found.values()) / 1e9:.0f} GB of the "
        f"host's; {fetched:.1f} GB to fetch, {copied:.1f} GB for the copy that `datasets` makes of the data, "
        f"{disk / 1e9:.1f} GB of results and of checkpoints. Estimated, not measured; what was done before is not done "
        "again.",
        soft_wrap=True,
    )
    if memory > card.memory:
        console.print(f"{worst} does not fit into {preset.card}.", style="red", soft_wrap=True)
