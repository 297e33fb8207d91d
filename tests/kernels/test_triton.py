"""The Triton backend without a GPU: run by the interpreter, and compiled for three generations of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SUITE = ["interpreted.py", "test_inner_products.py", "test_combine.py", "test_top_k.py"]


def start(*arguments, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    # Neither a pytest-xdist worker nor a coverage run of its own.
    inherited = {name: value for name, value in inherited.items() if not name.startswith(("PYTEST_XDIST", "COV_"))}
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=inherited | environment, text=True, **pipes)


def run(*arguments, **environment):
    return finish(start(*arguments, **environment))


def finish(process):
    out, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.fixture(scope="module", autouse=True)
def compiling(tmp_path_factory):
    """Beside all other tests of this file, since it takes as long as they do."""
    cache = tmp_path_factory.mktemp("triton")
    with start("-m", "tests.kernels.compile_kernels", TRITON_CACHE_DIR=str(cache)) as process:
        yield process
        process.kill()


def test_the_kernel_tests_pass_in_the_interpreter():
    files = [str(HERE / name) for name in SUITE]
    done = run("-m", "pytest", "-v", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "[triton" in done.stdout
    assert "[eager" not in done.stdout
    # Rounding to bfloat16, which the interpreter does not do.
    assert re.search(r"\d\d passed, 1 skipped", done.stdout), done.stdout[-500:]


@pytest.fixture(scope="module")
def compiled(compiling):
    done = finish(compiling)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def failing(compiled, holds):
    return [f"{row['kernel']} for {row['architecture']}" for row in compiled if not holds(row)]


def test_every_kernel_compiles_for_every_generation(compiled):
    assert len({row["kernel"] for row in compiled}) > 20
    functions = {row["function"] for row in compiled}
    assert len(functions) == 7
    assert {(row["function"], row["architecture"]) for row in compiled} == {
        (name, architecture) for name in functions for architecture in ("sm_80", "sm_90", "sm_100")
    }


def test_nothing_is_spilled_or_kept_in_local_memory(compiled):
    assert not failing(compiled, lambda row: row["spills"] == row["stack"] == row["local"] == 0)


def test_aligned_tensors_are_read_and_written_128_bits_at_a_time_and_once(compiled):
    assert not failing(compiled, lambda row: row["wide_loads"] == row["wanted_loads"])
    assert not failing(compiled, lambda row: row["wide_stores"] == row["wanted_stores"])
