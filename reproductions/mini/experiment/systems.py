"""The systems of the study. Each is data: how it trains, what is tried for it, and what is varied for the frontier."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from reproductions.mini.experiment.cells import Cell
from reproductions.mini.experiment.methods import PRETRAINED, Base, Method

Grid = Mapping[str, tuple[Any, ...]]

CANDIDATES = 4
"""How many settings are tried for every system, so that none is tuned harder than another."""

SHARES = ("inputs", "tailor", "mix", "drop", "momentum", "kept")
"""Settings that lie between 0 and 1, and have no next value by ratios."""

SHORT = {
    "learning_rate": "rate",
    "align": "α",
    "pull": "weight",
    "tailor": "ω",
    "inputs": "energy",
    "drift_budget": "budget",
    "anchor": "strength",
    "kl": "weight",
    "mix": "λ",
    "drop": "p",
    "momentum": "share",
    "shrink": "scale",
    "laplace": "weight",
    "kept": "kept",
}
"""What tables call settings, where that is not their name."""


MARKS = {"": "", "examples": "†", "questions": "‡"}
"""Of what a system knows of the old tasks."""


@dataclass(frozen=True)
class System:
    """A row of the study's tables.

    Attributes:
        method: how it trains; its settings are the ones before anything was chosen.
        about: what it is there to show.
        grid: values that are tried in all combinations, by setting; the learning rate is multiplied by the cell's.
        choose: by what the settings are chosen on validation examples: "H", the harmonic mean of what is kept and the
            target score; "T", the target score alone; or the name of a system whose target score is to be met, with
            the lowest learning rate that meets it.
        times: what the learning rate that was chosen is multiplied with.
        knows: what it knows of the old tasks, which other systems do not: "examples", or how their "questions" are
            asked.
        core: whether it is run in every cell before any system that is not.
        frontier: a setting and its values, run around the chosen settings to draw a curve.
    """

    method: Method
    about: str
    grid: Grid = field(default_factory=dict)
    choose: str = "H"
    times: float = 1.0
    knows: str = ""
    core: bool = False
    frontier: tuple[str, tuple[Any, ...]] | None = None

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def label(self) -> str:
        return self.method.label

    @property
    def marked(self) -> str:
        """What tables call it: its label, with a mark of `MARKS` if it knows of the old tasks."""
        return " ".join(filter(None, (self.label, MARKS[self.knows])))

    def fits(self, cell: Cell) -> bool:
        """Whether it can be run there: adapters begin at each target's own weights, so their φ is never kept."""
        return cell.reference == "renewed" or not self.method.lora

    def candidates(self, base: Base, rate: float) -> list[Method]:
        """The methods that are tried for a base optimizer whose learning rates are `rate` times the table's."""
        combinations = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        return [adapted(self.method.with_settings(**chosen), base, rate) for chosen in combinations]

    def beyond(self, chosen: Method, base: Base, rate: float) -> list[Method]:
        """Where a setting was chosen at the edge of its values: the next one out, by the ratio to its neighbour.

        All other settings stay as they were chosen.
        """
        found = []
        for name in (name for name in self.grid if name not in SHARES):
            values = sorted({method.settings[name] for method in self.candidates(base, rate)})
            for edge, neighbour in ((values[0], values[1]), (values[-1], values[-2])) if len(values) > 1 else ():
                if chosen.settings[name] == edge:
                    found.append(chosen.with_settings(**{name: float(f"{edge**2 / neighbour:.4g}")}))
        return found


def adapted(method: Method, base: Base, rate: float) -> Method:
    """The method with this base optimizer and its learning rate times `rate`."""
    scaled = None if method.learning_rate is None else float(f"{method.learning_rate * rate:.4g}")
    return method.with_settings(base=base, learning_rate=scaled)


RATES = (5e-4, 1e-3, 2e-3, 4e-3)
HIGH_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
PAIR = (1e-3, 2e-3)
HIGH_PAIR = (1e-2, 2e-2)
ALPHAS = (3.0, 10.0)
ALPHA_FRONTIER = ("align", (0.3, 1.0, 3.0, 10.0, 30.0))
STRENGTHS = (3.0, 10.0)
STRENGTH_FRONTIER = ("anchor", (0.3, 1.0, 3.0, 10.0, 30.0))
LORA_PAIR = (2e-3, 4e-3)
LORA_RANK = 16
FASTER_PAIR = (2e-3, 4e-3)
"""For what takes back some of what was learned."""
MIXED = (0.5, 0.8)


def _wrapped(name: str, label: str, fraction: float = 1.0, **wrap: Any) -> Method:
    return Method(name, label, 1e-3, wrap, fraction)


def _plain(name: str, label: str, **fields: Any) -> Method:
    return Method(name, label, 1e-3, **fields)


def _everywhere(
    name: str, label: str, wrap: dict[str, Any] | None = None, lora: int = LORA_RANK, **fields: Any
) -> Method:
    return Method(name, label, 2e-3, wrap, lora=lora, adapters="all", **fields)


_ALL = (
    System(PRETRAINED, "what there is to forget", core=True),
    System(
        _plain("fine-tune", "Fine-tune"), "the rate with the best target score: one who does not look back",
        {"learning_rate": RATES}, choose="T", core=True,
        frontier=("learning_rate", (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)),
    ),
    System(
        _plain("fine-tune-low", "Fine-tune, rate by H"), "the rate chosen as every other system's settings are",
        {"learning_rate": RATES}, core=True,
    ),
    System(
        _wrapped("mdgd", "MDGD", align=10.0, regularize=1.0), "the paper: d = g + αv + βr",
        {"learning_rate": PAIR, "align": ALPHAS}, core=True, frontier=ALPHA_FRONTIER,
    ),
    System(
        _wrapped("align", "Fine-tune + αv", align=10.0, regularize=0.0), "the pull towards old features alone",
        {"learning_rate": PAIR, "align": ALPHAS}, core=True, frontier=ALPHA_FRONTIER,
    ),
    System(
        _wrapped("history", "step, history 16", update="project", space="step", history=16),
        "the optimizer's move, without its components along the last 16 visual gradients",
        {"learning_rate": RATES}, core=True, frontier=("history", (1, 4, 16, 64)),
    ),
    System(
        Method("inputs", "step, inputs", 1e-3, {"update": "project", "space": "step"}, inputs=0.9),
        "the move, without what changes layers' answers to image tokens: no visual gradient",
        {"learning_rate": PAIR, "inputs": (0.7, 0.9)}, core=True, frontier=("inputs", (0.3, 0.5, 0.7, 0.9, 0.99)),
    ),
    System(
        _wrapped("project", "g~ + αv", update="project", align=10.0), "the projection in place of the regularizer",
        {"learning_rate": PAIR, "align": ALPHAS}, core=True, frontier=ALPHA_FRONTIER,
    ),
    System(
        _wrapped("mdgd-gm", "MDGD-GM 10 %", 0.1, align=10.0), "the paper's mask: d = M ⊙ (g + αv)",
        {"learning_rate": HIGH_PAIR, "align": ALPHAS}, core=True,
    ),
    System(
        _plain("replay", "replay"), "half of each batch from the old tasks: the upper bound",
        {"learning_rate": RATES, "replay": (0.5,)}, knows="examples", core=True,
    ),
    System(
        _plain("fine-tune-matched", "Fine-tune, MDGD's T"), "the lowest rate that reaches MDGD's target score",
        {"learning_rate": RATES}, choose="mdgd", core=True,
    ),
    System(
        _wrapped("no-align", "MDGD w/o visual align", align=0.0, regularize=1.0), "the paper's ablation: α = 0",
        {"learning_rate": RATES},
    ),
    System(
        _plain("lora", "LoRA"), "adapters on q and k, rank 8, and the connector",
        {"learning_rate": (2.5e-4, 5e-4, 1e-3, 2e-3), "lora": (8,)},
    ),
    System(
        _plain("model-tailor", "Model Tailor"), "a tenth of a fine-tune on top of the old weights",
        {"learning_rate": PAIR, "tailor": (0.5, 0.8)},
    ),
    System(
        _plain("model-tailor-keep", "Model Tailor, projector kept", connector="keep"),
        "the same without taking the projector back, without which it hardly learns here",
        {"learning_rate": PAIR, "tailor": (0.5, 0.8)},
    ),
    System(
        _wrapped("step", "step, history 1", update="project", space="step"), "without what raises the visual loss now",
        {"learning_rate": RATES},
    ),
    System(
        _wrapped("restore", "step, history 16, restored", update="project", space="step", history=16, restore=0.05),
        "with a move back towards old features",
        {"learning_rate": PAIR, "restore": (0.03, 0.1)}, frontier=("restore", (0.0, 0.03, 0.1, 0.3)),
    ),
    System(
        Method(
            "inputs-projector", "step, projector's inputs", 1e-3, {"update": "project", "space": "step"},
            inputs=0.9, layers="projector",
        ),
        "the move, without what changes the projector's answers to pictures alone",
        {"learning_rate": PAIR, "inputs": (0.7, 0.9)},
    ),
    System(
        _wrapped("budget", "g~ + αv, drift budget", update="project", align=1.0, drift_budget=0.1),
        "α set by how far features may move, as a part of their size",
        {"learning_rate": PAIR, "drift_budget": (0.05, 0.1)}, frontier=("drift_budget", (0.02, 0.05, 0.1, 0.2)),
    ),
    System(
        _wrapped("reference", "r + αv", update="reference", align=10.0), "the other reading of (9): r replaces g",
        {"learning_rate": PAIR, "align": ALPHAS},
    ),
    System(
        _wrapped("global", "MDGD, global", scope="global", align=10.0, regularize=1.0),
        "inner products over all parameters at once",
        {"learning_rate": PAIR, "align": ALPHAS},
    ),
    System(
        _plain("l2-sp", "L2-SP"), "a pull towards the old weights, which knows nothing of pictures",
        {"learning_rate": PAIR, "pull": (0.01, 0.1)},
    ),
    System(
        _plain("random", "random 10 %", fraction=0.1, mask="random"), "any mask, without αv",
        {"learning_rate": HIGH_RATES},
    ),
    System(
        Method("random-align", "random 10 % + αv", 1e-2, {"align": 10.0, "regularize": 0.0}, 0.1, "random"),
        "any mask, with αv",
        {"learning_rate": HIGH_PAIR, "align": ALPHAS},
    ),
    System(
        _plain("magnitude", "magnitude 10 %", fraction=0.1, mask="magnitude"), "the largest weights, without αv",
        {"learning_rate": HIGH_RATES},
    ),
    System(
        Method("magnitude-align", "magnitude 10 % + αv", 1e-2, {"align": 10.0, "regularize": 0.0}, 0.1, "magnitude"),
        "the largest weights, with αv",
        {"learning_rate": HIGH_PAIR, "align": ALPHAS},
    ),
    System(
        _wrapped("lazy", "lazy αv", align=10.0, regularize=0.0, every=8), "αv at every 8th step, weighted 8-fold",
        {"learning_rate": PAIR, "align": ALPHAS}, frontier=ALPHA_FRONTIER,
    ),
    System(
        _plain("anchor", "anchor", anchor=3.0), "layers' answers held to random words about the task's pictures",
        {"learning_rate": PAIR, "anchor": STRENGTHS}, frontier=STRENGTH_FRONTIER,
    ),
    System(
        _plain("anchor-questions", "anchor, old questions", anchor=3.0, calibration="questions"),
        "the same to questions of the old tasks' forms: it knows how these are asked",
        {"learning_rate": PAIR, "anchor": STRENGTHS}, knows="questions",
    ),
    System(
        _plain("anchor-own", "anchor, own prompts", anchor=3.0, calibration="own"),
        "the same to the task's own prompts", {"learning_rate": PAIR, "anchor": STRENGTHS},
    ),
    System(
        _plain("anchor-running", "anchor, not calibrated", anchor=3.0, calibration="running"),
        "the same to the prompts of the first steps", {"learning_rate": PAIR, "anchor": STRENGTHS},
    ),
    System(
        _plain("anchor-image", "anchor, image tokens", anchor=3.0, tokens="image"),
        "the same as anchor, but words do not count", {"learning_rate": PAIR, "anchor": STRENGTHS},
    ),
    System(
        _plain("anchor-all", "anchor, all tokens", anchor=3.0, tokens="all", calibration="running"),
        "the same as anchor, not calibrated, but the task's answers count too",
        {"learning_rate": PAIR, "anchor": STRENGTHS},
    ),
    System(
        _plain("anchor-2", "anchor, rank 2", anchor=3.0, rank=2), "two directions of each input in place of eight",
        {"learning_rate": PAIR, "anchor": STRENGTHS},
    ),
    System(
        _plain("anchor-whole", "anchor, whole C", anchor=3.0, rank=None), "all directions of each input",
        {"learning_rate": PAIR, "anchor": STRENGTHS},
    ),
    System(
        _wrapped("anchor-lazy", "anchor + lazy αv", align=3.0, regularize=0.0, every=8).with_settings(anchor=1.0),
        "the anchor, weaker, with αv at every 8th step", {"learning_rate": PAIR, "anchor": (1.0, 3.0)},
    ),
    System(
        _everywhere("lora-all", "LoRA, all layers"), "adapters on all linear layers, rank 16: what most users train",
        {"learning_rate": RATES}, frontier=("learning_rate", (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
    ),
    System(
        _everywhere("lora-align", "LoRA, all layers + αv", {"align": 10.0, "regularize": 0.0}),
        "the same with αv", {"learning_rate": LORA_PAIR, "align": ALPHAS},
    ),
    System(
        _everywhere("lora-anchor", "LoRA, all layers + anchor", anchor=3.0),
        "the same, held to random words about the task's pictures",
        {"learning_rate": LORA_PAIR, "anchor": STRENGTHS}, frontier=STRENGTH_FRONTIER,
    ),
    System(
        _everywhere("lora-l2", "LoRA, all layers + L2", pull=0.03),
        "the anchor's control, C = I: what is added to each weight is kept small, whatever enters there",
        {"learning_rate": LORA_PAIR, "pull": (0.01, 0.03)},
    ),
    System(
        _plain("fine-tune-tenth", "Fine-tune, a tenth of the rate"),
        "a tenth of the rate with the best target score, which costs nothing",
        {"learning_rate": RATES}, choose="T", times=0.1,
    ),
    System(
        _plain("attention", "self-attention alone", trained="attention"),
        "the projections of the last layers' attention, and nothing else", {"learning_rate": RATES},
    ),
    System(
        _plain("gate-up", "gate and up alone", trained="gate-up"),
        "two of the three projections of the last layers' MLPs, and nothing else", {"learning_rate": RATES},
    ),
    System(
        _plain("wise-ft", "WiSE-FT", mix=0.5), "weights between the old ones and fine-tuned ones",
        {"learning_rate": FASTER_PAIR, "mix": MIXED},
    ),
    System(
        _wrapped("wise-align", "WiSE-FT of αv", align=10.0, regularize=0.0).with_settings(mix=0.5),
        "weights between the old ones and those of αv", {"learning_rate": FASTER_PAIR, "mix": MIXED},
    ),
    System(
        _plain("wise-anchor", "WiSE-FT of the anchor", anchor=3.0, mix=0.5),
        "weights between the old ones and those of the anchor", {"learning_rate": FASTER_PAIR, "mix": MIXED},
    ),
    System(
        _plain("dare", "DARE", drop=0.5), "most of what was learned dropped at random, the rest scaled up",
        {"learning_rate": PAIR, "drop": (0.5, 0.9)},
    ),
    System(
        _plain("dg-hard", "DG-Hard", shrink=1.0), "of each weight's change only what stands out of noise",
        {"learning_rate": PAIR, "shrink": (0.5, 1.0)},
    ),
    System(
        _plain("kl", "KL at answers", kl=1.0), "the old model's probabilities at the task's answers",
        {"learning_rate": PAIR, "kl": (1.0, 10.0)},
    ),
    System(
        _plain("kl-questions", "KL at old questions", kl=1.0, kl_at="questions", calibration="questions"),
        "the old model's probabilities at its own answers to questions of the old tasks' forms about the task's "
        "pictures",
        {"learning_rate": PAIR, "kl": (1.0, 10.0)}, knows="questions",
    ),
    System(
        _plain("kl-random", "KL at random words", kl=1.0, kl_at="questions"),
        "the same at its answers to random words", {"learning_rate": PAIR, "kl": (1.0, 10.0)},
    ),
    System(
        _everywhere("lora-all-4", "LoRA, all layers, rank 4", lora=4), "adapters on all linear layers, of rank 4",
        {"learning_rate": RATES},
    ),
    System(
        _everywhere("lora-all-64", "LoRA, all layers, rank 64", lora=64), "adapters on all linear layers, of rank 64",
        {"learning_rate": RATES},
    ),
    System(
        _plain("replay-1", "replay, 1 %"), "one example in a hundred from the old tasks",
        {"learning_rate": RATES, "replay": (0.01,)}, knows="examples",
    ),
    System(
        _plain("replay-5", "replay, 5 %"), "one in twenty", {"learning_rate": RATES, "replay": (0.05,)},
        knows="examples",
    ),
    System(
        _plain("replay-10", "replay, 10 %"), "one in ten", {"learning_rate": RATES, "replay": (0.1,)},
        knows="examples",
    ),
    System(
        _plain("self-replay", "replay of own answers", memory="answers", calibration="questions"),
        "the old model's own answers to questions of the old tasks' forms about the task's pictures",
        {"learning_rate": FASTER_PAIR, "replay": (0.05, 0.5)}, knows="questions",
    ),
    System(
        _plain("self-replay-random", "replay of own answers to random words", memory="answers"),
        "the same to random words", {"learning_rate": FASTER_PAIR, "replay": (0.05, 0.5)},
    ),
    System(
        _plain("eaft", "EAFT", loss="eaft"), "tokens of which the model is sure are learned less",
        {"learning_rate": RATES},
    ),
    System(
        _plain("dft", "DFT", loss="dft"), "tokens that the model finds unlikely are learned less",
        {"learning_rate": RATES},
    ),
    System(
        _plain("mofo", "MoFO", momentum=0.1), "of each weight the numbers with the largest momentum move",
        {"learning_rate": FASTER_PAIR, "momentum": (0.05, 0.2)},
    ),
    System(
        _wrapped("align-middle", "αv of a middle layer", align=10.0, regularize=0.0).with_settings(features=3),
        "features of the third of four layers in place of the last", {"learning_rate": PAIR, "align": ALPHAS},
    ),
    System(
        _wrapped("lazy-4", "lazy αv, every 4th", align=10.0, regularize=0.0, every=4),
        "αv at every 4th step, weighted 4-fold", {"learning_rate": PAIR, "align": ALPHAS},
    ),
    System(
        _wrapped("lazy-16", "lazy αv, every 16th", align=10.0, regularize=0.0, every=16),
        "αv at every 16th step, weighted 16-fold", {"learning_rate": PAIR, "align": ALPHAS},
    ),
    System(
        _plain("model-dowser", "Model-Dowser 10 %", fraction=0.1, mask="dowser"),
        "of each weight what matters least to what is said at random words", {"learning_rate": HIGH_RATES},
    ),
    System(
        _plain("spider", "SPIDER", spider=True),
        "numbers move by what they matter to the task beside how large they were", {"learning_rate": RATES},
    ),
    System(
        _everywhere("lora-laplace", "LaLoRA", laplace=1.0, memory="answers"),
        "LoRA held by a Laplace approximation at the old model's own answers to random words",
        {"learning_rate": LORA_PAIR, "laplace": (0.1, 1.0)},
    ),
    System(
        _everywhere("lora-laplace-old", "LaLoRA, old examples", laplace=1.0), "the same at examples of the old tasks",
        {"learning_rate": LORA_PAIR, "laplace": (0.1, 1.0)}, knows="examples",
    ),
    System(
        _everywhere("lora-mask-target", "LoRA + Mask the Target", kl=1.0, kl_of="non-target"),
        "the old model's probabilities of all but the right token at the task's answers",
        {"learning_rate": LORA_PAIR, "kl": (1.0, 10.0)},
    ),
    System(
        _everywhere("corda", "CorDA", memory="answers").with_settings(adapters="corda"),
        "adapters that begin where the old model's own answers to random words do not reach", {"learning_rate": RATES},
    ),
    System(
        _everywhere("corda-old", "CorDA, old examples").with_settings(adapters="corda"),
        "the same for examples of the old tasks, as it was published", {"learning_rate": RATES}, knows="examples",
    ),
    System(
        _plain("osf", "OSF", kept=0.5), "the largest singular directions of each weight stay",
        {"learning_rate": PAIR, "kept": (0.5, 0.8)},
    ),
)  # fmt: skip
SYSTEMS: dict[str, System] = {system.name: system for system in _ALL}
