"""``python -m tests.golden record FILE`` and ``compare FILE``: the same bits before and after a change, on one machine.

CI compares with the committed file to rounding, since another processor may add up in another order.
"""

import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.golden.runs import everything
from tests.properties import bits


def main(verb: str, file: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = everything(Path(folder))
    if verb == "record":
        save_file(found, file)
        print(f"{len(found)} tensors written to {file}")
        return 0
    wanted = load_file(file)
    absent = sorted(wanted.keys() ^ found.keys())
    changed = [
        name
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name].shape != found[name].shape or not bits(wanted[name]).equal(bits(found[name]))
    ]
    for name in absent + changed:
        print(name)
    print(f"{len(wanted)} tensors: {len(changed)} changed, {len(absent)} on one side only")
    return bool(absent or changed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
