"""Prompts and scores are those of lmms-eval, where it is installed (`pip install --no-deps lmms-eval` will do)."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reproductions.paper.data import DATASETS, Example
from reproductions.paper.data.prompts import LETTER
from reproductions.paper.metrics import METRICS
from reproductions.paper.metrics.choice import infer_option
from reproductions.paper.metrics.contractions import CONTRACTIONS
from reproductions.paper.metrics.vqa import normalise

PACKAGE = importlib.util.find_spec("lmms_eval")

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="lmms-eval is not installed")


def lmms_eval(path: str) -> ModuleType:
    """A file of its tasks, without the many packages that importing all of it needs."""
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    file = Path(PACKAGE.submodule_search_locations[0]) / "tasks" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluator():
    for needed in ("loguru", "pandas", "requests"):
        pytest.importorskip(needed)
    return lmms_eval("mmbench/mmbench_evals.py").MMBench_Evaluator()


def example(*answers: str, choices: tuple[str, ...] = ()) -> Example:
    return Example("0", lambda: Image.new("RGB", (1, 1)), "?", answers, answers[0], choices)


def asked(name: str, folder: Path, monkeypatch) -> Iterator[tuple[dict, Example]]:
    """Rows of a sample file, and the examples that we read from them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    data = DATASETS[name]
    data.write_sample(folder / "data", data.evaluation, 12, 0)
    (file,) = (folder / "data").rglob("*.parquet")
    return zip(pq.read_table(file).to_pylist(), data.load(data.evaluation, source=folder / "data"), strict=True)


WORDS = ["a", "the", "two", "none", "Yes", "dont", "it's", "3.5", "1,000", "U.S.", "red/blue", "x_y", "what?", '"no"',
         "(left)", "\n", "\t", "!", "B.C", "@home", "o'clock", *CONTRACTIONS]  # fmt: skip
words = st.sampled_from(WORDS)
answers = st.one_of(st.lists(words, max_size=4).map(" ".join), st.text("abAB01 .,'?!-/()\"\n\t", max_size=12))


@given(st.lists(answers, min_size=1, max_size=20))
def test_normal_form(texts):
    process = lmms_eval("_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    for text in [*texts, *CONTRACTIONS]:
        assert normalise(text) == process(text)


letters = st.one_of(
    st.sampled_from(["A", "b", "B", "B.", "B. dog", "b. dog", " B ", "Bdog", "(B)", ""]), st.text("ABab. ", max_size=4)
)


@given(letters, st.sampled_from([0, 1]))
def test_letters(prediction, answer):
    theirs = lmms_eval("scienceqa/utils.py").sqa_process_results
    expected = theirs({"choices": ["cat", "dog"], "answer": answer}, [prediction])["exact_match"]
    assert METRICS["letter"].each([prediction], [example("AB"[answer], choices=("cat", "dog"))]) == [100 * expected]


@given(st.lists(st.sampled_from([*"ABCDE", "A.", "B)", "(C)", "(D).", ":A", ":B.", "E,", "cat", "dog", "is", "the"])))
def test_options_in_free_text(tokens):
    expected = evaluator().can_infer(" ".join(tokens), {"A": "cat", "B": "dog", "C": "horse"})
    assert (infer_option(" ".join(tokens), ("cat", "dog", "horse")) or False) == expected


# Answers that are neither are where the two differ on purpose.
yes_or_no = st.tuples(st.sampled_from(["Yes", "no", "yes ", "NO"]), st.sampled_from(["yes", "no"]))


@given(st.lists(yes_or_no, min_size=1, max_size=12))
def test_pope(pairs):
    theirs = lmms_eval("pope/utils.py")
    each = [theirs.pope_process_results({"answer": a, "question_id": 0}, [p])["pope_accuracy"] for p, a in pairs]
    expected = {name: 100 * getattr(theirs, f"pope_aggregate_{kind}")(each)
                for name, kind in (("score", "f1_score"), ("accuracy", "accuracy"), ("precision", "precision"),
                                   ("recall", "recall"))}  # fmt: skip
    ours = METRICS["pope"].score([p for p, _ in pairs], [example(a) for _, a in pairs])
    assert ours == pytest.approx(expected | {"answered": 100})


def test_prompts_of_scienceqa(tmp_path, monkeypatch):
    settings = {"format": "default", "pre_prompt": "", "post_prompt": LETTER}
    for row, read in asked("scienceqa", tmp_path, monkeypatch):
        assert read.question == lmms_eval("scienceqa/utils.py").sqa_doc_to_text(row, settings)


def test_prompts_of_iconqa(tmp_path, monkeypatch):
    statement = "Given a set of images and a question, please provide the answer to the question.\n"
    letter = "Please answer with the option letter from the given choices directly."
    settings = {
        "pre_prompt": "",
        "statement": statement,
        "options_statement": "Question: {question}.\nOptions:\n{options}\n" + letter,
        "freeform_statement": "Question: {question}.\nPlease answer the question using a single word or phrase.",
    }
    for row, read in asked("iconqa", tmp_path, monkeypatch):
        assert read.question == lmms_eval("iconqa/utils.py").doc_to_text(row, settings)


def test_prompts_of_mmbench(tmp_path, monkeypatch):
    for row, read in asked("mmbench", tmp_path, monkeypatch):
        options, _ = evaluator().create_options_prompt(row, ["A", "B", "C", "D", "E"])
        hint = f"{row['hint']} " if row["hint"] != "nan" else ""
        assert read.question == f"{hint}{row['question']} {options}\n{LETTER}"
