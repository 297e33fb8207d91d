"""``python -m benchmarks``: see :mod:`benchmarks.commands`; with ``gpu`` or ``compare`` the module of that name."""

import sys

if __name__ == "__main__":
    # Apart, for it has to run where nothing is installed that pictures and peers need.
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks import gpu

        gpu.main(sys.argv[2:])
    elif sys.argv[1:2] == ["compare"]:
        from benchmarks import compare

        sys.exit(compare.main(sys.argv[2:]))
    else:
        from benchmarks import commands

        commands.main()
