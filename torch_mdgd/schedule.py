"""When a mask is chosen, and from which gradients."""

from collections.abc import Sequence

from torch import Tensor

from torch_mdgd import equations, kernels, sharded
from torch_mdgd.masking import Mask, ScoreInputs
from torch_mdgd.settings import Group

AGE = "mask_age"
NOT_CHOSEN = (
    "a gradient holds NaN or Inf at the step that chooses the mask; nothing was changed. zero_grad() and go on with "
    "another batch, or train under a gradient scaler, which skips such steps"
)


class MaskSchedule:
    """The first choice after ``mask.warmup`` steps, then one every ``mask.refresh`` steps.

    The age of a choice lies in the first parameter group, so that it survives checkpoints. A run that is resumed
    within the warm-up begins that anew: nothing has moved by then.

    Args:
        mask: what chooses; None for no mask.
        groups: the parameter groups.
    """

    def __init__(self, mask: Mask | None, groups: Sequence[Group]) -> None:
        self.mask = mask
        if mask is not None and mask.scored:
            # From the start: torch.distributed.checkpoint loads what a fresh optimizer has, and nothing else.
            groups[0].setdefault(AGE, 0)
        self.waits = self.refused = False
        self.begin()

    def begin(self) -> None:
        """Begin the warm-up anew, as when a state dict was loaded."""
        self.steps = 0
        self.sums: list[list[Tensor | None]] = []

    def due(self, masked: bool, groups: Sequence[Group]) -> bool:
        """Whether the next combine chooses a mask.

        Args:
            masked: whether one has been chosen before.
            groups: the parameter groups.
        """
        if self.mask is None or not self.mask.scored:
            return False
        if masked:
            # There is one warm-up, before the first choice, also of a run that was resumed after it.
            self.steps = self.mask.warmup
        refresh = self.mask.refresh
        return not masked or (refresh is not None and int(groups[0].get(AGE, 0)) >= refresh)

    def count(self, groups: Sequence[Group]) -> None:
        """Note one more combined step."""
        if self.mask is not None and self.mask.refresh is not None and not self.waits:
            groups[0][AGE] = int(groups[0].get(AGE, 0)) + 1

    def masks(
        self,
        roles: Sequence[kernels.Role],
        products: Tensor,
        together: Tensor,
        parameters: Sequence[Tensor],
        groups: Sequence[Group],
        scale: float = 1.0,
    ) -> list[Tensor] | None:
        """The masks of these gradients and those of the warm-up, or None, and then one of two attributes says why.

        ``waits``: the warm-up lasts. ``refused``: there is NaN or Inf, d will be NaN, and a gradient scaler that skips
        the step leaves the choice to the next one.

        Args:
            roles: g, v and g~0.
            products: their inner products in each parameter's scope, shape (T, 3, 3).
            together: bool, shape (T,): parameters of scope "global".
            parameters: T parameters.
            groups: the parameter groups.
            scale: the loss scale of this step's gradients, which may change within a warm-up.
        """
        assert self.mask is not None
        self.refused = not bool(products.isfinite().all())
        if self.refused:
            return None
        self.steps += 1
        if self.steps < self.mask.warmup or self.sums:
            self._add(roles, scale)
            self.waits = self.steps < self.mask.warmup
            if self.waits:
                return None
            roles, self.sums = self.sums, []
            products = equations.pool(sharded.inner_products(roles), together)
        groups[0][AGE] = 0
        g, v, g0_tilde = roles
        return self.mask.choose(parameters, ScoreInputs(g, v, g0_tilde, equations.drift(products)))

    def _add(self, roles: Sequence[kernels.Role], scale: float) -> None:
        if not self.sums:
            self.sums = [[None] * len(role) for role in roles]
        for held, more in zip(self.sums, roles, strict=True):
            for t, (x, y) in enumerate(zip(held, more, strict=True)):
                if y is not None:
                    held[t] = y / scale if x is None else x.add_(y, alpha=1 / scale)
