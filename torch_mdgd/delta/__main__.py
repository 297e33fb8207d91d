"""``python -m torch_mdgd.delta``: ``show FILE``, what a delta holds; ``export BASE DELTA OUT``, a folder to serve."""

import argparse
import sys

from torch_mdgd.delta.adapter import export_adapter
from torch_mdgd.delta.export import export_checkpoint
from torch_mdgd.delta.file import Delta, read


def describe(delta: Delta) -> str:
    """A line for each changed parameter and each buffer, below the totals."""
    total = sum(x.numel for x in delta.parameters.values())
    lines = [
        f"base      {delta.base}",
        f"changed   {delta.elements:,} of {total:,} elements, in {len(delta.changes)} of {len(delta.parameters)} "
        "parameters",
        f"buffers   {len(delta.buffers)}",
        "",
    ]
    rows = [
        (name, f"{delta.changes[name][1].numel():,} of {x.numel:,}", str(x))
        for name, x in delta.parameters.items()
        if name in delta.changes
    ]
    rows += [
        (name, f"{x.numel():,}", f"buffer, {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}")
        for name, x in delta.buffers.items()
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines += [f"{name:<{widths[0]}}  {count:>{widths[1]}}  {kind}" for name, count, kind in rows]
    return "\n".join(lines).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_mdgd.delta", description="Look into a delta, or export it.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print which parameters a delta changes, and its base model's fingerprint")
    show.add_argument("file", metavar="FILE")
    export = commands.add_parser("export", help="write base + delta as a folder that transformers and servers load")
    for name, told in (("base", "folder of the base model"), ("delta", "file"), ("out", "folder to be made")):
        export.add_argument(name, metavar=name.upper(), help=told)
    export.add_argument("--adapter", action="store_true", help="write a SHiRA adapter of peft instead")
    given = parser.parse_args(arguments)
    try:
        if given.command == "show":
            print(describe(read(given.file)))
        else:
            write = export_adapter if given.adapter else export_checkpoint
            print(write(given.base, given.delta, given.out))
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
