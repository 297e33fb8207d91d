"""What the paper says and what this repository says, each as intervals held against boundaries.

A margin is what may be lost without being called a loss: 2 points of T or P, 1 point of H.
"""

from dataclasses import dataclass
from typing import Literal

MARGIN = 2.0
H_MARGIN = 1.0
BEST = "the best other system"
"""Stands for the system that is best on validation examples, by H, among those that know nothing of the old tasks.

The best of many on test examples would be so by chance too.
"""
CORRELATION = 0.5


@dataclass(frozen=True)
class Condition:
    """A paired difference of a measure on the same seeds, on one side of a boundary.

    Attributes:
        measure: of `outcomes.SCORES` or `outcomes.OTHERS`.
        system: whose measure.
        baseline: is subtracted; a system or `BEST`.
        side: on which side of the boundary the whole interval has to lie.
        boundary: in the measure's unit.
    """

    measure: str
    system: str
    baseline: str
    side: Literal[">", "<"] = ">"
    boundary: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A sentence that the results may bear out.

    Attributes:
        text: the sentence.
        conditions: hold together; none for the correlation over systems.
        paper: whether the paper says so.
    """

    text: str
    conditions: tuple[Condition, ...]
    paper: bool = False


def _more_at_no_loss(system: str, baseline: str) -> tuple[Condition, ...]:
    return Condition("P", system, baseline), Condition("T", system, baseline, ">", -MARGIN)


def _better(system: str, baseline: str) -> tuple[Condition, ...]:
    return (Condition("H", system, baseline),)


def _no_worse(system: str, baseline: str) -> tuple[Condition, ...]:
    return (Condition("H", system, baseline, ">", -H_MARGIN),)


RANK_MEASURES_FORGETTING = Claim(
    "Over the systems, effective rank is a measure of forgetting: those that lose more of it lose more of P.", ()
)

CLAIMS: tuple[Claim, ...] = (
    Claim("Fine-tuning forgets the pre-trained tasks.", (Condition("P", "fine-tune", "zero-shot", "<"),), True),
    Claim("Fine-tuning lowers the effective rank of the pre-trained tasks' visual features.",
          (Condition("rank", "fine-tune", "zero-shot", "<"),), True),
    Claim("MDGD keeps more than Fine-tune (the rate with the best T) and learns as much.",
          _more_at_no_loss("mdgd", "fine-tune"), True),
    Claim("MDGD keeps more than Fine-tune at the rate with the best H and learns as much.",
          _more_at_no_loss("mdgd", "fine-tune-low"), True),
    Claim("MDGD keeps more than Fine-tune at the rate that reaches MDGD's target score.",
          _more_at_no_loss("mdgd", "fine-tune-matched"), True),
    Claim("MDGD's effective rank lies above that of Fine-tune.", (Condition("rank", "mdgd", "fine-tune"),), True),
    Claim("The visual alignment is what matters: MDGD has a higher H than without it.",
          _better("mdgd", "no-align"), True),
    Claim("MDGD-GM with 10 % of the numbers keeps as much as MDGD and learns as much.",
          (Condition("P", "mdgd-gm", "mdgd", ">", -MARGIN), Condition("T", "mdgd-gm", "mdgd", ">", -MARGIN)), True),
    Claim("MDGD has a higher H than Model Tailor.", _better("mdgd", "model-tailor"), True),
    Claim("MDGD has a higher H than Model Tailor that keeps the projector.", _better("mdgd", "model-tailor-keep")),
    Claim("LoRA has a lower H than Fine-tune.", (Condition("H", "lora", "fine-tune", "<"),), True),
    Claim("The regularizer r adds nothing to αv: MDGD gains less than a point of H by it.",
          (Condition("H", "mdgd", "align", "<", H_MARGIN),)),
    Claim("The projection adds to αv: g~ + αv has a higher H than αv alone.", _better("project", "align")),
    Claim("Read as r in place of g, (9) does worse than MDGD.", (Condition("H", "reference", "mdgd", "<"),)),
    Claim("Inner products over all parameters at once do as well as one parameter at a time.",
          _no_worse("global", "mdgd")),
    Claim("A random 10 % mask does no worse than MDGD-GM's.", _no_worse("random-align", "mdgd-gm")),
    Claim("A mask of the largest weights does no worse than MDGD-GM's.", _no_worse("magnitude-align", "mdgd-gm")),
    Claim("The step with a history keeps more than Fine-tune at the rate with the best H and learns as much.",
          _more_at_no_loss("history", "fine-tune-low")),
    Claim("The step kept from the visual inputs keeps more than Fine-tune at the rate with the best H and learns as "
          "much.", _more_at_no_loss("inputs", "fine-tune-low")),
    Claim("A history of 16 beats a history of 1.", _better("history", "step")),
    Claim("The step with a history beats MDGD.", _better("history", "mdgd")),
    Claim("Keeping to the visual inputs, without any visual gradient, comes within a point of MDGD's H.",
          _no_worse("inputs", "mdgd")),
    Claim("Protecting the inputs of the projector alone does as well as those of all layers.",
          _no_worse("inputs-projector", "inputs")),
    Claim("A restoring move adds to the history.", _better("restore", "history")),
    Claim("A drift budget does no worse than a tuned α.", _no_worse("budget", "project")),
    Claim("MDGD beats L2-SP, which knows nothing of pictures.", _better("mdgd", "l2-sp")),
    Claim("Replay is the upper bound: its H is above that of the best other system.", _better("replay", BEST)),
    RANK_MEASURES_FORGETTING,
)  # fmt: skip

RECOMMENDATION: tuple[Claim, ...] = (
    CLAIMS[0],
    Claim("αv alone keeps more than Fine-tune at the rate with the best H and learns as much.",
          _more_at_no_loss("align", "fine-tune-low")),
    Claim("The anchor keeps more than Fine-tune at the rate with the best H and learns as much.",
          _more_at_no_loss("anchor", "fine-tune-low")),
    Claim("The anchor, in one pass, comes within a point of αv's H.", _no_worse("anchor", "align")),
    Claim("The anchor has a higher H than WiSE-FT.", _better("anchor", "wise-ft")),
    Claim("The anchor has a higher H than KL at old questions, which knows how these are asked.",
          _better("anchor", "kl-questions")),
    Claim("The anchor has a higher H than replay of 5 % old examples.", _better("anchor", "replay-5")),
    Claim("The anchor has a higher H than replay of own answers to old questions, which knows how these are asked.",
          _better("anchor", "self-replay")),
    Claim("LoRA on all layers keeps more with the anchor and learns as much.",
          _more_at_no_loss("lora-anchor", "lora-all")),
    Claim("LoRA with the anchor has a higher H than Fine-tune at the rate with the best H.",
          _better("lora-anchor", "fine-tune-low")),
    Claim("LoRA with the anchor has a higher H than LoRA with L2 on ΔW.", _better("lora-anchor", "lora-l2")),
)  # fmt: skip
"""What carries the README's recommendation."""

KL_MEASURES_FORGETTING = Claim(
    "Over the systems, forgetting follows the divergence on the new task (RL's Razor): those whose answers to the new "
    "task's prompts have moved more lose more of P.", ()
)  # fmt: skip

RIVALS: tuple[Claim, ...] = (
    Claim("With the same random words the anchor has a higher H than KL at the old model's answers to them.",
          _better("anchor", "kl-random")),
    Claim("With the same random words the anchor has a higher H than replay of the old model's answers to them.",
          _better("anchor", "self-replay-random")),
    Claim("The anchor has a higher H than L2-SP, which is C = I.", _better("anchor", "l2-sp")),
    Claim("The anchor has a higher H than Model-Dowser's mask.", _better("anchor", "model-dowser")),
    Claim("The anchor has a higher H than SPIDER.", _better("anchor", "spider")),
    Claim("The anchor has a higher H than OSF.", _better("anchor", "osf")),
    Claim("LoRA with the anchor has a higher H than LaLoRA.", _better("lora-anchor", "lora-laplace")),
    Claim("LoRA with the anchor has a higher H than with Mask the Target.",
          _better("lora-anchor", "lora-mask-target")),
    Claim("LoRA with the anchor has a higher H than CorDA.", _better("lora-anchor", "corda")),
    KL_MEASURES_FORGETTING,
)  # fmt: skip
"""Of the anchor's nearest rivals, and of what forgetting follows."""
