"""Compare finished runs: `python -m common.report compare outputs/*`. Nothing is computed anew.

--format rich|markdown|csv|latex     how (rich: for a terminal)
--against NAME                       a row's name, or a part of it: the others' differences from it on the same images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.report import compare, folders, groups
from common.report.console import show
from common.runtime import utf8
from common.types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 if a folder holds no finished run."""
    parser = argparse.ArgumentParser(
        prog="python -m common.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("compare", help="runs side by side, seeds together")
    table.add_argument("folders", nargs="+", type=Path)
    table.add_argument("--format", choices=compare.FORMATS, default="rich")
    table.add_argument("--against", metavar="NAME")
    chosen = parser.parse_args(arguments)
    try:
        runs = folders.find(chosen.folders)
        together, strangers = groups.group(runs), [run for run in runs if not run.values]
        found = compare.build(together, strangers, chosen.against)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.format == "rich":
        show(found)
    else:
        print(compare.render(found, chosen.format), end="")
    return 0 if compare.complete(together, strangers) else 1


if __name__ == "__main__":
    utf8.ensure()
    sys.exit(main())
