"""README and the pages of docs/: their code runs, their links lead somewhere, their names are those of the library."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import torch_mdgd

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
# Its program is run by tests/delta/test_format.py, on a file.
ELSEWHERE = {"docs/delta.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def namespace(monkeypatch, folder):
    """What the pages call by name: a small model, its parameters and data, and the model that it was."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(folder)
    tiny = __import__("tiny")
    model = tiny.make_model()
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return {
        "torch": torch,
        "model": model,
        "base_model": copy.deepcopy(model),
        "parameters": parameters,
        "loader": DataLoader(tiny.make_samples(8), batch_size=2),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(read(page)) and page not in ELSEWHERE])
def test_code_runs(page, tmp_path, monkeypatch):
    names = namespace(monkeypatch, tmp_path)
    for i, match in enumerate(BLOCK.finditer(read(page))):
        exec(compile(match[1], f"{page}, block {i}", "exec"), names)


def test_the_site_builds_without_a_warning(tmp_path):
    """Every link of every page leads somewhere, on the site too, and every docstring of the API is read."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site" / "api").rglob("*.html"))
    for name in set(torch_mdgd.__all__) - {"delta", "masks", "rules"}:
        assert re.search(rf'<h\d id="torch_mdgd\.[\w.]*\b{name}"', api), f"{name} is on no page of the API"
