"""Metrics agree with the evaluations that defined them: reference packages, or their published rules written out."""

import math
import re
import shutil
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from reproductions.paper.data import Example
from reproductions.paper.metrics import METRICS
from reproductions.paper.metrics.choice import infer_option
from reproductions.paper.metrics.cider import CIDEr
from reproductions.paper.metrics.cider import _split_ptb as split_ptb
from reproductions.paper.metrics.contractions import CONTRACTIONS
from reproductions.paper.metrics.vqa import normalise, vqa_accuracy

java = pytest.mark.skipif(shutil.which("java") is None, reason="the PTB tokenizer is a Java program")


def example(*answers: str, choices: tuple[str, ...] = (), **extra) -> Example:
    return Example("0", lambda: Image.new("RGB", (1, 1)), "?", answers, answers[0], choices, extra)


def score(metric: str, predictions: list[str], examples: list[Example]) -> float:
    return METRICS[metric].score(predictions, examples)["score"]


# VQA accuracy.

REFERENCE_MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",",
                   "?", "!"]  # fmt: skip
REFERENCE_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
                     "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip


def reference_normal_form(answer: str) -> str:
    """The published steps, one after the other: words, punctuation, then digits, articles and contractions."""
    answer = answer.lower()
    for old, new in ((",", ""), ("?", ""), ("'s", " 's")):
        answer = answer.replace(old, new)
    answer = answer.strip().replace("\n", " ").replace("\t", " ").strip()
    out = answer
    for mark in REFERENCE_MARKS:
        if (mark + " " in answer or " " + mark in answer) or re.search(r"(?<=\d)(\,)+(?=\d)", answer) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    # The published pattern means to look behind for a digit, but asks for the text "<=" and a digit ahead.
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
    words = []
    for word in out.lower().split():
        word = REFERENCE_NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def reference_accuracy(prediction: str, answers: list[str]) -> float:
    accuracies = []
    for i in range(len(answers)):
        others = [reference_normal_form(a) for j, a in enumerate(answers) if j != i]
        accuracies.append(min(1, others.count(reference_normal_form(prediction)) / 3))
    return sum(accuracies) / len(accuracies)


WORDS = ["a", "the", "two", "2", "none", "Yes", "no", "dont", "it's", "3.5", "1,000", "U.S.", "t-shirt", "red/blue",
         "what?", "\"no\"", "(left)", "isnt", "\n", "\t", "!", "ten", "B.C", "x_y", "@home", "o'clock"]  # fmt: skip
answer_texts = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join),
    st.text("abAB01 .,'?!-/()\"\n\t", max_size=12),
)


@given(answer_texts)
def test_normal_form_is_the_published_one(answer):
    assert normalise(answer) == reference_normal_form(answer)


@given(answer_texts, st.lists(answer_texts, min_size=2, max_size=10), st.integers(0, 9))
def test_vqa_accuracy_is_the_published_one(prediction, answers, repeated):
    # Agreement by chance is rare, so some annotators give the prediction itself.
    answers = answers + [prediction] * repeated
    assert vqa_accuracy(prediction, answers) == pytest.approx(reference_accuracy(prediction, answers), abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("A red Car.", "red car"),
        ("Two,  dogs", "2 dogs"),
        ("dont", "don't"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("none", "0"),
        ("the man's hat?", "man 's hat"),
        ("", ""),
    ],
)
def test_normal_forms(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_annotators(agreeing, accuracy):
    answers = ["red"] * agreeing + [f"other{i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("Red!", answers) == pytest.approx(accuracy)
    assert score("vqa", ["red", "blue"], [example(*answers), example(*answers)]) == pytest.approx(50 * accuracy)


def test_one_annotator_is_not_enough():
    with pytest.raises(ValueError, match="at least 2"):
        score("vqa", ["red"], [example("red")])


# Exact match, letters, yes and no.


@pytest.mark.parametrize(
    ("prediction", "right"), [("Yes", 100), ("yes.", 100), (" yes ", 100), ("yes it is", 0), ("", 0)]
)
def test_exact_match(prediction, right):
    assert score("exact_match", [prediction], [example("yes")]) == right


def test_exact_match_with_any_reference():
    assert score("exact_match", ["b", "c"], [example("a", "b"), example("a", "b")]) == 50


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("B", 100), ("b", 100), (" B\n", 100), ("B. a dog", 100), ("B.", 100), ("b. a dog", 0), ("(B)", 0), ("B a dog", 0),
     ("A", 0), ("Bdog", 0), ("", 0), ("a dog", 0)],
)  # fmt: skip
def test_letters(prediction, right):
    asked = example("B", choices=("a cat", "a dog"))
    assert score("letter", [prediction], [asked]) == right
    assert score("iconqa", [prediction], [asked]) == right


def test_iconqa_without_options_is_an_exact_match():
    assert score("iconqa", ["7.", "8"], [example("7"), example("7")]) == 50


@pytest.mark.parametrize(
    ("prediction", "option"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("The answer is (C).", "C"),
        ("I think : B", "B"),
        ("A", "A"),
        ("A dog is here now", "B"),  # "A" may be the article, so the text decides
        ("It is a DOG", "B"),
        ("A or B", None),
        ("a dog and a cat", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_options_in_free_text(prediction, option):
    assert infer_option(prediction, ("cat", "dog", "horse")) == option


def test_mmbench_counts_a_question_that_is_right_in_every_rotation():
    choices = ("cat", "dog")
    examples = [example("A", choices=choices, group=1), example("B", choices=choices, group=1),
                example("A", choices=choices, group=2), example("B", choices=choices, group=2)]  # fmt: skip
    scores = METRICS["mmbench"].score(["A", "A", "A", "B"], examples)
    assert scores == {"score": 50, "accuracy": 75}
    assert METRICS["mmbench"].each(["A", "A", "A", "B"], examples) == [100, 0, 100, 100]


def test_pope():
    truth = [example(answer) for answer in ("yes", "yes", "yes", "no", "no", "no")]
    scores = METRICS["pope"].score(["Yes", "yes ", "no", "yes", "no", "A dog."], truth)
    # Two of the three "yes" said are right, and two of the three true ones were said; "A dog." is neither.
    expected = {"score": 200 / 3, "accuracy": 50, "precision": 200 / 3, "recall": 200 / 3, "answered": 500 / 6}
    assert scores == pytest.approx(expected)
    assert next(iter(scores)) == "score"


def test_describing_is_no_way_to_a_high_f1():
    scores = METRICS["pope"].score(["yes", *["A dog on a street."] * 9], [example("yes")] * 10)
    assert scores["recall"] == scores["answered"] == 10
    assert scores["score"] == pytest.approx(200 * 0.1 / 1.1)


def test_pope_takes_yes_with_a_full_stop():
    truth = [example("yes"), example("no")]
    assert METRICS["pope"].each(["Yes.", " No. "], truth) == [100, 100]


def llavas_script(answers, labels):
    """F1 of llava/eval/eval_pope.py, written out."""
    said = []
    for text in answers:
        words = text.split(".")[0].replace(",", "").split(" ")
        said.append(0 if "No" in words or "not" in words or "no" in words else 1)
    pairs = list(zip(said, labels, strict=True))
    tp, fp, fn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall)


def test_pope_by_category_and_by_the_rule_of_llava():
    kinds = ["random", "popular", "adversarial"]
    said = ["Yes, there is a dog.", "There is not. Yes", "yes", "No.", "A dog.", "no"]
    label = ["yes", "no", "yes", "no", "yes", "yes"]
    # Each category gets all six questions, the second with one answer more that is wrong.
    extra = [[], ["yes"], []]
    predictions, examples, loose = [], [], []
    for kind, more in zip(kinds, extra, strict=True):
        predictions += said + more
        examples += [example(true, category=kind) for true in [*label, *["no" for _ in more]]]
        loose.append(llavas_script(said + more, [int(true == "yes") for true in [*label, *["no" for _ in more]]]))
    scores = METRICS["pope"].score(predictions, examples)
    assert scores["f1_llava"] == pytest.approx(100 * sum(loose) / 3)
    # Strictly, "yes", "No." and "no" are answers: one of four is found, and all that are given are right.
    assert scores["f1_random"] == scores["f1_adversarial"] == pytest.approx(100 * 2 * 0.25 / 1.25)
    assert scores["f1_popular"] == pytest.approx(100 * 2 * 0.5 * 0.25 / 0.75)
    assert scores["f1_categories"] == pytest.approx((2 * scores["f1_random"] + scores["f1_popular"]) / 3)
    assert "f1_llava" not in METRICS["pope"].score(said, [example(true) for true in label])


def test_any_annotator_beside_the_soft_score():
    answers = ("red",) * 8 + ("a blue", "green")
    examples = [example(*answers) for _ in range(4)]
    scores = METRICS["vqa"].score(["Red", "blue", "Green.", "pink"], examples)
    assert scores["any_annotator"] == 75
    assert scores["score"] < 75


def test_yes_or_no_and_open_questions_apart():
    examples = [example("yes"), example("No"), example("liver"), example("kidney"), example("lung")]
    scores = METRICS["yes_no_or_open"].score(["yes", "yes", "Liver.", "spleen", "heart"], examples)
    assert scores == pytest.approx({"score": 40, "yes_no": 50, "open": 100 / 3})
    assert "open" not in METRICS["yes_no_or_open"].score(["no"], [example("no")])


@pytest.mark.parametrize("predictions", [["no", "no"], ["a cat", "a dog"]])
def test_pope_without_a_yes(predictions):
    assert METRICS["pope"].score(predictions, [example("yes"), example("no")])["score"] == 0


# CIDEr.

NOUNS = ["dog", "cat", "man", "ball", "tree", "street", "red", "blue", "big", "small", "runs", "sits", "on", "the", "a"]
captions = st.lists(st.sampled_from(NOUNS), min_size=1, max_size=9).map(" ".join)
pictures = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=5)), min_size=2, max_size=8)


@given(pictures)
def test_cider_is_that_of_the_package(drawn):
    expected, each = Cider().compute_score(
        {i: references for i, (_, references) in enumerate(drawn)}, {i: [said] for i, (said, _) in enumerate(drawn)}
    )
    predictions, examples = [said for said, _ in drawn], [example(*references) for _, references in drawn]
    metric = CIDEr(ptb=False)
    scores = metric.score(predictions, examples)
    references = {i: texts for i, (_, texts) in enumerate(drawn)}
    given = {i: [said] for i, (said, _) in enumerate(drawn)}
    assert scores == pytest.approx({
        "score": 100 * expected, "cider_no_ptb": 100 * expected,
        "bleu_4": 100 * Bleu(4).compute_score(references, given, verbose=0)[0][3],
        "rouge_l": 100 * Rouge().compute_score(references, given)[0],
    })  # fmt: skip
    assert metric.each(predictions, examples) == pytest.approx([100 * value for value in each])


def cider_by_hand(drawn: list[tuple[str, list[str]]]) -> float:
    """CIDEr-D by its definition: clipped cosine of tf-idf vectors of 1- to 4-grams, with a Gaussian of lengths."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in range(1, 5):
        seen_in = Counter(gram for _, texts in drawn for gram in set().union(*(grams(t, n) for t in texts)))

        def weigh(text, n=n, seen_in=seen_in):
            rarity = {g: math.log(len(drawn)) - math.log(max(1, seen_in[g])) for g in grams(text, n)}
            return {gram: count * rarity[gram] for gram, count in grams(text, n).items()}

        for said, texts in drawn:
            for text in texts:
                c, s = weigh(said), weigh(text)
                norm = math.sqrt(sum(x * x for x in c.values())) * math.sqrt(sum(x * x for x in s.values()))
                overlap = sum(min(c[g], s.get(g, 0)) * s.get(g, 0) for g in c)
                # The package measures lengths in 2-grams.
                apart = sum(grams(said, 2).values()) - sum(grams(text, 2).values())
                total += overlap / (norm or 1) * math.exp(-(apart**2) / 72) / len(texts)
    return 1000 * total / 4 / len(drawn)


@given(pictures)
def test_cider_is_its_definition(drawn):
    predictions, examples = [said for said, _ in drawn], [example(*references) for _, references in drawn]
    assert CIDEr(ptb=False).score(predictions, examples)["score"] == pytest.approx(cider_by_hand(drawn), abs=1e-9)


PREDICTIONS = ["A dog, sitting on the street!", "the man's ball\nis red", ""]
REFERENCES = [["A dog sits on the street.", "The dog's street"], ["The man's ball is red", "a red ball"], ["a tree"]]


def test_words_without_java():
    plain = ["a dog sitting on the street", "the man's ball is red", "  "]
    bare = [[text.lower().replace(".", "") for text in texts] for texts in REFERENCES]
    rough, neat = (
        CIDEr(ptb=False).score(said, [example(*texts) for texts in references])["score"]
        for said, references in ((PREDICTIONS, REFERENCES), (plain, bare))
    )
    assert rough == pytest.approx(neat)
    assert rough > 0


@java
def test_words_by_the_penn_treebank():
    metric = CIDEr()
    scores = metric.score(PREDICTIONS, [example(*texts) for texts in REFERENCES])
    references = PTBTokenizer().tokenize({i: [{"caption": t} for t in texts] for i, texts in enumerate(REFERENCES)})
    said = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(PREDICTIONS)})
    expected = 100 * Cider().compute_score(references, said)[0]
    assert (scores["score"], scores["cider"]) == (pytest.approx(expected), pytest.approx(expected))
    # "man 's" is two words to this tokenizer.
    assert expected != pytest.approx(CIDEr(ptb=False).score(PREDICTIONS, [example(*t) for t in REFERENCES])["score"])


@java
def test_the_penn_treebank_tokenizer_is_that_of_the_package():
    texts = [
        "A dog, sitting -- on the street!",
        "",
        "the man's can't (U.S.) 3.5\u00bd caf\u00e9 \u201cquoted\u201d",
        "...",
        "x",
    ]
    expected = PTBTokenizer().tokenize({0: [{"caption": text} for text in texts], 5: [{"caption": "Ends here."}]})
    assert split_ptb({0: texts, 5: ["Ends here."]}) == expected


def test_java_decides(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert CIDEr().key == "cider_no_ptb"
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/java")
    assert CIDEr().key == "cider"


def test_a_java_that_fails_is_an_error(tmp_path, monkeypatch):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="working Java"):
        CIDEr(ptb=True).score(["a dog"], [example("a dog")])


# Every metric.


@pytest.mark.parametrize("metric", METRICS)
def test_right_answers_are_right(metric):
    answers = ("yes",) * 4 if metric in ("vqa", "pope") else ("A",)
    examples = [example(*answers, choices=("cat", "dog"), group=0)] * 3
    if metric == "cider":
        answers = ("a big dog runs",)
        examples = [example(*answers), example("the red ball on the street"), example("a small cat sits")]
        scores = METRICS[metric].score([e.target for e in examples], examples)
        assert scores["score"] == pytest.approx(1000, abs=1e-6)
    else:
        assert METRICS[metric].score([answers[0]] * 3, examples)["score"] == 100


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("predictions", [[], ["yes", "no"]])
def test_predictions_and_examples_must_pair(metric, predictions):
    with pytest.raises(ValueError, match="one prediction an example"):
        METRICS[metric].score(predictions, [example("yes", group=0)])
