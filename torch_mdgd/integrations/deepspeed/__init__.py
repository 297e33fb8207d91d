"""``MDGDEngine``: the passes of MDGD in DeepSpeed's engine, ZeRO-1, 2 and 3.

The engine owns parameters, gradients and the optimizer, so what changes d enters by its backward pass:

- Where one backward pass of L + αL_v gives d, that is the loss that the engine gets. The anchor's λ(W − W₀)C is
  added to the gradients of W in each layer's own backward pass, where W is whole.
- Other rules need g, v and those at φ apart. Hooks then take the gradients before the engine does, which gets zeros,
  and each process keeps its part of their means. d goes in by ``safe_set_full_grad``.

φ lies beside the parameters as they are held, with ZeRO-3 in the same partitions, and is exchanged with them.
"""

from torch_mdgd.integrations.deepspeed.engine import MDGDEngine
from torch_mdgd.integrations.deepspeed.reference import ZeroReference

__all__ = ["MDGDEngine", "ZeroReference"]
