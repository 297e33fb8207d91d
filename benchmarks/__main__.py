"""``python -m benchmarks``: see :mod:`benchmarks.commands`; with ``gpu``, ``compare`` or ``goals`` that module."""

import sys

if __name__ == "__main__":
    # Apart, for gpu has to run where nothing is installed that pictures and peers need.
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks import gpu

        gpu.main(sys.argv[2:])
    elif sys.argv[1:2] == ["compare"]:
        from benchmarks import compare

        sys.exit(compare.main(sys.argv[2:]))
    elif sys.argv[1:2] == ["goals"]:
        from benchmarks import goals

        goals.main(sys.argv[2:])
    else:
        from benchmarks import commands

        commands.main()
