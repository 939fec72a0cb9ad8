"""From what a page shows to one file of HTML. Whatever a run has written is escaped; a policy in the page's head lets
no other script run, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib import rc_context
from matplotlib.figure import Figure

from common.counted import counted
from common.report.figures import LITERAL

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
