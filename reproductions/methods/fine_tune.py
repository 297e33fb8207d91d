"""Fine-tune: AdamW on the last layers and the connector."""

from reproductions.methods.base import Method


class FineTune(Method):
    """The baseline that forgets."""

    name = "fine-tune"
    title = "Fine-tune"
