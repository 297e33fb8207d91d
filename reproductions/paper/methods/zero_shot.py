"""Zero-shot: the published weights."""

from reproductions.paper.methods.base import Method


class ZeroShot(Method):
    """Trains nothing."""

    name = "zero-shot"
    title = "Zero-shot"
    trains = False
