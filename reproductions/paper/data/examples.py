"""What every data set is read into."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


class DataError(ValueError):
    """Data that is missing or broken; the message names the data set and, where there is one, the row."""


@dataclass(frozen=True)
class Example:
    """A question about a picture.

    Attributes:
        id: names the example within its split.
        picture: decodes and returns the picture; `image` calls it.
        question: the full text of the prompt with its suffix, without a chat template and without an image token.
        answers: every reference answer or caption.
        target: what training teaches to answer.
        choices: texts of the options, A first; empty where the question is open.
        extra: what else a metric needs.
    """

    id: str
    picture: Callable[[], Image.Image] = field(repr=False, compare=False)
    question: str
    answers: tuple[str, ...]
    target: str
    choices: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The picture, RGB, decoded at each access.

        Raises:
            DataError: the stored picture is broken.
        """
        return self.picture()
