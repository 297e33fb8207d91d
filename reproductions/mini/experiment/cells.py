"""The cells of the study: what is learned, with which optimizer, by which pre-trained models."""

from dataclasses import dataclass

from reproductions.mini.experiment.methods import Base, Phi


@dataclass(frozen=True)
class Cell:
    """A part of the study: a target, a base optimizer, and the models that it begins with.

    Attributes:
        target: "digits", "caption" or "tiles".
        base: "adamw" or "sgd".
        steps: of every system.
        rate: multiplies the learning rates of the table, which are AdamW's for digits.
        first: other targets, which are trained in the same way before, one after the other, as many steps each.
        reference: what φ is for each of them: "renewed", the weights that it begins with; or "kept", those of
            pre-training.
        architecture: of its pre-trained models, a name in `model.checkpoint.CHECKPOINTS`.
    """

    target: str
    base: Base
    steps: int
    rate: float = 1.0
    first: tuple[str, ...] = ()
    reference: Phi = "renewed"
    architecture: str = "llava"

    @property
    def name(self) -> str:
        others = (self.reference, "renewed"), (self.architecture, "llava")
        long = ["long"] if self.long else []
        return "-".join([*self.first, self.target, self.base, *long, *(own for own, usual in others if own != usual)])

    @property
    def long(self) -> bool:
        """Whether its trainings are long, and its results apart from those of the same target."""
        return self.steps == LONG

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        targets = " then ".join(_TITLES[target] for target in (*self.first, self.target))
        kept = (*((f"{LONG} steps",) if self.long else ()), *(("φ kept",) if self.reference == "kept" else ()))
        own = () if self.architecture == "llava" else (ARCHITECTURES.get(self.architecture, self.architecture),)
        return ", ".join((targets, "AdamW" if self.base == "adamw" else "SGD", *kept, *own))


_TITLES = {"digits": "digits", "caption": "captions", "tiles": "tiles"}
ARCHITECTURES = {"llava": "LLaVA", "llava-10m": "LLaVA, 10 M", "smolvlm": "SmolVLM", "all": "all models"}
"""What tables call them."""

LONG = 900

CELLS: tuple[Cell, ...] = (
    Cell("digits", "adamw", 200),
    Cell("caption", "adamw", 300, rate=2),
    Cell("digits", "sgd", 200, rate=50),
    Cell("caption", "sgd", 300, rate=100),
)

SEQUENCES: tuple[Cell, ...] = (
    Cell("tiles", "adamw", 200, rate=2, first=("digits", "caption")),
    Cell("tiles", "adamw", 200, rate=2, first=("digits", "caption"), reference="kept"),
)
"""One target after another: forgetting adds up."""

WIDER: tuple[Cell, ...] = (
    Cell("tiles", "adamw", 300, rate=2),
    Cell("digits", "adamw", 200, architecture="smolvlm"),
    Cell("caption", "adamw", 300, rate=2, architecture="smolvlm"),
    Cell("digits", "adamw", 200, architecture="llava-10m"),
    Cell("caption", "adamw", LONG, rate=2),
)
"""A third target, another architecture, a larger model, a longer training: whether what others show is theirs alone."""

ALL_CELLS: tuple[Cell, ...] = (*CELLS, *SEQUENCES, *WIDER)
TITLES = {cell.name: cell.title for cell in ALL_CELLS}


def cells_of(architecture: str, sequence: bool, target: str | None, base: str | None, long: bool = False) -> list[Cell]:
    """The cells of an architecture, sequences or single targets, long or not, with this target and base optimizer.

    Without a target these are digits and captions, and of sequences all.

    Raises:
        ValueError: there is none.
    """
    wanted = (target,) if target else ("digits", "caption", "tiles") if sequence else ("digits", "caption")
    found = [
        cell
        for cell in ALL_CELLS
        if cell.architecture == architecture
        and (bool(cell.first), cell.long) == (sequence, long)
        and cell.target in wanted
        and base in (None, cell.base)
    ]
    if not found:
        wished = f"target {' or '.join(wanted)} and optimizer {base or 'adamw or sgd'}"
        raise ValueError(f"there is no cell of {architecture} with {wished}")
    return found
