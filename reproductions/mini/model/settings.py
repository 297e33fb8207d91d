"""Numbers that the experiment's results depend on, kept apart from the code that needs torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that the pre-trained weights depend on.

    Attributes:
        seed: of the weights and of the batches.
        vision_steps: steps in which the vision tower alone learns to tell what each patch shows.
        language_steps: steps in which the whole model learns to answer.
        vision_batch: pictures a vision step.
        language_batch: pictures, with up to five questions each, a language step.
        vision_rate: peak learning rate of the vision steps.
        language_rate: peak learning rate of the language steps.
        architecture: a name in `architectures.ARCHITECTURES`.
        facts: whether questions without a picture are part of it, see `world.language`.
        autocast: whether products of matrices are bfloat16's; the weights stay float32.
    """

    seed: int = 0
    vision_steps: int = 500
    language_steps: int = 1500
    vision_batch: int = 96
    language_batch: int = 64
    vision_rate: float = 1.5e-3
    language_rate: float = 2e-3
    architecture: str = "llava"
    facts: bool = False
    autocast: bool = False


PRETRAIN = PretrainSettings()
"""What the first LLaVA in the repository was made with."""

RECIPES: dict[str, PretrainSettings] = {
    "llava": PRETRAIN,
    "llava-10m": PretrainSettings(architecture="llava-10m", language_rate=1e-3, autocast=True),
    "smolvlm": PretrainSettings(architecture="smolvlm", facts=True),
}
"""By architecture; the models of one differ by their seed."""
