"""Every optimizer of torch in each of its configurations, wrapped, is the bare one where d = g."""

import subprocess
import sys
from pathlib import Path


def test_wrapped_as_bare():
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.every_configuration"]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    *different, last = found.stdout.splitlines()
    assert different == []
    # 91 and their variants are known; another version may have some more or less.
    assert int(last.removesuffix(" configurations")) >= 87
