"""report.html of a sweep that is made of others: every chapter's tables and picture, and the way to its own page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from common.counted import counted
from common.report.html.render import embedded, render, write
from common.report.html.run_page import FILE
from common.report.paper.page import Page
from common.report.paper.tables import matrices, notes


class Chapter(Protocol):
    """What is said of a page."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def text(self) -> str: ...


def make(folder: Path, title: str, chapters: Sequence[Chapter], pages: Sequence[Page]) -> Path:
    """Write the page into a folder, and return its path.

    Args:
        folder: Of the book; is made.
        title: Of the book.
        chapters: What is said of each page.
        pages: Of the chapters, as their own folders have them.
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
