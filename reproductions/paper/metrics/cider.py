"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) by pycocoevalcap, times 100.

Published scores split captions into words with the Penn Treebank tokenizer, a Java program. Without Java, words are
what is left of a lower-case caption without punctuation; such scores come out a little different and are named so.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from reproductions.paper.data.examples import Example
from reproductions.paper.metrics.metric import Metric, require_pairs

_WORD = re.compile(r"\w+(?:['-]\w+)*")
Captions = dict[int, list[str]]


class CIDEr(Metric):
    """How well a caption agrees with the references, by rare words and phrases; up to 1,000.

    Attributes:
        ptb: split words with the Penn Treebank tokenizer; by default where there is Java.
    """

    name = "cider"

    def __init__(self, ptb: bool | None = None) -> None:
        self.ptb = shutil.which("java") is not None if ptb is None else ptb

    @property
    def key(self) -> str:
        """Says how words were split: "cider" or "cider_no_ptb"."""
        return "cider" if self.ptb else "cider_no_ptb"

    def each(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Each depends on the others: words count by how rare they are in the references of all pictures."""
        return self._each(*self._words(predictions, examples))

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """The mean as "score" and again under `key`; "bleu_4" of the whole and the mean "rouge_l" of the same words."""
        given, references = self._words(predictions, examples)
        mean = fmean(self._each(given, references))
        bleu, _ = Bleu(4).compute_score(references, given, verbose=0)
        rouge, _ = Rouge().compute_score(references, given)
        return {"score": mean, self.key: mean, "bleu_4": 100 * float(bleu[3]), "rouge_l": 100 * float(rouge)}

    def _words(self, predictions: Sequence[str], examples: Sequence[Example]) -> tuple[Captions, Captions]:
        """Predictions and references by example, with a blank between words."""
        require_pairs(predictions, examples)
        # References and, below zero, predictions: Java starts once.
        texts = {i: [_line(answer) for answer in example.answers] for i, example in enumerate(examples)}
        texts |= {~i: [_line(prediction)] for i, prediction in enumerate(predictions)}
        words = _split_ptb(texts) if self.ptb else _split(texts)
        places = range(len(examples))
        return {i: words[~i] for i in places}, {i: words[i] for i in places}

    def _each(self, given: Captions, references: Captions) -> list[float]:
        _, each = Cider().compute_score(references, given)
        return [100 * float(score) for score in each]


def _line(caption: str) -> str:
    """The tokenizer reads one caption a line, and counts other ends of lines than Python does."""
    return " ".join(caption.split())


def _split(captions: Captions) -> Captions:
    return {i: [" ".join(_WORD.findall(text.lower())) for text in texts] for i, texts in captions.items()}


def _split_ptb(captions: Captions) -> Captions:
    """Words by the package's Java program. Its own wrapper for that writes into the package, which may be read-only."""
    sent = [text for texts in captions.values() for text in texts]
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="\n".join(sent) + "\n", capture_output=True, encoding="utf-8", check=False)
    back = done.stdout.split("\n")[:-1]
    if done.returncode or len(back) != len(sent):
        raise RuntimeError(f"the Penn Treebank tokenizer failed; is this a working Java? {done.stderr[-500:]}")
    lines = iter(back)
    kept = {i: [next(lines).rstrip().split(" ") for _ in texts] for i, texts in captions.items()}
    return {
        i: [" ".join(w for w in words if w not in ptbtokenizer.PUNCTUATIONS) for words in texts]
        for i, texts in kept.items()
    }
