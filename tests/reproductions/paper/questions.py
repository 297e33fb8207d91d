"""Pictures and questions that no file holds."""

from types import SimpleNamespace

import numpy as np
from PIL import Image


def picture(seed, size=(56, 40)):
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def examples():
    texts = [("What is this?", "cat"), ("Which of these is the odd one out?", "a red square"), ("Why?", "no")]
    sizes = [(56, 40), (20, 30), (64, 64)]
    return [
        SimpleNamespace(image=picture(i, size), question=question, target=target)
        for i, ((question, target), size) in enumerate(zip(texts, sizes, strict=True))
    ]
