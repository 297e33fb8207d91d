"""What the loss of a step is, of methods without a rule: the task loss, replaced or with penalties beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reproductions.methods.dft import probability_weighted
from reproductions.methods.eaft import entropy_weighted
from reproductions.methods.kl import Divergence
from reproductions.methods.mask_the_target import NonTargetDivergence
from reproductions.mini.experiment.methods import Method
from reproductions.mini.world.data import Example, training_batch

ASKED = 4
"""Of the pre-trained model's own answers, those at which a step measures the divergence."""

_WEIGHTED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"eaft": entropy_weighted, "dft": probability_weighted}


class Additions:
    """The loss of a step, of the output on its batch.

    Args:
        model: as it was pre-trained.
        method: what is added.
        tokenizer: of the model.
        answered: the pre-trained model's own answers, for a divergence there.
        seed: draws them.
        pull: a penalty on weights.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        tokenizer: PreTrainedTokenizerFast,
        answered: Sequence[Example],
        seed: int,
        pull: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model, self.method, self.tokenizer = model, method, tokenizer
        self.answered, self.pull = answered, pull
        self.rng = np.random.default_rng([seed, 9])
        kind = NonTargetDivergence if method.kl_of == "non-target" else Divergence
        self.divergence = kind(model, method.kl) if method.kl else None

    def __call__(self, batch: Mapping[str, Tensor]) -> Callable[[Any], Tensor]:
        """Run what has to run at the pre-trained weights.

        Returns:
            the loss, with its graph, of the output on the batch.
        """
        elsewhere = self._asked() if self.divergence is not None and self.method.kl_at == "questions" else None
        diverged = None if self.divergence is None else self.divergence(batch if elsewhere is None else elsewhere)

        def loss(output: Any) -> Tensor:
            weighted = _WEIGHTED.get(self.method.loss)
            total: Tensor = output.loss if weighted is None else weighted(output.logits, batch["labels"])
            if self.pull is not None:
                total = total + self.pull()
            if diverged is not None:
                total = total + diverged(output if elsewhere is None else self.model(**elsewhere))
            return total

        return loss

    def _asked(self) -> dict[str, Tensor]:
        chosen = self.rng.choice(len(self.answered), min(ASKED, len(self.answered)), replace=False)
        return training_batch([self.answered[int(i)] for i in chosen], self.tokenizer)
