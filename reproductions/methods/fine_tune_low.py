"""Fine-tune at a tenth of its rate: what costs nothing, and is to be beaten (arXiv 2603.14493)."""

from reproductions.methods.base import Method


class FineTuneLow(Method):
    """The control of everything that learns less."""

    name = "fine-tune-low"
    title = "Fine-tune, a tenth of the rate"
    in_paper = False
    rate = 0.1
