"""The ways of fine-tuning that are compared: an optimizer at a learning rate, perhaps wrapped, perhaps with help.

`d = g + αv` takes one backward pass of L + αL_v. Committed results of αv are of two passes: the same update, but for
rounding, so a new run does not repeat their bits.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from reproductions.methods import METHODS as REGISTRY
from reproductions.methods.model_dowser import PROMPTS, least_important
from reproductions.methods.mofo import filter_by_momentum
from reproductions.methods.spider import weigh_by_importance
from reproductions.mini.experiment.scored_masks import Batches, scored_mask
from reproductions.mini.rules import Global, History, Reference
from torch_mdgd import (
    MDGD,
    Anchor,
    DriftBudget,
    Given,
    Magnitude,
    MDGDOptimizer,
    ProtectInputs,
    Random,
    Rule,
    TopK,
    VisualTap,
)
from torch_mdgd.models.parts import text_decoder

Base = Literal["adamw", "sgd"]
Phi = Literal["renewed", "kept"]
Calibration = Literal["random", "questions", "own", "running"]

GONE = ("tensor", "batches")
"""Masks that cannot be made any more: of each tensor by itself, and from eight batches."""


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: what the command line calls it.
        label: what tables and figures call it.
        learning_rate: peak rate; None trains nothing.
        wrap: the rule and its settings, see `rule_of`; None captures no gradients.
        fraction: of the trainable numbers that may move.
        mask: how those are chosen: "similarity" as in MDGD-GM; "random" or "magnitude"; "dowser" as in Model-Dowser, by
            prompts of the kind of `calibration`; a score of `scored_masks`; or "all" of them, which is no mask but lets
            a history keep its directions in full. Those of `GONE` have results that can be read.
        inputs: in step space, the share of each layer's visual inputs that is kept from change, in place of the
            visual gradient; see `ProtectInputs`.
        layers: of which layers.
        base: the optimizer, "adamw" (no weight decay) or "sgd" (momentum 0.9, gradients clipped to
            length 1).
        pull: weight of L2-SP's pull towards the pre-trained weights; with adapters everywhere, of ‖ΔW‖².
        replay: share of each batch that is examples of the pre-trained tasks.
        lora: rank of adapters, scaled by 2; 0 for none.
        adapters: where they are: "paper", on q and k of the language model, the connector being trained in full; or
            "all", on all linear layers of the language model and the connector; or "corda", there too, beginning where
            what `memory` tells is not.
        tailor: ω of Model Tailor after training; None for no tailoring.
        connector: what Model Tailor makes of the projector: "revert" as published, or "keep".
        anchor: strength of an `Anchor` around the rule; 0 for none.
        relative: whether that is relative to the size of a layer's answers.
        rank: how many directions of each input the anchor holds exactly; None for the whole C.
        tokens: what its C is made of.
        calibration: what the anchor is made of, see `calibration.prompts`; "running" for the prompts of the first
            steps. So are the questions that the pre-trained model answers itself, see `memory` and `kl_at`.
        trained: which parts; "last" for the last decoder layers and the projector, or in these layers "attention" or
            "gate-up" alone.
        features: whose drift the visual loss is: layer -1 is the last, i the output of the i-th.
        loss: what the task loss is replaced with; "plain" for nothing.
        kl: weight of the divergence from the pre-trained model.
        kl_at: where: at the task's "answers", or at those that the pre-trained model gave to other "questions" about
            the task's pictures.
        kl_of: of which tokens' probabilities: the whole "vocabulary", or without the right token, "non-target".
        memory: what is told of the pre-trained tasks to replay, `laplace` and CorDA: "old" examples, or the pre-trained
            model's own "answers".
        momentum: share of each weight's numbers, those with the largest momentum, that a step moves.
        mix: λ of WiSE-FT after training; None for none of it.
        drop: p of DARE after training.
        shrink: scale of DG-Hard's threshold after training.
        spider: whether what steps change is weighed as SPIDER does it.
        laplace: weight of LaLoRA's pull on adapters.
        kept: share of each weight's singular directions, the largest, that OSF keeps as they are; None trains weights
            as they are.
    """

    name: str
    label: str
    learning_rate: float | None
    wrap: dict[str, Any] | None = None
    fraction: float = 1.0
    mask: str = "similarity"
    inputs: float | None = None
    layers: Literal["all", "decoder", "projector", "attention", "mlp"] = "all"
    base: Base = "adamw"
    pull: float = 0.0
    replay: float = 0.0
    lora: int = 0
    tailor: float | None = None
    connector: Literal["revert", "keep"] = "revert"
    anchor: float = 0.0
    relative: bool = True
    rank: int | None = 8
    tokens: Literal["prompt", "image", "all"] = "prompt"
    calibration: Calibration = "random"
    adapters: Literal["paper", "all", "corda"] = "paper"
    trained: Literal["last", "attention", "gate-up"] = "last"
    features: int = -1
    loss: Literal["plain", "eaft", "dft"] = "plain"
    kl: float = 0.0
    kl_at: Literal["answers", "questions"] = "answers"
    memory: Literal["old", "answers"] = "old"
    momentum: float = 1.0
    mix: float | None = None
    drop: float | None = None
    shrink: float | None = None
    kl_of: Literal["vocabulary", "non-target"] = "vocabulary"
    spider: bool = False
    laplace: float = 0.0
    kept: float | None = None

    def __post_init__(self) -> None:
        of_the_loss = self.pull or self.kl or self.laplace or self.loss != "plain"
        if self.has_rule and (of_the_loss or self.momentum < 1 or self.spider):
            raise ValueError(
                f"{self.name}: a rule makes the step, so pull, kl, laplace, loss, momentum and spider would do nothing"
            )

    def optimizer(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Callable[[], Batches] = tuple,
        prompts: Callable[..., Batches] = tuple,
    ) -> Optimizer:
        """The optimizer over these parameters of the model, wrapped at their present values.

        Args:
            model: which is trained.
            parameters: the trained ones.
            batches: draws training batches, for a mask that is scored before training.
            prompts: draws prompts, for an anchor that is calibrated, or a mask that is probed, before training; of the
                latter `batches` many, of `size` rows.
        """
        assert self.learning_rate is not None
        base: Optimizer
        if self.base == "sgd":
            base = SGD(parameters, lr=self.learning_rate, momentum=0.9)
        else:
            base = AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        if self.momentum < 1:
            filter_by_momentum(base, self.momentum)
        if self.spider:
            weigh_by_importance(base)
        if not self.has_rule and self.fraction == 1:
            return base
        mask = self._mask(model, parameters, batches, prompts)
        rule: Rule | None = None if self.wrap is None else rule_of(self.wrap, model)
        if self.inputs is not None:
            rule = _inputs(model, self.layers, self.inputs)
        if self.anchor:
            rule = Anchor(model, self.anchor, rank=self.rank, tokens=self.tokens, relative=self.relative, rule=rule)
            if self.calibration != "running":
                rule.calibrate(prompts(), VisualTap.for_model(model).mask)
        with warnings.catch_warnings():
            # Norms are trained freely in every system.
            warnings.filterwarnings("ignore", "Anchor holds linear layers")
            return MDGDOptimizer(base, rule, mask=mask, compact=self.fraction < 1)

    @property
    def has_rule(self) -> bool:
        """Whether gradients are captured, and the optimizer steps on what a rule makes of them."""
        return self.wrap is not None or self.anchor > 0

    @property
    def asks(self) -> bool:
        """Whether prompts of the kind of `calibration` are put to the model before it is trained."""
        answered = (self.replay or self.laplace or self.adapters == "corda") and self.memory == "answers"
        return bool(self.anchor or answered or (self.kl and self.kl_at == "questions") or self.mask == "dowser")

    def _mask(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batches: Callable[[], Batches],
        prompts: Callable[..., Batches],
    ) -> Any:
        if self.mask == "all":
            return Given([torch.ones_like(p, dtype=torch.bool) for p in parameters])
        if self.fraction == 1:
            return None
        if self.mask in GONE:
            raise ValueError(f"{self.name}: masks of kind {self.mask!r} are there no more, only their results are")
        if self.mask == "dowser":
            single = prompts(batches=PROMPTS, size=1)
            return Given(least_important(model, parameters, single, self.fraction, probes=1))
        published = {
            "similarity": TopK(self.fraction),
            "random": Random(self.fraction),
            "magnitude": Magnitude(self.fraction),
        }
        return published.get(self.mask) or scored_mask(self.mask, self.fraction, model, parameters, batches())

    def with_settings(self, **settings: Any) -> "Method":
        """The same method with other settings: its own fields, or the rule's."""
        own = {name: value for name, value in settings.items() if name in _FIELDS}
        wrap = {name: value for name, value in settings.items() if name not in _FIELDS}
        if wrap and self.wrap is None:
            raise ValueError(f"{self.name} has no rule, so it has no setting {next(iter(wrap))!r}")
        return replace(self, wrap=None if self.wrap is None else self.wrap | wrap, **own)

    @property
    def settings(self) -> dict[str, Any]:
        """What was set, for tables: the learning rate, the rule's, and the fields that are not default."""
        told = ("name", "label", "learning_rate", "wrap", "fraction")
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in told}
        default = {f.name: f.default for f in fields(self)}
        changed = {name: value for name, value in others.items() if value != default[name]}
        return {"learning_rate": self.learning_rate, **(self.wrap or {}), "fraction": self.fraction, **changed}


def rule_of(settings: Mapping[str, Any], model: nn.Module) -> Rule:
    """The rule that settings tell: that of a registered method, or one of this experiment's own.

    They are data, since results are found again by them: "update", "space" and "scope" choose the method, "history" the
    rule of step space, "drift_budget" puts a budget around it, and the others are the method's settings.
    """
    own = dict(settings)
    form, budget = tuple(own.pop(name, None) for name in ("update", "space", "scope")), own.pop("drift_budget", None)
    history = own.pop("history", 1)
    if form in _OWN:
        rule = _OWN[form](**own)
    elif history > 1:
        rule = History(history, **own)
    else:
        rule = registered("fine-tune-lv" if "every" in own else _REGISTERED[form], own, model)
    return rule if budget is None else DriftBudget(rule, budget)


def registered(name: str, settings: Mapping[str, Any], model: nn.Module) -> Rule:
    """The rule of a registered method; of αv alone, which has no other weight, a weight of r that is 0 is left out."""
    method = REGISTRY[name]
    known = {field.name for field in fields(method.Settings)}
    rule = method(method.Settings(**{key: x for key, x in settings.items() if key in known or x})).rule(model)
    assert rule is not None
    return rule


_REGISTERED: Mapping[tuple[str | None, ...], str] = {
    (None, None, None): "mdgd",
    ("project", None, None): "project",
    ("project", "step", None): "step",
}
_OWN: Mapping[tuple[str | None, ...], Callable[..., Rule]] = {
    ("reference", None, None): Reference,
    (None, None, "global"): lambda **weights: Global(MDGD(**weights)),
}


def _inputs(model: Any, layers: str, energy: float) -> Rule:
    if layers in ("all", "projector"):
        return registered("inputs", {"energy": energy, "parts": {"projector": "connector"}.get(layers, layers)}, model)
    decoder: Any = text_decoder(model)
    parts: dict[str, list[nn.Module]] = {
        "decoder": [decoder],
        "attention": [layer.self_attn for layer in decoder.layers],
        "mlp": [layer.mlp for layer in decoder.layers],
    }
    return ProtectInputs(model, energy, parts=parts[layers])


_FIELDS = {f.name for f in fields(Method)}

PRETRAINED = Method("zero-shot", "Pre-trained", None)
# Chosen by `python -m reproductions mini tune`, which sees validation examples and its own seeds alone: the best
# H(P, T) of each method's candidates. The first AdamW has the rate with the best target score, which is what one
# tunes for who does not measure forgetting; the second is the fair rival.
METHODS = {
    method.name: method
    for method in (
        PRETRAINED,
        Method("fine-tune", "AdamW", 2e-3),
        Method("fine-tune-low", "AdamW, lower rate", 5e-4),
        Method("mdgd", "MDGD", 2e-3, {"align": 10.0, "regularize": 1.0}),
        Method("align", "AdamW + αv", 2e-3, {"align": 10.0, "regularize": 0.0}),
        Method("anchor", "AdamW + anchor", 1e-3, anchor=10.0),
        Method("mdgd-gm", "MDGD-GM, 10 %", 1e-2, {"align": 10.0}, fraction=0.1),
        Method("step", "decoupled step", 1e-3, {"update": "project", "space": "step", "restore": 0.05}),
    )
}
