"""Tables show the published value, ours and the difference, and never take a smoke run for a measurement."""

import json

import pytest
from rich.console import Console

from reproductions.paper.report.published import published
from reproductions.paper.report.results import Result, read_results
from reproductions.paper.report.tables import KEPT, comparisons, markdown, rich_tables
from reproductions.shared.files import FileError
from tests.reproductions.paper.made_up_results import SHIFT, write_results, write_run

FLICKR = "llava-flickr30k"


def change(run: Result, file: str, **values) -> None:
    path = run.folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only(folder, method="mdgd", experiment=FLICKR, smoke=False) -> Result:
    return write_run(folder, published()[experiment], published()[experiment].rows[method], smoke)


def text(folder) -> str:
    console = Console(record=True, width=170)
    for table in rich_tables(folder):
        console.print(table)
    return console.export_text()


def line(folder, method="mdgd", number=0):
    (found,) = (line for line in comparisons(folder)[number].lines if line.method == method)
    return found


def test_the_layout_of_the_paper(tmp_path):
    found = comparisons(tmp_path)
    assert [len(table.lines) for table in found] == [7, 7, 6, 6]
    assert found[0].columns == ("GQA", "VizWiz", "ScienceQA", "TextVQA", "POPE", "MMBench", "Flickr30k", KEPT, "Avg",
                                "Hscore", "H(P, T)")  # fmt: skip
    assert found[0].title == "Table 1: LLaVA-1.5-7B fine-tuned on Flickr30k (Hscore = H(P, Avg))"
    assert found[3].title == "Table 2: MiniCPM-V-2.0 fine-tuned on TextCaps (Hscore = H(Avg, T))"
    assert [line.label for line in found[0].lines] == [
        "Zero-shot", "Fine-tune", "LoRA", "Model Tailor", "MDGD", "w/o visual align", "MDGD-GM",
    ]  # fmt: skip
    assert all(line.state == "not run" and not line.ours for table in found for line in table.lines)


@pytest.mark.parametrize("number", range(4))
def test_published_values_ours_and_differences(number, tmp_path):
    folder = write_results(tmp_path)
    table = comparisons(folder)[number]
    experiment = list(published().values())[number]
    for found in table.lines:
        (a, printed), (b, measured), (c, apart) = found.rows(table.columns)
        assert (a, b, c) == ("published", "ours", "difference")
        row = experiment.rows[found.method]
        kept = sum(row.scores[task] for task in experiment.kept) / len(experiment.kept)
        expected = [*row.scores.values(), kept, row.average, row.hscore]
        assert [float(cell) for cell in printed[:-1]] == pytest.approx(expected, abs=0.0051)
        shift = SHIFT.get(found.method, 1.0)
        assert [float(cell) for cell in measured[: len(row.scores)]] == pytest.approx(
            [max(0, score + shift) for score in row.scores.values()], abs=0.0051
        )
        others = {*experiment.incomparable, *row.incomparable}
        for task, d in zip(experiment.tasks, apart, strict=False):
            assert (d == "–") == (task in others)
        assert (apart[-4] == "–") == bool(row.incomparable)
        assert apart[-3:] == ["–"] * 3, "they hold the target"
        for p, m, d in zip(printed, measured, apart, strict=True):
            if d == "–":
                continue
            assert float(d) == pytest.approx(float(m) - float(p), abs=0.0101)
            assert d[0] in "+-"


def test_what_the_hub_lacks_of_a_set_is_not_compared():
    """IconQA's pictures to choose from, without which nine of ten questions that ask for one are left out."""
    for experiment in published().values():
        assert ("iconqa" in experiment.incomparable) == ("iconqa" in experiment.pretrained)
        assert "iconqa" not in experiment.kept


def test_every_target_is_of_another_quantity_and_its_note_says_why():
    for name, experiment in published().items():
        assert experiment.target in experiment.incomparable, name
        assert all(len(why) > 20 for why in experiment.incomparable.values())
        zoo = experiment.rows["zero-shot"].incomparable
        assert set(zoo) == ({"vizwiz", "pope"} if name.startswith("llava") else set())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": 4}, "layers"),
        ({"source": "/elsewhere"}, "source"),
        ({"training": {"learning_rate": 1e-5}}, "training.learning_rate"),
        ({"training": {"batch": 2}}, "training.batch"),
        ({"methods": {"mdgd": {"align": 10.0, "regularize": 1.0}}}, "mdgd.align"),
        ({"evaluation": {"examples": 100}}, "evaluation.examples"),
    ],
)
def test_a_row_with_other_settings_has_no_difference(changes, named, tmp_path):
    run = only(tmp_path)
    configuration = json.loads((run.folder / "config.json").read_text())["configuration"]
    for key, value in changes.items():
        configuration[key] = configuration[key] | value if isinstance(value, dict) else value
    change(run, "config.json", configuration=configuration)
    kinds = [kind for kind, _ in line(tmp_path).rows(comparisons(tmp_path)[0].columns)]
    assert kinds == ["published", "ours", f"other {named}"]
    assert any("other settings" in note for note in comparisons(tmp_path)[0].notes)


def test_what_results_do_not_depend_on_is_no_other_setting(tmp_path):
    run = only(tmp_path)
    configuration = json.loads((run.folder / "config.json").read_text())["configuration"]
    configuration["evaluation"] |= {"batch": 3, "beams": 3}
    # The same step in more passes, as a row is told to take that had no room in memory.
    configuration["training"] |= {"batch": 2, "accumulation": 32}
    configuration["seed"] = 5
    change(run, "config.json", configuration=configuration)
    assert not line(tmp_path).changed


@pytest.mark.parametrize(("commit", "told"), [("b" * 40, True), ("a" * 40, False), (None, False)])
def test_runs_of_two_commits_of_the_weights_are_told_apart(commit, told, tmp_path):
    for method, weights in (("zero-shot", "a" * 40), ("mdgd", commit)):
        change(only(tmp_path, method), "config.json", weights=weights)
    notes = comparisons(tmp_path)[0].notes
    assert any("mdgd (commit of the weights)" in note for note in notes) == told


def test_our_summaries_are_of_our_scores(tmp_path):
    folder = write_results(tmp_path, [FLICKR])
    ours = line(folder).ours
    tasks = [ours[column] for column in comparisons(folder)[0].columns[:7]]
    kept, average = sum(tasks[:6]) / 6, sum(tasks) / 7
    assert ours["Avg"] == pytest.approx(average)
    assert ours["Hscore"] == pytest.approx(2 * kept * average / (kept + average))
    assert ours["H(P, T)"] == pytest.approx(2 * kept * tasks[6] / (kept + tasks[6]))


def test_smoke_runs_have_no_difference(tmp_path):
    folder = write_results(tmp_path, [FLICKR], ["mdgd"], smoke=True)
    table = comparisons(folder)[0]
    assert [kind for kind, _ in line(folder).rows(table.columns)] == ["published", "smoke"]
    assert any("random models" in note for note in table.notes)
    assert "│ smoke " in text(folder)
    assert "difference" not in text(folder)
    assert "| ours |" not in markdown(folder)


def test_an_unfinished_run_says_so(tmp_path):
    run = only(tmp_path)
    change(run, "status.json", stage="evaluation")
    (run.folder / "evaluation" / "pope.json").unlink()
    found = line(tmp_path)
    assert found.state == "unfinished: evaluation"
    assert "POPE" not in found.ours
    # A mean over fewer tasks would not compare.
    assert not {"Avg", "Hscore", "H(P, T)"} & set(found.ours)
    rows = dict(found.rows(comparisons(tmp_path)[0].columns))
    assert rows["ours"][4] == rows["difference"][4] == rows["ours"][-1] == "–"
    assert "unfinished: evaluation" in text(tmp_path)
    (run.folder / "status.json").unlink()
    assert line(tmp_path).state == "unfinished: begun"


def test_methods_beyond_the_paper_come_last(tmp_path):
    run = only(tmp_path)
    run.folder.rename(run.folder.with_name("ewc"))
    change(Result(tmp_path / FLICKR / "ewc"), "config.json", method="ewc", method_title="EWC")
    table = comparisons(tmp_path)[0]
    assert [found.label for found in table.lines][-1] == "EWC"
    assert [kind for kind, _ in table.lines[-1].rows(table.columns)] == ["ours"]


def test_an_experiment_of_ones_own(tmp_path):
    run = only(tmp_path, experiment="minicpm-textcaps")
    (tmp_path / "minicpm-textcaps").rename(tmp_path / "mine")
    change(Result(tmp_path / "mine" / run.method), "config.json", title="A model of mine")
    table = comparisons(tmp_path)[4]
    assert table.title == "A model of mine"
    assert table.columns[-2:] == ("Avg", "H(P, T)")
    assert table.lines[0].ours["TextCaps"] == pytest.approx(28.9 + SHIFT["mdgd"])


def test_what_one_has_to_know_is_noted(tmp_path):
    run = only(tmp_path)
    change(run, "evaluation/flickr30k.json", scores={"score": 70.0, "cider_no_ptb": 70.0})
    configuration = json.loads((run.folder / "config.json").read_text())["configuration"]
    change(run, "config.json", configuration=configuration | {"evaluation": {"examples": 100}})
    first, second, *_ = comparisons(tmp_path)[0].notes
    change(run, "config.json", configuration=configuration | {"training": {"steps": 10}})
    assert "for a set number of steps" in comparisons(tmp_path)[0].notes[1]
    assert "Penn Treebank" in first
    assert "a sample of each task" in second
    assert first in markdown(tmp_path)


def test_markdown_is_a_table(tmp_path):
    lines = markdown(write_results(tmp_path)).splitlines()
    rows = [row for row in lines if row.startswith("|")]
    # A head and a rule for each of four tables, and three rows a system.
    assert len(rows) == 4 * 2 + 26 * 3
    assert {row.count("|") for row in rows} == {15, 16}
    assert "| MDGD | published | 1.2B | 67.71 |" in markdown(tmp_path)
    assert "|  | ours | 1,235,279,872 | 68.46 |" in markdown(tmp_path)
    assert "|  | difference |  | +0.75 |" in markdown(tmp_path)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileError, match="there is no folder"):
        read_results(tmp_path / "nowhere")
    run = only(tmp_path)
    (run.folder / "evaluation" / "gqa.json").write_text("{")
    with pytest.raises(FileError, match=r"gqa.json is not a JSON file"):
        comparisons(tmp_path)


def test_a_log_that_a_kill_cut_off(tmp_path):
    run = only(tmp_path)
    whole = run.training
    with (run.folder / "training.jsonl").open("a") as file:
        file.write('{"step": 405, "lo')
    assert Result(run.folder).training == whole
    with (run.folder / "training.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(FileError, match="line 81 is not JSON"):
        _ = Result(run.folder).training


def test_broken_features_are_named(tmp_path):
    run = only(tmp_path)
    assert run.features("vizwiz")["visual"].shape == (24, 16)
    assert run.features("okvqa") == {}
    (run.folder / "features" / "vizwiz.safetensors").write_text("no tensors")
    with pytest.raises(FileError, match=r"vizwiz\.safetensors is not a safetensors file"):
        run.features("vizwiz")
