"""The program for a GPU, made tiny and run on what is here."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.warns(UserWarning, match="Anchor holds linear layers"):
        gpu.main(["--small", "--out", str(folder)])
    return folder


def test_every_table_is_there_and_its_numbers_are_finite(results: Path) -> None:
    (path,) = results.glob("gpu-*.json")
    page = json.loads(path.read_text(encoding="utf-8"))
    assert not page["measured"]
    assert len(page["checks"]) == 4 * len(gpu.DTYPES)
    assert all(row["holds"] for row in page["checks"])
    assert [row["way"] for row in page["training"]] == list(gpu.ways())
    assert {row["mask"] for row in page["mask"]} == {"copy", "torch_mdgd", "torch.topk"}
    assert len(page["bandwidth"]) == 12
    for row in page["training"]:
        assert math.isfinite(float(row["steps"].replace(",", "")))
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "not a measurement" in text
    assert all(name in text for name in gpu.ways())


def test_it_needs_torch_and_transformers_alone() -> None:
    seen, left = set(), ["benchmarks.gpu"]
    others = set()
    while left:
        name = left.pop()
        seen.add(name)
        for other in imported(ROOT / f"{name.replace('.', '/')}.py"):
            if other.startswith("benchmarks.") and other not in seen:
                left.append(other)
            elif other.split(".")[0] not in {*sys.stdlib_module_names, "benchmarks"}:
                others.add(other.split(".")[0])
    assert others <= {"torch", "torch_mdgd", "transformers", "triton"}


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.kernels.inner_products
    monkeypatch.setattr(gpu.kernels, "inner_products", lambda *rows: right(*rows) * (1 + 1e-4))
    found = {row["operation"]: row["holds"] for row in gpu.checks(gpu.SMALL, torch.device("cpu"))}
    assert found == {"inner_products": False, "combine_": True, "masks": True, "similarity masks": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--small" in capsys.readouterr().err
