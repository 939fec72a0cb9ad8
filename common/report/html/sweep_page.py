"""Write report.html of several runs: for a sweep the paper's table or figure with verdicts; the runs side by side,
their curves, some replies, and differences of their configurations.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import matplotlib
import yaml
from markupsafe import Markup

from common.counted import counted
from common.report import compare, folders
from common.report.figures import PRINT
from common.report.folders import Run, SeedGroup
from common.report.html import transcripts
from common.report.html.render import embedded, inline, render, write
from common.report.html.run_page import FILE
from common.report.paper import page as pages
from common.report.paper.page import Page
from common.report.paper.pictures import curves_of_runs
from common.report.paper.tables import listing, matrices, notes
from common.run import predictions
from common.types import UserError

LINES = 8  # most groups in a figure of curves
EXAMPLES = 4  # replies of a run
LONG = 80  # characters of a value in the comparison
CLASSES = {"inside": "inside", "below": "below", "above": "above"}  # CSS class of a verdict; others are soft


def of_sweep(folder: Path, page: Page | None = None) -> Path:
    """Write the page of a sweep into its folder, and return its path. `page`: the page if it was built already.

    Raises:
        UserError: The folder is not a sweep's.
    """
    page = pages.build(folder) if page is None else page
    return _make(folder, page.sweep.name, page.runs, page)


def of_runs(paths: Sequence[Path]) -> Path:
    """Write a page that compares run folders into their common parent folder (else here), and return its path.

    Raises:
        UserError: A folder does not exist, or none holds a run.
    """
    runs = [run for run in folders.find_runs(paths) if run.state != folders.ASKED]
    if not any(run.values for run in runs):
        raise UserError(f"{paths[0]}{' and the others hold' if len(paths) > 1 else ' holds'} no run")
    together = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    return _make(Path.cwd() if together == Path(together.anchor) else together, "comparison", runs, None)


def _make(folder: Path, name: str, runs: Sequence[Run], page: Page | None) -> Path:
    together, strangers = folders.group(runs), [run for run in runs if not run.values]
    examples = list(_examples(page)) if page is not None and page.sweep.page.get("kind") == "examples" else []
    drawn = _curves(together)
    there = {"paper": page, "examples": examples, "curves": drawn, "runs": True, "configuration": True}
    # a comparison of run folders has no paper's page, so no numbers and verdicts
    numbers = None if page is None else listing(page)
    different, shared = configurations(together)
    html = render(
        "sweep.html",
        "",
        title=name,
        subtitle=f"{sum(run.result is not None for run in runs)} of {counted(len(runs), 'run')} finished",
        parts=[(part, part.capitalize()) for part, value in there.items() if value],
        paper=None if page is None else _paper(folder, page),
        verdicts={} if numbers is None else _verdicts(numbers),
        examples=examples,
        curves=drawn,
        compared=compare.build(together, strangers),
        runs=[_listed(run, folder) for run in runs],
        differences=different,
        shared=shared,
        environment=_environment(runs),
    )
    write(folder / FILE, html)
    return folder / FILE


def _paper(folder: Path, page: Page) -> dict[str, Any]:
    figure = folder / "figure.svg"
    drawn = embedded(figure.read_text(encoding="utf-8"), 1.5) if figure.is_file() else None
    return {"matrices": list(matrices(page)), "notes": notes(page), "listing": listing(page), "figure": drawn}


def _verdicts(numbers: compare.Table) -> dict[str, str]:
    """Return the CSS class of each verdict."""
    at = numbers.columns.index("verdict")
    return {row[at]: CLASSES.get(row[at], "soft") for row in numbers.rows if row[at]}


def _listed(run: Run, folder: Path) -> dict[str, Any]:
    there = (run.path / FILE).is_file()
    link = quote(Path(os.path.relpath(run.path.resolve() / FILE, folder.resolve())).as_posix()) if there else None
    return {"name": run.path.name, "state": " ".join([run.state, run.why]).strip(), "link": link}


def _curves(together: Sequence[SeedGroup]) -> Markup | None:
    """Draw rewards, lengths and accuracies of trained groups, if there are not too many."""
    trained = {
        group.label: [run.path for run in group.finished if run.result and run.result.after] for group in together
    }
    trained = {label: paths for label, paths in trained.items() if paths}
    if not 1 <= len(trained) <= LINES:
        return None
    with matplotlib.rc_context(PRINT):
        return inline(curves_of_runs(trained))


def _examples(page: Page) -> Iterator[dict[str, Any]]:
    """Yield right and wrong replies of the first run of every row, as many of each as possible up to half."""
    for row in page.axis("rows"):
        shown = next(each for each in page.sweep.runs if page.place(each.keys, "rows") == row)
        path = page.sweep.path(shown)
        if not (path / "predictions.parquet").is_file():
            continue
        pictures = predictions.read_thumbnails(path)
        tested = [each for each in transcripts.tests(path, pictures) if each.split != "val"]
        # with thumbnails: only images that have one
        kept = [each for each in tested if each.detail["picture"] or not pictures]
        by_turns = (
            list(islice((each for each in kept if each.after is right), EXAMPLES // 2)) for right in (True, False)
        )
        replies = [_reply(each) for part in by_turns for each in part]
        yield {"name": f"{row} · seed {shown.seed}" if row else f"seed {shown.seed}", "replies": replies}


def _reply(row: transcripts.Row) -> dict[str, Any]:
    reply = row.last
    return {
        "image": row.image,
        "label": row.label,
        "picture": row.detail["picture"],
        "small": row.detail["picture"] is not None and len(row.detail["picture"]) < 700,
        "candidates": row.detail.get("candidates"),
        "prompt": row.detail["prompt"],
        "text": reply["text"] or "",
        "answer": reply["answer"],
        "correct": row.after,
    }


def configurations(together: Sequence[SeedGroup]) -> tuple[compare.Table, str]:
    """Return the values that differ between groups, one row each, and the values that they share, as YAML."""
    leaves = [dict(folders.leaves(folders.without_seed(group.runs[0].values))) for group in together]
    keys = sorted({key for each in leaves for key in each})
    telling = [key for key in keys if len({str(each.get(key, "–")) for each in leaves}) > 1]
    shared = {key: leaves[0][key] for key in keys if key not in set(telling)} if leaves else {}
    values = {key: dict.fromkeys(str(each.get(key, "–")) for each in leaves) for key in telling}
    rows = [
        (key, str(len(found)), ", ".join(text[:LONG] for text in islice(found, 12)) + (" …" if len(found) > 12 else ""))
        for key, found in values.items()
    ]
    return compare.Table(("value", "kinds", "in the order of the runs"), rows, []), yaml.safe_dump(
        shared, sort_keys=False, allow_unicode=True
    )


def _environment(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Return commits, packages and weights, each with the number of runs that have it."""
    facts: dict[str, dict[str, int]] = {"commit": {}, "packages": {}, "weights": {}}
    for run in runs:
        if run.result is None:
            continue
        packages = ", ".join(f"{name} {version}" for name, version in sorted(run.result.versions.items()))
        weights = f"{Path(run.result.weights.get('path', '–')).name}, {run.result.weights.get('sha256', '–')[:12]}"
        for kind, value in (("commit", run.result.git_commit or "none"), ("packages", packages), ("weights", weights)):
            facts[kind][value] = facts[kind].get(value, 0) + 1
    return [(kind, f"{value} (runs: {count})") for kind, found in facts.items() for value, count in found.items()]


# report.html of a sweep that consists of other sweeps: tables and figure of every chapter, and a link to its own page.


class Chapter(Protocol):
    """Title and text for a page."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def text(self) -> str: ...


def make_book(folder: Path, title: str, chapters: Sequence[Chapter], pages: Sequence[Page]) -> Path:
    """Write the page into a folder, and return its path.

    Args:
        folder: Folder of the book, created if missing.
        title: Title of the book.
        chapters: Title and text for each page.
        pages: Pages of the chapters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = {run.path: run for page in pages for run in page.runs}
    finished = sum(run.result is not None for run in runs.values())
    html = render(
        "book.html",
        "",
        title=title,
        subtitle=f"{finished} of {counted(len(runs), 'run')} finished",
        parts=[(f"chapter-{number}", chapter.title) for number, chapter in enumerate(chapters, 1)],
        chapters=[_shown(folder, chapter, page) for chapter, page in zip(chapters, pages, strict=True)],
    )
    write(folder / FILE, html)
    return folder / FILE


def _shown(folder: Path, chapter: Chapter, page: Page) -> dict[str, Any]:
    figure = page.sweep.folder / "figure.svg"
    own = Path(os.path.relpath(page.sweep.folder.resolve() / FILE, folder.resolve())).as_posix()
    return {
        "title": chapter.title,
        "text": chapter.text,
        "sweep": chapter.name,
        "link": quote(own),
        "matrices": list(matrices(page)),
        "notes": notes(page),
        "figure": embedded(figure.read_text(encoding="utf-8"), 1.5) if figure.is_file() else None,
    }
