"""Cells by architecture, and the same target and optimizer over all of them, where models are a sample."""

from collections.abc import Sequence
from dataclasses import replace

from reproductions.mini.experiment.cells import ARCHITECTURES, CELLS, Cell
from reproductions.mini.experiment.outcomes import CellOutcomes, Outcome
from reproductions.mini.experiment.systems import SYSTEMS

ALL = "all"
"""Stands for the architecture of a cell that holds those of several."""


def by_architecture(cells: Sequence[CellOutcomes]) -> dict[str, list[CellOutcomes]]:
    """Cells with results by the title of their architecture, and last, if there are several, over all of them.

    Other targets than those of `CELLS`, sequences and long trainings stand by themselves.
    """
    found: dict[str, list[CellOutcomes]] = {}
    for cell in (cell for cell in cells if cell.systems):
        found.setdefault(_group(cell.cell), []).append(cell)
    together = pooled(cells)
    return found | ({"all models": together} if together else {})


def _group(cell: Cell) -> str:
    title = ARCHITECTURES.get(cell.architecture, cell.architecture)
    usual = not cell.first and not cell.long and cell.target in {c.target for c in CELLS}
    return title if usual else f"{title}, other cells"


def pooled(cells: Sequence[CellOutcomes]) -> list[CellOutcomes]:
    """The systems that cells of several architectures have in common, target by target and optimizer by optimizer.

    A system is as it was tuned in each cell. Seeds are numbered anew, since those of two cells have nothing in common.
    """
    groups: dict[Cell, list[CellOutcomes]] = {}
    for cell in (cell for cell in cells if cell.systems):
        groups.setdefault(replace(cell.cell, architecture=ALL, rate=1.0), []).append(cell)
    return [_merged(place, own) for place, own in groups.items() if len({x.cell.architecture for x in own}) > 1]


def _merged(place: Cell, cells: Sequence[CellOutcomes]) -> CellOutcomes:
    most = 1 + max(seed for cell in cells for outcome in cell.systems.values() for seed in outcome.runs)
    systems = {}
    for name, system in SYSTEMS.items():
        if all(name in cell.systems for cell in cells):
            runs = {
                i * most + seed: run for i, cell in enumerate(cells) for seed, run in cell.systems[name].runs.items()
            }
            systems[name] = Outcome(system, None, runs, ())
    return CellOutcomes(place, systems, (), {}, {}, {}, {})
