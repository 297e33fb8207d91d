"""README and the pages of docs/: their code runs, their links lead somewhere, and they say what the sources say."""

import ast
import copy
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import torch_mdgd
from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, Random, mdgd_backward

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
READMES = ["README.md", "CONTRIBUTING.md", "reproductions/README.md", "benchmarks/README.md"]
PAGES = [*READMES, *DOCS]
# The program of the first is run by tests/delta/test_format.py, on a file; those of the second have a test below; those
# of the third need frameworks and weights, and tests of the integrations take their place.
ELSEWHERE = {"docs/delta.md", "docs/distributed.md", "docs/recipes.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
STUDY = "reproductions/mini/results/study"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def rows(text):
    """Cells of the rows of all tables, the words of links in the place of links."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line).split(" | ")] for line in lines]


def in_code(page):
    """The page's code: spans, blocks, and its blocks without markup."""
    text = read(page)
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return blocks, SPAN.findall(re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the pages' code calls by name: a small model, its parameters and data, and the model that it was."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    tiny = import_module("tiny")
    model = tiny.make_model()
    model.model.vision_tower.requires_grad_(False)
    return {
        "torch": torch,
        "model": model,
        "base_model": copy.deepcopy(model),
        "parameters": [p for p in model.parameters() if p.requires_grad],
        "loader": DataLoader(tiny.make_samples(8), batch_size=2),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(read(page)) and page not in ELSEWHERE])
def test_code_runs(page, names):
    for i, match in enumerate(BLOCK.finditer(read(page))):
        exec(compile(match[1], f"{page}, block {i}", "exec"), names)


DISTRIBUTED = "docs/distributed.md"


@pytest.mark.parametrize("block", [block for block in BLOCK.findall(read(DISTRIBUTED)) if "eepspeed" not in block])
def test_code_of_several_processes_runs_with_one(block, names, tmp_path):
    """Each block begins anew: a model is either in DDP or sharded. DeepSpeed's engine has tests of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        base = torch.optim.AdamW(names["parameters"], lr=1e-2)
        optimizer = MDGDOptimizer(base, MDGD(regularize=0))
        mdgd_backward(names["model"], optimizer, next(iter(names["loader"])))
        optimizer.step()
        optimizer.zero_grad()
        if "no_sync" in block:
            names["model"] = DistributedDataParallel(names["model"])
        exec(
            compile(block, DISTRIBUTED, "exec"),
            {
                **vars(torch_mdgd), **names, "AdamW": torch.optim.AdamW, "dcp": dcp, "fully_shard": fully_shard,
                "device": "cpu", "local_rank": None, "folder": str(tmp_path), "optimizer": optimizer,
                # On the CPU there are no device numbers.
                "DistributedDataParallel": lambda model, device_ids=None: DistributedDataParallel(model),
            },
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(read(page))])
def test_what_code_imports_of_the_package_is_there(page):
    """Read, and not imported: an integration may need its framework."""
    for block in BLOCK.findall(read(page)):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_mdgd":
                path = ROOT / node.module.replace(".", "/")
                source = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
                defined = {x.id for x in ast.walk(source) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
                defined |= {x.name for x in ast.walk(source) if isinstance(x, ast.FunctionDef | ast.ClassDef)}
                defined |= {x.asname or x.name for x in ast.walk(source) if isinstance(x, ast.alias)}
                defined |= {x.stem for x in path.glob("*")}
                assert {alias.name for alias in node.names} <= defined, node.module


def test_the_site_builds_without_a_warning(tmp_path):
    """So links and anchors of its pages lead somewhere, and docstrings of the API can be read."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "api").rglob("*.html"))
    shown = set(re.findall(r'<h\d id="torch_mdgd\.(?:\w+\.)*(\w+)"', api))
    assert {*torch_mdgd.__all__, *torch_mdgd.delta.__all__, *torch_mdgd.masks.__all__} - shown == {
        "delta", "fingerprint", "masks", "rules",
    }  # fmt: skip
    assert ":class:`" not in api


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", read(page)):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_calls_in_the_text_fit_the_signatures(page):
    """Such as ``MDGD(α, regularize=0)``: what is named is exported, and its keywords are its arguments."""
    for span in in_code(page)[1]:
        try:
            call = ast.parse(span, mode="eval").body
        except SyntaxError:
            continue
        if isinstance(call, ast.Call) and is_name(call) and call.func.id in torch_mdgd.__all__:
            placeholders = [None] * len(call.args)
            inspect.signature(getattr(torch_mdgd, call.func.id)).bind_partial(
                *placeholders, **{word.arg: None for word in call.keywords}
            )


def is_name(call):
    return isinstance(call.func, ast.Name) and not any(isinstance(x, ast.Starred) for x in call.args)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_extras_are_there(page):
    text = read(page)
    makefile = read("Makefile")
    blocks, spans = in_code(page)
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join([*blocks, *spans])):
        if target.startswith("example-"):
            assert (ROOT / "examples" / "frameworks" / target.removeprefix("example-") / "run.sh").is_file(), target
            target = "example-%"
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    project = read("pyproject.toml")
    for extra in re.findall(r"\.\[([a-z]+)\]", text):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    for module in re.findall(r"python -m ((?:reproductions|benchmarks|torch_mdgd|docs)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").exists() or path.with_suffix(".py").exists(), module


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_tables_name_every_rule(page):
    named = {cell.split("(")[0].strip("`") for row in rows(read(page)) for cell in row[:1]}
    assert set(torch_mdgd.rules.__all__) - named == {"Rule"}


@pytest.mark.parametrize("page", ["README.md", "docs/masks.md"])
def test_tables_name_every_mask(page):
    named = {cell.removeprefix("`mask=").split("(")[0].strip("`") for row in rows(read(page)) for cell in row[:1]}
    assert set(torch_mdgd.masks.__all__) - named == {"Mask", "ScoreInputs"}


def test_contributing_names_every_room():
    named = {row[0].strip("`").rstrip("/") for row in rows(read("CONTRIBUTING.md"))}
    there = {path.name for path in (ROOT / "torch_mdgd").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - named <= {"__init__.py", "__pycache__", "py.typed"}


@pytest.mark.parametrize("page", PAGES)
def test_files_in_the_text_are_there(page):
    """Such as ``torch_mdgd/models/families.py``; results of runs are not."""
    for span in in_code(page)[1]:
        if re.fullmatch(r"(torch_mdgd|tests|docs|examples|reproductions|benchmarks)/[\w/.-]*", span):
            assert (ROOT / span).exists(), span


# Numbers.


@pytest.mark.parametrize(("page", "columns"), [("README.md", (2,)), ("docs/choosing.md", (2, 3))])
def test_passes_in_the_tables_are_those_that_are_run(page, columns, names, monkeypatch):
    model, batch = names["model"], next(iter(names["loader"]))
    counts, backward = [0, 0], torch.autograd.backward
    model.model.language_model.register_forward_pre_hook(lambda *_: count(counts, 0))
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (count(counts, 1), backward(*a, **k))[1])
    known = {**vars(torch_mdgd), "model": model, "α": 1.0, "restore": 0.1}
    tried = 0
    for row in rows(read(page)):
        told = "+".join(row[i] for i in columns) if len(row) > columns[-1] else ""
        if not re.fullmatch(r"\d\+\d", told):
            continue
        optimizer = MDGDOptimizer(torch.optim.SGD(names["parameters"], lr=0.1), eval(row[0].strip("`"), known))
        counts[:] = 0, 0
        mdgd_backward(model, optimizer, batch)
        optimizer.zero_grad()
        assert told == "+".join(map(str, counts)), row[0]
        tried += 1
    assert tried == 6


def count(counts, i):
    counts[i] += 1


def test_diagnostics_in_the_table_are_those_that_there_are(names):
    (table,) = re.findall(r"\| key \| meaning \|\n(?:\|.*\n)+", read("docs/choosing.md"))
    there = set()
    for rule in (MDGD(), DriftBudget(MDGD(regularize=0), 0.1)):
        base = torch.optim.SGD(names["parameters"], lr=0.1)
        optimizer = MDGDOptimizer(base, rule, mask=None if rule.weights["regularize"] else Random(0.5))
        mdgd_backward(names["model"], optimizer, next(iter(names["loader"])))
        there |= optimizer.diagnostics.keys()
        optimizer.zero_grad()
    assert {key for row in rows(table)[2:] for key in SPAN.findall(row[0])} == there


def test_families_in_the_readme_are_those_of_the_table():
    told = [row[-1] for row in rows(read("docs/families.md")) if len(row) == 5][1:]
    run = sum(bool(re.match(r"\d+ forward", cell)) for cell in told)
    refused = sum(row[1] == "refused" for row in rows(read("docs/families.md")) if len(row) == 5)
    assert f"{run} of {len(told)} [model families]" in " ".join(read("README.md").split())
    assert f"of transformers run; {refused} are refused" in read("README.md")


def test_strength_to_begin_with_is_the_default():
    row = next(row for row in rows(read("docs/choosing.md")) if row[0].startswith("`strength`"))
    assert float(row[1]) == inspect.signature(Anchor).parameters["strength"].default


def test_readme_is_read_once():
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    # The bars of tables are no words.
    assert len(text.replace("|", " ").split()) <= 1200


def test_results_in_the_readme_are_the_committed_ones():
    summary = next(x for x in read(f"{STUDY}/tables.md").split("\n\n") if x.startswith("| system | digits, AdamW: T"))
    committed = {row[0]: row[1:7] for row in rows(summary)}
    shown = [row for row in rows(read("README.md")) if len(row) == 7 and row[0] in committed]
    assert 5 <= len(shown) <= 8
    for row in shown:
        assert row[1:] == committed[row[0]], row[0]


def in_words(cell):
    """A verdict as docs/evidence.md tells it, from the cell of verdicts.md."""
    if "not measured" in cell:
        return "not run"
    outcome = re.search(r"\*\*(.*?)\*\*", cell)[1].removesuffix(" here")
    alone = re.search(r"(holds|does not hold) here before the correction", cell)
    return f"{outcome}; alone {alone[1]}" if alone else outcome


def by_cell(text):
    """Of all tables of claims: the cell of each claim and column, by both names."""
    columns, found = [], {}
    for first, *rest in rows(text):
        if first == "claim":
            columns = rest
        elif columns and len(rest) == len(columns):
            found |= {(first, column): cell for column, cell in zip(columns, rest, strict=True)}
    return found


def test_verdicts_in_words_are_the_committed_ones():
    committed, shown = by_cell(read(f"{STUDY}/verdicts.md")), by_cell(read("docs/evidence.md"))
    assert len(shown) > 80
    for place, outcome in shown.items():
        assert outcome == in_words(committed.get(place, "not measured")), place


def test_points_lost_in_the_faq_are_the_committed_ones():
    claim = next(row for row in rows(read(f"{STUDY}/verdicts.md")) if row[0].startswith("Fine-tuning forgets"))
    lost = sorted(round(float(re.search(r"ΔP -([\d.]+)", cell)[1])) for cell in claim[2:])
    assert f"lost {lost[0]} to {lost[-1]} points" in read("docs/faq.md")


RESULTS = sorted((ROOT / "reproductions" / "mini" / "results").rglob("*.md"))


def test_tables_of_the_experiments_are_the_committed_ones():
    """That of the study is held by tests/reproductions/mini/test_report.py."""
    shown = read("reproductions/README.md").splitlines()
    demo, strength = (tables(read(f"reproductions/mini/results/{name}")) for name in ("demo/demo.md", "strength.md"))
    assert set(demo) <= set(shown)
    # Some of the strengths, whole rows.
    begin, end = shown.index("## The anchor's strength"), shown.index("## The study")
    told = tables("\n".join(shown[begin:end]))
    assert len(told) > 20
    assert set(told) <= set(strength)


def tables(text):
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", ["README.md", "reproductions/README.md", *DOCS])
def test_decimals_with_a_spread_or_a_sign_are_in_a_committed_result(page):
    """Such as +2.7 ± 1.4: a score is not written from memory."""
    committed = set(re.findall(r"\d+\.\d+", "".join(path.read_text(encoding="utf-8") for path in RESULTS)))
    told = re.findall(r"(?:[−+]|± )(\d+\.\d+)|(\d+\.\d+) ±", read(page))
    assert {number for pair in told for number in pair if number} <= committed
