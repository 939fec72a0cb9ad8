"""From what a page shows to one file of HTML, its rows as JSON inside or beside it."""

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

# From what a page shows to one file of HTML. Whatever a run has written is escaped; a policy in the page's head lets
# no other script run, and nothing be fetched.


PAGES = Path(__file__).parent / "pages"
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no part of HTML


def render(template: str, script: str, outside: bool = False, **values: Any) -> str:
    """The page.

    Args:
        template: Its name in pages/.
        script: Name of its JavaScript there; empty: none.
        outside: Whether that loads files beside the page. Only then may other local scripts run.
        values: What the template shows.
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
    """Texts without characters that no page may hold.

    >>> visible("a\\x00b"), visible(None)
    ('a�b', '')
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return CONTROLS.sub("�", value)
    return "" if value is None else value


def write(path: Path, page: str) -> None:
    """Whole or not at all; half of a character that no file can hold is written as a question mark."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    unfinished.replace(path)


def inline(figure: Figure) -> Markup:
    """A drawing as part of a page: black is the colour of the page's text, letters stay letters."""
    with rc_context({"svg.fonttype": "none", **LITERAL}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return embedded(file.getvalue())


def embedded(svg: str, scale: float = 1.0) -> Markup:
    """The same for what Matplotlib has written to a file, larger by `scale`: print is small on a screen."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="([\d.]+)pt"', lambda f: f' {f[1]}="{scale * float(f[2]):g}pt"', svg, count=2)
    return Markup(svg.replace("#000000", "currentColor").replace("<svg ", '<svg role="img" ', 1))


# The rows of a report as JSON: in the page itself where they are few, else as files beside it that the page loads as
# it needs them. A page opened from a disk may load scripts but read no other files, so the files are scripts.

INSIDE = 2_000_000  # bytes of rows that a page itself may hold
ROWS = 100  # of a piece


def safe_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in, all in ASCII.

    >>> safe_json("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Pieces:
    """Takes rows and puts them where they belong; `names` are the classes by what answers are compared with."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        """`folder`: for files, beside the page; what an earlier page had there goes when all is written."""
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
        """Take rows; those of a split come together."""
        for row in rows:
            if not self.splits or self.splits[-1] != row.split:
                self.splits.append(row.split)
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
        prompts = {row["prompt"]: None for row in self.waiting}
        places = {text: number for number, text in enumerate(prompts)}
        rows = [{**row, "prompt": places[row["prompt"]]} for row in self.waiting]
        text = safe_json({"prompts": list(prompts), "rows": rows})
        self.waiting = []
        self.texts.append(text)
        self.size += len(text)
        if self.size > INSIDE:
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
        """What the page needs: where the rows are, and if they are in it, the rows. Texts are JSON."""
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
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.outside:
            self.unfinished.rename(self.folder)
            return {"meta": safe_json(meta), "index": None, "pieces": []}
        return {"meta": safe_json(meta), "index": index, "pieces": self.texts}
