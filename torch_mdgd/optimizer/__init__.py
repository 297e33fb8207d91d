"""The wrapper around any ``torch.optim`` optimizer: it captures gradients, combines them by a rule, and steps."""

from torch_mdgd.optimizer.wrapper import MDGDOptimizer

__all__ = ["MDGDOptimizer"]
