"""Render a report as one HTML file, with its rows as JSON inside it or beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib import rc_context
from matplotlib.figure import Figure

from common.counted import counted
from common.parsing import normalize
from common.report.figures import LITERAL
from common.report.html.transcripts import Row

# Rendering. Everything that a run has written is escaped; a content security policy in the page's head forbids other
# scripts and all requests.


PAGES = Path(__file__).parent / "pages"
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # not allowed in HTML


def render(template: str, script: str, outside: bool = False, **values: Any) -> str:
    """Render a page.

    Args:
        template: Name of the template in pages/.
        script: Name of its JavaScript in pages/; empty: none.
        outside: Whether the script loads files beside the page. Only then may other local scripts run.
        values: Values for the template.
    """
    code = (PAGES / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    css = Markup((PAGES / "report.css").read_text(encoding="utf-8"))
    page = environment.get_template(template)
    scripts = Markup(f"{chr(39)}sha256-{digest}{chr(39)}" + " 'self' file:" * outside) if code else Markup("'none'")
    return page.render(css=css, script=Markup(code), scripts=scripts, **values)


def visible(value: Any) -> Any:
    """Replace characters that HTML does not allow; None becomes an empty text.

    >>> visible("a\\x00b"), visible(None)
    ('a�b', '')
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return CONTROLS.sub("�", value)
    return "" if value is None else value


def write(path: Path, page: str) -> None:
    """Write a page atomically; lone surrogates, which UTF-8 cannot encode, become question marks."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    unfinished.replace(path)


def inline(figure: Figure) -> Markup:
    """Return a figure as SVG for a page: black becomes the page's text colour, text stays text."""
    with rc_context({"svg.fonttype": "none", **LITERAL}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return embedded(file.getvalue())


def embedded(svg: str, scale: float = 1.0) -> Markup:
    """Return an SVG file of Matplotlib for a page, enlarged by `scale`, since figures for print are small on screen."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="([\d.]+)pt"', lambda f: f' {f[1]}="{scale * float(f[2]):g}pt"', svg, count=2)
    return Markup(svg.replace("#000000", "currentColor").replace("<svg ", '<svg role="img" ', 1))


# Rows of a report as JSON: in the page itself if they are few, else in files beside it that the page loads on demand.
# A page opened from disk may load scripts but read no other files, so these files are scripts.

INSIDE = 2_000_000  # most bytes of rows inside a page
ROWS = 100  # rows of a piece


def safe_json(value: Any) -> str:
    """Return ASCII JSON that cannot end the script element around it.

    >>> safe_json("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Pieces:
    """Collects rows in pieces, inside the page or in files; `names` are the class names by normalised name."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        """`folder`: folder for the files, beside the page; files of an earlier page are deleted at the end."""
        self.folder, self.places = folder, {name: number for number, name in enumerate(names)}
        self.names = list(names.values())
        self.splits: list[str] = []
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("split", "image", "label", "answer", "before", "after", "confidence", "flags")
        }
        self.waiting: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.count = self.size = 0
        self.outside = False
        self.unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; those of a split must be adjacent."""
        for row in rows:
            if not self.splits or self.splits[-1] != row.split:
                self.splits.append(row.split)
            # columns of short values, so that the page can filter all rows without loading their texts
            values = {
                "split": len(self.splits) - 1,
                "image": row.image,
                "label": self.places.get(normalize(row.label), -1),
                "answer": -1 if row.answer is None else self.places.get(normalize(row.answer), -1),
                "before": -1 if row.before is None else int(row.before),
                "after": -1 if row.after is None else int(row.after),
                "confidence": -1 if row.confidence is None else round(100 * row.confidence),
                "flags": row.flags,
            }
            for name, value in values.items():
                self.columns[name].append(value)
            self.waiting.append(row.detail)
            if len(self.waiting) == ROWS:
                self._piece()

    def _piece(self) -> None:
        # many rows share a prompt: store each text once and refer to it by number
        prompts = {row["prompt"]: None for row in self.waiting}
        places = {text: number for number, text in enumerate(prompts)}
        rows = [{**row, "prompt": places[row["prompt"]]} for row in self.waiting]
        text = safe_json({"prompts": list(prompts), "rows": rows})
        self.waiting = []
        self.texts.append(text)
        self.size += len(text)
        if self.size > INSIDE:  # from now on pieces are written to files, not kept in memory
            self.outside = True
        if self.outside:
            self._write()

    def _write(self) -> None:
        self.unfinished.mkdir(exist_ok=True)
        for text in self.texts:
            (self.unfinished / f"rows-{self.count}.js").write_text(
                f"report.rows({self.count},{text})\n", encoding="ascii"
            )
            self.count += 1
        self.texts = []

    def finish(self) -> dict[str, Any]:
        """Return what the template needs: where the rows are and, if they are in the page, the rows. Texts are JSON."""
        if self.waiting:
            self._piece()
        index = safe_json({"splits": self.splits, "names": self.names, **self.columns})
        self.outside = self.outside or self.size + len(index) > INSIDE
        meta = {
            "folder": self.folder.name,
            "piece": ROWS,
            "rows": len(self.columns["split"]),
            "inside": not self.outside,
        }
        if self.outside:
            self._write()
            (self.unfinished / "index.js").write_text(f"report.index({index})\n", encoding="ascii")
        # replace the files of an earlier page only now that all new ones are written
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.outside:
            self.unfinished.rename(self.folder)
            return {"meta": safe_json(meta), "index": None, "pieces": []}
        return {"meta": safe_json(meta), "index": index, "pieces": self.texts}
