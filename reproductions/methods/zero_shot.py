"""Zero-shot: the weights as they are."""

from reproductions.methods.base import Method


class ZeroShot(Method):
    """Trains nothing."""

    name = "zero-shot"
    title = "Zero-shot"
    trains = False
