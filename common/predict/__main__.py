"""Classify pictures with a finished run.

python -m common.predict outputs/<run> photo.jpg
python -m common.predict outputs/<run> photos/ 'more/*.png' list.csv --format csv --output answers.csv
python -m common.predict outputs/<run> photos/ --format html --output answers.html
python -m common.predict outputs/<run> photos/ --format label-studio --output photos.json        or coco
python -m common.predict outputs/<run> photos/ --risk 0.05        abstains if it would be wrong too often
python -m common.predict outputs/<run> photos/ --unknown 0.05     names no class where a photo looks like none of them
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from common.cli import CommandParser, program
from common.counted import counted
from common.data import label_formats
from common.runtime import process
from common.runtime.progress import doing, say, watched
from common.types import UserError

if TYPE_CHECKING:
    from common.predict.cards import About
    from common.predict.classifier import Answer

COLUMNS = ("image", "label", "confidence", "abstained", "unknown", "p_value", "top", "candidates", "reasoning", "error")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a picture cannot be used, or 2 after a user's error."""
    parser = CommandParser(
        prog=program("predict"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "pictures",
        nargs="+",
        help="pictures, folders, zip files, patterns, tables with a column path, or JSON of COCO or Label Studio",
    )
    parser.add_argument("--names", help="other class names, separated by commas, for methods that only read them")
    parser.add_argument("--open", action="store_true", help="list no names: the answer may be any word")
    parser.add_argument("--risk", type=float, help="abstain so that about this share of the answers is wrong")
    parser.add_argument(
        "--unknown", type=float, help="call so many of the known photos unknown, to notice other classes"
    )
    parser.add_argument("--data", type=Path, help="folder in which the run's own dataset lies now, if it was moved")
    parser.add_argument("--trust-code", action="store_true", help="run code of other packages that the folder names")
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="coco and label-studio: JSON for label tools"
    )
    parser.add_argument("--output", type=Path, help="file to write; otherwise the terminal")
    chosen = parser.parse_args(arguments)
    process.set_thread_policy()
    try:
        with watched(f"looking for pictures, then {chosen.run} is loaded"):
            answers, pictures, known = classify(chosen)
        if chosen.format in LABEL_TOOLS:
            write_labels(chosen, answers, pictures, known)
        else:
            with _target(chosen.output) as file:
                if chosen.format == "html":  # for a browser: every picture beside its answer
                    from common.predict import cards

                    file.write(cards.page(answers, pictures, known))
                else:
                    WRITERS[chosen.format](answers, file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unusable = [answer for answer in answers if answer.error]
    if chosen.output is not None:
        answered = counted(len(answers) - len(unusable), "answer")
        print(f"{chosen.output}: {answered}, {len(unusable)} broken", file=sys.stderr)
        if chosen.format == "label-studio":
            print(f"{chosen.output.with_suffix('.xml')}: the labelling configuration", file=sys.stderr)
    for answer in unusable:
        print(f"{answer.image}: {answer.error}", file=sys.stderr)
    return 1 if unusable else 0


def classify(chosen: argparse.Namespace) -> tuple[list[Answer], dict[str, Path], About]:
    """Return the answers to all pictures, their paths by name, and facts about the run."""
    from common.predict.photos import find, names_of, paths_from

    if chosen.format in LABEL_TOOLS and (chosen.output is None or chosen.output.suffix.lower() != ".json"):
        raise UserError(f"--format {chosen.format} needs --output <file>.json, beside the pictures or above them")
    pictures = {name: path for what in chosen.pictures for name, path in find(what).items()}
    if chosen.format in LABEL_TOOLS:
        paths_from(chosen.output, pictures)
    say(f"{counted(len(pictures), 'picture')}; loading {chosen.run}")
    with doing(f"loading {chosen.run}"):
        with process.garbage_collector_paused():
            from common.predict.cards import about
            from common.predict.classifier import Classifier  # imports torch, which takes seconds

        classifier = Classifier.load(
            chosen.run,
            names_of(chosen.names),
            chosen.risk,
            lists_names=not chosen.open,
            trust_code=chosen.trust_code,
            data=chosen.data,
            unknown=chosen.unknown,
        )
        classifier.quieten()
    try:
        with doing("answering"):
            return classifier(pictures), pictures, about(classifier, chosen.risk)
    finally:
        classifier.close()


def write_table(answers: Sequence[Answer], file: TextIO) -> None:
    """Write a table for people; columns that are empty for all pictures are left out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = []
    for answer in answers:
        said = answer.error or (
            "(unknown)"
            if answer.unknown
            else "(abstains)"
            if answer.abstained
            else answer.label or "(none of the names)"
        )
        sure = "" if answer.confidence is None else f"{100 * answer.confidence:.1f} %"
        rest = [each for each in answer.top if each[0] != answer.label or answer.abstained or answer.unknown]
        others = ", ".join(f"{name} {100 * share:.0f} %" for name, share in rest[:2])
        rows.append((answer.image, said, sure, others, answer.reasoning))
    titles = ("picture", "answer", "sure", "else", "reasoning")
    shown = [place for place in range(len(titles)) if place < 2 or any(row[place] for row in rows)]
    table = Table(*(titles[place] for place in shown))
    for row in rows:
        table.add_row(*(Text(row[place]) for place in shown))
    Console(file=file, width=None if file.isatty() else 160).print(table)


def write_lines(answers: Sequence[Answer], file: TextIO) -> None:
    """Write one JSON object per line."""
    for answer in answers:
        file.write(json.dumps(vars(answer), ensure_ascii=False) + "\n")


def write_csv(answers: Sequence[Answer], file: TextIO) -> None:
    """Write CSV for spreadsheets."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for answer in answers:
        values = vars(answer) | {
            "top": "; ".join(f"{name} {share:.4f}" for name, share in answer.top),
            "candidates": "; ".join(answer.candidates),
        }
        writer.writerow(["" if values[name] is None else values[name] for name in COLUMNS])


def write_labels(
    chosen: argparse.Namespace, answers: Sequence[Answer], pictures: Mapping[str, Path], known: About
) -> None:
    """Write the file of a label tool; for Label Studio also the labelling configuration, as XML beside it."""
    from common.data.images import size_of
    from common.predict.photos import paths_from

    paths = paths_from(chosen.output, pictures)
    labelled = [
        label_formats.Labelled(
            paths[each.image], each.label, each.confidence, None if each.error else size_of(pictures[each.image])
        )
        for each in answers
    ]
    content = LABEL_TOOLS[chosen.format](labelled, known.classes, known.run)
    with _target(chosen.output) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    if chosen.format == "label-studio":
        with _target(chosen.output.with_suffix(".xml")) as file:
            file.write(label_formats.labelling_configuration(known.classes))


WRITERS = {"table": write_table, "jsonl": write_lines, "csv": write_csv}
LABEL_TOOLS = {"coco": label_formats.coco, "label-studio": label_formats.label_studio}
FORMATS = (*WRITERS, "html", *LABEL_TOOLS)


@contextmanager
def _target(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    process.ensure_utf8()
    sys.exit(main())
