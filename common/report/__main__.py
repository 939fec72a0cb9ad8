"""Compare, draw and check finished runs. Everything is read from their folders; nothing is computed again.

python -m common.report compare outputs/*              runs side by side, seeds grouped
python -m common.report paper outputs/alert_table1     a table or figure of a paper, from the runs of its sweep
python -m common.report html outputs/<run>             report.html: results, curves, every reply; of a sweep or runs too
python -m common.report figures outputs/<run>          figures for print: PNG, SVG, PDF
python -m common.report dashboard <entity>             a saved view of the project on W&B
python -m common.report audit outputs/<run>            rewards of replies that try to game the run's reward functions
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.cli import CommandParser, program
from common.report import compare, folders
from common.report.compare import show_table
from common.runtime import process
from common.runtime.progress import SOON, watched
from common.types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 if something is unfinished or at fault, or 2 after a user's error."""
    parser = CommandParser(
        prog=program("report"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("compare", help="runs side by side, seeds together")
    table.add_argument("folders", nargs="+", type=Path)
    table.add_argument("--format", choices=compare.FORMATS, default="rich")
    table.add_argument("--against", metavar="NAME", help="a row's name or a part of it: differences on the same images")
    table.set_defaults(run_it=_compare)
    paper = commands.add_parser("paper", help="a table or figure of a paper: ours, published, verdict")
    paper.add_argument("sweep", type=Path, help="outputs/<sweep>")
    paper.set_defaults(run_it=_paper)
    html = commands.add_parser("html", help="a page to open in a browser: of a run, a sweep, or several runs")
    html.add_argument("folders", nargs="+", type=Path)
    html.set_defaults(run_it=_html)
    drawn = commands.add_parser("figures", help="a run's pictures for print, without titles: PNG 300 dpi, SVG, PDF")
    drawn.add_argument("run", type=Path)
    drawn.set_defaults(run_it=_figures)
    board = commands.add_parser("dashboard", help="save a view of the project on W&B, and print its address")
    board.add_argument("entity", help="a user or team")
    board.add_argument("--project", default="fewshot-vlm-rl", help="tracking.project")
    board.set_defaults(run_it=_dashboard)
    audit = commands.add_parser("audit", help="attack a run's own rewards with its class names")
    audit.add_argument("run", type=Path)
    audit.add_argument("--trust-code", action="store_true", help="run rewards of other packages that the folder names")
    audit.set_defaults(run_it=_audit)
    chosen = parser.parse_args(arguments)
    try:
        with watched(f"{chosen.command}: reading what the runs have written", SOON):
            return int(chosen.run_it(chosen))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _compare(chosen: argparse.Namespace) -> int:
    runs = folders.find_runs(chosen.folders)
    together, strangers = folders.group(runs), [run for run in runs if not run.values]
    found = compare.build(together, strangers, chosen.against)
    if chosen.format == "rich":
        show_table(found)
    else:
        print(compare.render(found, chosen.format), end="")
    return 0 if compare.complete(together, strangers) else 1


def _paper(chosen: argparse.Namespace) -> int:
    from common.report import publish  # here, because it imports matplotlib

    found = publish.write_page(publish.find_sweep(chosen.sweep), shown=True)
    return 1 if found.unfinished else 0


def _html(chosen: argparse.Namespace) -> int:
    from common.report import publish
    from common.report.html import doubts_page, run_page, sweep_page  # here, because they import matplotlib

    first, *others = chosen.folders
    runs = folders.find_runs(chosen.folders)
    if others:
        path = sweep_page.of_runs(chosen.folders)
    elif runs and runs[0].values:
        path = run_page.make(first)
        doubts_page.make(first)
    else:
        folder = publish.find_sweep(first)
        publish.write_page(folder)
        path = folder / run_page.FILE
    print(path)
    return 0


def _figures(chosen: argparse.Namespace) -> int:
    from common.report.prints import write_prints

    for path in write_prints(chosen.run):
        print(path)
    return 0


def _dashboard(chosen: argparse.Namespace) -> int:
    from common.report import dashboard

    print(dashboard.save(chosen.entity, chosen.project))
    return 0


def _audit(chosen: argparse.Namespace) -> int:
    from common.report.audit import audit  # here, because it imports the packages of the rewards

    table, cheats = audit(chosen.run, chosen.trust_code)
    show_table(table)
    return 1 if cheats else 0


if __name__ == "__main__":
    process.ensure_utf8()
    sys.exit(main())
