"""What is appended to questions, as the tables' numbers ask for it."""

from collections import Counter
from collections.abc import Sequence

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
CAPTION = "Provide a one-sentence caption for the provided image."


def options(choices: Sequence[str]) -> str:
    """`A. first`, `B. second`, ..., one a line."""
    return "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))


def most_common(answers: Sequence[str]) -> str:
    """The answer given most often; the first of those in a tie."""
    return Counter(answers).most_common(1)[0][0]
