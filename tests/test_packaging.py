"""What is released: one package, which needs torch alone and works where nothing else is installed."""

import inspect
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import torch_mdgd
import torch_mdgd.report

ROOT = Path(__file__).resolve().parent.parent

USE = """
import importlib.util

import torch
from torch_mdgd import MDGD, MDGDOptimizer

for name in ("transformers", "numpy", "matplotlib", "reproductions", "benchmarks"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported: the environment is not empty"

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
x, target, seen = torch.randn(16, 4), torch.randn(16, 3), torch.randn(16, 8)

def capture_both(optimizer):
    with optimizer.capture("visual"):
        (model[0](x) - seen).abs().mean().backward()
    with optimizer.capture("task"):
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
    return loss.item()

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer = MDGDOptimizer(optimizer, MDGD(align=1.0, regularize=1.0))

losses = []
for _ in range(20):
    losses.append(capture_both(optimizer))
    with optimizer.reference():
        capture_both(optimizer)
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0], losses
"""


def run(*command: object, cwd: Path) -> str:
    """Runs a command away from the sources; its whole output stands in the failure."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """Built from the sdist, which is then whole."""
    (built,) = dist.glob("*.whl")
    return built


def dist_info(wheel: Path) -> str:
    """The metadata's folder, which the name of the wheel tells: NAME-VERSION-TAGS.whl."""
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def closure(name: str) -> set[str]:
    """The name of a distribution and of all that it requires here; of extras those that are in brackets behind it."""
    found: set[Requirement] = set()
    pending = [Requirement(name)]
    while pending:
        asked = pending.pop()
        if asked not in found:
            found.add(asked)
            needs = [Requirement(line) for line in distribution(asked.name).requires or []]
            for need in needs:
                marker, need.marker = need.marker, None
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in asked.extras or {""}):
                    pending.append(need)
    return {canonicalize_name(asked.name) for asked in found}


def lend(name: str, site_packages: Path) -> None:
    """Links an installed distribution's top-level files and folders, its metadata among them."""
    installed = distribution(name)
    tops = {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}
    for top in tops:
        if not (site_packages / top).exists():
            (site_packages / top).symlink_to(Path(str(installed.locate_file(top))).resolve())


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"torch_mdgd", dist_info(wheel)}

    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "torch_mdgd").rglob("*.py")}
    assert {name for name in names if name.startswith("torch_mdgd/")} == sources | {"torch_mdgd/py.typed"}


def metadata(wheel: Path) -> Message:
    return HeaderParser().parsestr(zipfile.ZipFile(wheel).read(f"{dist_info(wheel)}/METADATA").decode())


def test_an_index_would_take_them(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=dist)
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert tops == {"torch_mdgd", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}


def test_metadata_and_notes_tell_of_one_release(wheel: Path) -> None:
    told = metadata(wheel)
    version = told["Version"]
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Summary"]
    assert len(told["Keywords"].split(",")) >= 5
    assert "https://arxiv.org/abs/2502.11740" in "".join(told.get_all("Project-URL", []))
    assert re.search(rf"^## \[{re.escape(version)}\] – \d{{4}}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)
    assert f"version: {version}\n" in read("CITATION.cff")
    torch_needed = next(x for x in told.get_all("Requires-Dist", []) if x.startswith("torch>"))
    assert torch_needed.replace(">=", " >= ") in read("README.md")


def test_readme_and_citation_file_cite_one_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    paper, bibtex = citation["preferred-citation"], " ".join(read("README.md").split())
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(authors) in bibtex
    assert paper["title"] in bibtex.replace("{MLLM}", "MLLM")
    assert f"year = {{{paper['year']}}}" in bibtex


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_wheel_requires_torch_alone(wheel: Path) -> None:
    needs = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    always = [str(need) for need in needs if need.marker is None or "extra" not in str(need.marker)]
    assert always == ["torch>=2.10"]


def test_wheel_works_beside_torch_alone(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    for name in closure("torch"):
        lend(name, site_packages)

    # With its dependencies and no index: pip itself refuses if anything but what was lent is needed.
    run(sys.executable, "-m", "pip", "--python", python, "--isolated", "install", "--no-index", wheel, cwd=tmp_path)
    run(python, "-I", "-c", USE, cwd=tmp_path)


IMPORT_ALL = """
import importlib, pkgutil, sys

sys.path[:0] = sys.argv[2:]
package = importlib.import_module(sys.argv[1])
names = [x.name for x in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
assert names
for name in names:
    # The harness's own process has lmms-eval, which is installed beside this.
    if not name.endswith(("__main__", ".run.harness")):
        importlib.import_module(name)
"""


@pytest.mark.parametrize("extra", ["mini", "paper"])
def test_an_extra_brings_all_that_is_imported(extra: str, tmp_path: Path) -> None:
    for name in closure(f"torch-mdgd[{extra}]"):
        lend(name, tmp_path)
    run(sys.executable, "-I", "-S", "-c", IMPORT_ALL, f"reproductions.{extra}", tmp_path, ROOT, cwd=tmp_path)


DOCUMENTED = {
    name: found
    for module in (torch_mdgd, torch_mdgd.rules, torch_mdgd.masks, torch_mdgd.delta, torch_mdgd.report)
    for name, found in vars(module).items()
    if (inspect.isclass(found) or inspect.isfunction(found)) and found.__module__.startswith("torch_mdgd")
    if not name.startswith("_")
}


def test_all_that_is_exported_is_documented() -> None:
    exported = {*torch_mdgd.__all__, *torch_mdgd.rules.__all__, *torch_mdgd.masks.__all__}
    assert exported - DOCUMENTED.keys() == {"delta", "masks", "rules"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings_list_every_argument_in_the_order_of_the_signature(name: str) -> None:
    documented = DOCUMENTED[name]
    signature = list(inspect.signature(documented).parameters)
    section = re.search(r"^Args:\n(.*?)(?:\n\n(?=\S)|\Z)", inspect.getdoc(documented) or "", re.DOTALL | re.MULTILINE)
    assert section is not None or not signature
    assert not signature or re.findall(r"^    (\w+):", section[1], re.MULTILINE) == signature
