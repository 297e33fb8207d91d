"""Configurations: one TOML file an experiment, checked against these classes, with overrides from the command line.

An unknown key, a wrong type or a number out of range is an error that names the file and the key.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from reproductions.methods import METHODS, Method
from reproductions.methods.model_tailor import ModelTailor
from reproductions.paper.data import DATASETS
from reproductions.paper.models import MODELS
from reproductions.shared.fields import ConfigError, build, limited

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXPERIMENTS, PRESETS = (Path(__file__).parent / name for name in ("experiments", "presets"))
CARDS = ("24 GB", "48 GB", "80 GB")
"""GPUs by their memory."""
WHEREABOUTS = (
    "data.source", "data.organisation", "training.workers", "training.save_every", "training.log_every",
    "training.report_to", "training.checkpointing", "training.reference", "training.shard",
    "evaluation.batch",
)  # fmt: skip
"""Settings that results do not depend on: a run may be taken up with others."""


@dataclass(frozen=True)
class Training:
    """How the target task is learned.

    The paper names bfloat16 and two A100; the rest are the published settings of Model Tailor's fine-tuning scripts.

    Attributes:
        epochs: over the target's training split.
        steps: optimizer steps in place of epochs; 0 for epochs.
        examples: of the training split, drawn with the experiment's seed; 0 for all.
        captions: of each picture that are taught, where a data set has several; the first alone by default.
        learning_rate: the peak.
        schedule: of the learning rate, by transformers' name.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; 0 for none.
        batch: examples in a pass.
        accumulation: passes in a step.
        optimizer: "adamw", or "adamw8bit" for moments of 8 bits, by bitsandbytes.
        quantize: which frozen Linear layers are in 4 bits (NF4 of bitsandbytes, Dettmers et al. 2023, arXiv 2305.14314)
            while it trains: "none", "vision", "decoder" or "all"; what is measured is in full.
        reference: where rules hold φ: on the "device" or, for copies over the bus at each pass at φ, on the "cpu".
            That of a compact mask stays on the device.
        shard: in several processes, split weights, gradients and states over them (FSDP2) in place of a copy on each.
        checkpointing: compute activations again in the backward pass, to spare memory.
        save_every: steps between checkpoints.
        log_every: steps between lines of the log.
        workers: processes that prepare pictures, in evaluation too.
        report_to: "tensorboard", which is written beside the log file, or another of transformers' integrations;
            "none" for the log file alone.
    """

    epochs: float = limited(1.0, least=0)
    steps: int = limited(0, least=0)
    examples: int = limited(0, least=0)
    captions: int = limited(1, least=1)
    learning_rate: float = limited(1e-4, least=0)
    schedule: str = limited("cosine", choices=("constant", "linear", "cosine", "constant_with_warmup"))
    warmup: float = limited(0.03, least=0, most=1)
    weight_decay: float = limited(0.0, least=0)
    clip: float = limited(1.0, least=0)
    batch: int = limited(4, least=1)
    accumulation: int = limited(16, least=1)
    optimizer: str = limited("adamw", choices=("adamw", "adamw8bit"))
    quantize: str = limited("none", choices=("none", "vision", "decoder", "all"))
    reference: str = limited("device", choices=("device", "cpu"))
    shard: bool = False
    checkpointing: bool = True
    save_every: int = limited(50, least=1)
    log_every: int = limited(5, least=1)
    workers: int = limited(4, least=0)
    report_to: str = "tensorboard"


@dataclass(frozen=True)
class Evaluation:
    """How tasks are measured.

    Attributes:
        batch: examples in a pass.
        examples: of each task, the same ones for every method and seed; 0 for all.
        answer_tokens: longest answer; 0 for what each data set allows.
        split: "validation" for examples that tables are not measured on, to choose settings by.
        beams: of the search for an answer; 1 is greedy. MiniCPM-V-2.0's own chat takes 3.
        repetition_penalty: 1 for none. MiniCPM-V-2.0's own chat takes 1.2.
        rank_examples: whose image tokens the effective rank is of.
        feature_examples: of the target, whose features are kept for t-SNE.
    """

    batch: int = limited(16, least=1)
    examples: int = limited(0, least=0)
    answer_tokens: int = limited(0, least=0)
    split: str = limited("evaluation", choices=("evaluation", "validation"))
    beams: int = limited(1, least=1)
    repetition_penalty: float = limited(1.0, least=1)
    rank_examples: int = limited(64, least=1)
    feature_examples: int = limited(500, least=1)


@dataclass(frozen=True)
class Masking:
    """Figures 3b and 3c: short fine-tunings with MDGD-GM at several ratios.

    Attributes:
        ratios: of the numbers that may move.
        steps: optimizer steps at each.
        batches: that cos(g̃, g̃₀) and L_v are means over, after training.
    """

    ratios: tuple[float, ...] = limited((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), least=1e-6, most=1)
    steps: int = limited(25, least=1)
    batches: int = limited(8, least=1)


@dataclass(frozen=True)
class Data:
    """Where data sets come from.

    Attributes:
        source: folder with one folder a data set, named as the data sets are; splits that it lacks, or all if this is
            empty, come from the hub.
        organisation: whose copies on the hub; if empty, lmms-lab-encoder's and else lmms-lab's, as it was called.
        revisions: commits of the hub's repositories, by "data set/split"; a folder of results keeps to those that it
            began with, in `revisions.json`.
        options: of data sets, by name: see the fields of each.
    """

    source: str = ""
    organisation: str = ""
    revisions: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One half of a table: a model, what it is fine-tuned on and what it could do before.

    Attributes:
        name: as on the command line.
        title: as in tables and figures.
        model: one of ``MODELS``.
        source: its weights: a folder or a repository on the hub; the published ones if empty.
        trust_remote_code: run code that comes with the weights.
        layers: how many of the last decoder layers are trained, with the connector.
        target: the data set to fine-tune on.
        pretrained: data sets that the model could answer before.
        dtype: of the weights. Numbers that are trained are float32, under autocast.
        seed: of batches and everything random.
        training: how.
        evaluation: how.
        masking: how.
        data: where from.
        methods: settings of methods, by name; see each method's own.
    """

    name: str
    title: str
    model: str = limited(MISSING, choices=tuple(MODELS))
    layers: int = limited(MISSING, least=1)
    target: str = ""
    pretrained: tuple[str, ...] = ()
    source: str = ""
    trust_remote_code: bool = False
    dtype: str = limited("bfloat16", choices=("bfloat16", "float32"))
    seed: int = limited(0, least=0)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    masking: Masking = field(default_factory=Masking)
    data: Data = field(default_factory=Data)
    methods: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All that is measured, in the order of the table."""
        return (*self.pretrained, self.target)

    def require_layers_of(self, weights: str, depth: int) -> None:
        """Raise ConfigError if more layers are to be trained than these weights have."""
        if self.layers > depth:
            raise ConfigError(f"{self.name}: layers must be at most the {depth} of {weights}, got {self.layers}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """Rows and seeds that belong together, under ``[preset]`` of an experiment's file.

    Attributes:
        about: what it is for, in a sentence.
        rows: methods, in the order of the table.
        seeds: of each row that trains.
        card: one of ``CARDS`` that it is made for.
    """

    about: str = ""
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = limited((0,), least=0)
    card: str = limited("24 GB", choices=CARDS)


PRESET_NAMES = ("hour", "day")


def load_preset(name: str) -> tuple[Path, Preset]:
    """The file of a preset, which is an experiment's, and what it asks for.

    Raises:
        ConfigError: no such preset, or one that cannot be used.
    """
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESET_NAMES)}")
    preset = build(Preset, _read(path).get("preset", {}), path.name, "preset.")
    for method in preset.rows:
        if method not in METHODS:
            raise ConfigError(f"{path.name}: preset.rows: no method {method!r}; there are {', '.join(METHODS)}")
    return path, preset


def run_name(method: str, seed: int) -> str:
    """The folder of a row: the method's name, and the seed where it is not 0."""
    return f"{method}-seed{seed}" if seed else method


def method_and_seed(folder: str) -> tuple[str, int]:
    """What a folder of :func:`run_name` is of."""
    method, marked, seed = folder.rpartition("-seed")
    return (method, int(seed)) if marked and seed.isdigit() else (folder, 0)


def experiment_names() -> list[str]:
    """Experiments that come with the repository, in the order of the tables."""
    order = ("llava-flickr30k", "llava-okvqa", "minicpm-pathvqa", "minicpm-textcaps")
    found = {path.stem for path in EXPERIMENTS.glob("*.toml")}
    return [*(name for name in order if name in found), *sorted(found - set(order))]


def load_experiment(
    name: str | Path, overrides: Sequence[str] = (), more: Mapping[str, Any] | None = None
) -> Experiment:
    """Read and check an experiment.

    Args:
        name: of one in ``experiments/``, or the path of a TOML file; behind it perhaps "@" and another model, such as
            "llava-okvqa@qwen3-vl-2b".
        overrides: such as ``training.learning_rate=1e-5`` or ``methods.mdgd.align=10``; values are TOML, and what is
            no TOML is taken as text.
        more: values laid over the file's before the overrides, nested as the file is.

    Raises:
        ConfigError: no such experiment, or one that cannot be used.
    """
    name, _, other = str(name).partition("@")
    path = Path(name) if name.endswith(".toml") else EXPERIMENTS / f"{name}.toml"
    if not path.is_file():
        own = ", or a TOML file of your own"
        raise ConfigError(f"no experiment {name!r}; there are {', '.join(experiment_names())}{own}")
    values = _read(path)
    values.pop("preset", None)
    model = values.get("model")
    if other:
        values["model"] = other
    _lay_over(values, more or {})
    for override in overrides:
        _override(values, override)
    experiment = build(Experiment, {"name": path.stem, **values}, path.name)
    if model not in (None, experiment.model) and "name" not in values:
        # Results of another model must not stand beside the numbers that were published for the first.
        experiment = replace(
            experiment, name=f"{path.stem}-{experiment.model}", title=f"{experiment.title}, with {experiment.model}"
        )
    _check_names(experiment, path.name)
    return experiment


def method_of(experiment: Experiment, name: str) -> Method:
    """A method with the experiment's settings."""
    kind = METHODS[name]
    return kind(build(kind.Settings, experiment.methods.get(name, {}), experiment.name, f"methods.{name}."))


def methods_of(model: str) -> list[str]:
    """The rows of the tables for a model: Model Tailor was published for LLaVA alone."""
    return [m.name for m in METHODS.values() if m.in_paper and (m is not ModelTailor or model.startswith("llava"))]


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """The keys, such as "training.steps", at which two nested dictionaries differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [prefix.removesuffix(".")]
    return [
        found
        for key in dict.fromkeys([*before, *now])
        for found in differences(before.get(key), now.get(key), f"{prefix}{key}.")
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: not TOML: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set: {override!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    nested: dict[str, Any] = {}
    *tables, last = key.split(".")
    inner = nested
    for table in tables:
        inner = inner.setdefault(table, {})
    inner[last] = value
    _lay_over(values, nested)


def _lay_over(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def _check_names(experiment: Experiment, where: str) -> None:
    source, weights = experiment.data.source, experiment.source
    if source and not Path(source).is_dir():
        raise ConfigError(f"{where}: data.source: there is no folder {source}")
    # The hub has none of such a name.
    if weights.startswith(("/", ".", "~")) and not (Path(weights) / "config.json").is_file():
        raise ConfigError(f"{where}: source: {weights} is no folder with a config.json")
    if not experiment.pretrained:
        raise ConfigError(f"{where}: pretrained is missing")
    for key, name in [("target", experiment.target), *(("pretrained", name) for name in experiment.pretrained)]:
        if name not in DATASETS:
            raise ConfigError(f"{where}: {key}: no data set {name!r}; there are {', '.join(DATASETS)}")
    if DATASETS[experiment.target].training is None:
        raise ConfigError(f"{where}: target: {experiment.target} has no training split")
    if not experiment.training.epochs and not experiment.training.steps:
        raise ConfigError(f"{where}: training.epochs and training.steps are both 0, so that nothing is trained")
    for name, values in experiment.data.options.items():
        if name not in DATASETS:
            raise ConfigError(f"{where}: data.options: no data set {name!r}; there are {', '.join(DATASETS)}")
        build(type(DATASETS[name]), values, where, f"data.options.{name}.")
    splits = [f"{name}/{split}" for name, data in DATASETS.items() for split in data.splits]
    for name in experiment.data.revisions:
        if name not in splits:
            raise ConfigError(f"{where}: data.revisions: no split {name!r}; there are {', '.join(splits)}")
    for name, values in experiment.methods.items():
        if name not in METHODS:
            raise ConfigError(f"{where}: methods: no method {name!r}; there are {', '.join(METHODS)}")
        build(METHODS[name].Settings, values, where, f"methods.{name}.")
