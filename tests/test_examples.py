"""Every example runs as it stands, and its visual loss begins at zero and then does not."""

import re
import runpy
from pathlib import Path

import pytest

from tests import accelerate_state

EXAMPLES = Path(__file__).parents[1] / "examples"
# Those of DeepSpeed are run in two processes, by tests/distributed/test_deepspeed.py.
OTHERS = ("tiny", "deepspeed")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if not any(other in path.stem for other in OTHERS))


@pytest.fixture(autouse=True)
def fresh_state():
    with accelerate_state.fresh():
        yield


def test_there_are_examples():
    names = {
        "accelerate_loop",
        "ddp",
        "float16",
        "forgetting_report",
        "fsdp",
        "fsdp2_trainer",
        "hook_api",
        "lightning_module",
        "lora",
        "own_rule",
        "trainer",
        "trl_sft",
        "two_lines",
    }
    assert names <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name, tmp_path, monkeypatch, capsys):
    if name == "trl_sft":
        pytest.importorskip("trl", reason="TRL needs Python 3.11")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    visual = [float(x) for x in re.findall(r"visual loss (\d+\.\d+)", printed)]
    assert visual[-1] > 0
    assert len(re.findall(r"loss \d+\.\d+", printed)) >= 3
    if name == "own_rule":
        assert "the resumed run is the uninterrupted one: True" in printed
