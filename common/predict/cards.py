"""Answers as HTML: every picture beside its name, probabilities and reasoning."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment

from common.data.images import decode

if TYPE_CHECKING:
    from common.predict.classifier import Answer

SIDE = 160  # of a thumbnail in pixels
STYLE = """
.answer { display: flex; gap: 1rem; padding: .8rem 0; border-bottom: 1px solid #8884; }
.answer > div { flex: 1; min-width: 0; }
.answer img { width: 160px; height: 160px; object-fit: contain; }
.answer h3, .answer p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
.answer .file { opacity: .7; }
.answer .trouble { color: #c02020; }
.answer .bar { position: relative; display: flex; justify-content: space-between; padding: 0 .4rem; margin: 2px 0; }
.answer .bar i { position: absolute; inset: 0 auto 0 0; background: #4a7bd0; opacity: .35; }
.answer .bar span, .answer .bar b { position: relative; }
.answer .reasoning { white-space: pre-wrap; }
"""
TEMPLATES = Environment(autoescape=True)
CARDS = TEMPLATES.from_string("""
{% for answer, picture in answers %}
<article class="answer">
  {% if picture %}<img src="{{ picture }}" alt="">{% endif %}
  <div>
    <h3>{{ answer.trouble and "not answered" or answer.abstained and "abstains"
        or answer.label or "none of the names" }}</h3>
    <p class="file">{{ answer.image }}</p>
    {% if answer.trouble %}<p class="trouble">{{ answer.trouble }}</p>{% endif %}
    {% for name, share in answer.top %}
    <div class="bar"><i style="width: {{ (100 * share) | round(1) }}%"></i><span>{{ name }}</span>
      <b>{{ "%.1f" | format(100 * share) }} %</b></div>
    {% endfor %}
    {% if answer.candidates %}<p>Candidates: {{ answer.candidates | join(", ") }}</p>{% endif %}
    {% if answer.reasoning %}<p class="reasoning">{{ answer.reasoning }}</p>{% endif %}
  </div>
</article>
{% endfor %}
""")
PAGE = TEMPLATES.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Answers</title><style>:root { color-scheme: light dark; }
body { font: 1rem/1.4 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }{{ style }}</style>
</head><body><h1>{{ count }} pictures</h1>{{ cards }}</body></html>
""")


def render(answers: Sequence[Answer], pictures: Mapping[str, bytes | Path]) -> str:
    """A card per answer. `pictures`: by the names of the answers. What they say is escaped."""
    return CARDS.render(answers=[(answer, _thumbnail(answer, pictures[answer.image])) for answer in answers])


def page(answers: Sequence[Answer], pictures: Mapping[str, bytes | Path]) -> str:
    """A file of its own, which loads nothing."""
    from markupsafe import Markup

    cards = Markup(render(answers, pictures))  # escaped by its template
    return PAGE.render(count=len(answers), cards=cards, style=STYLE)


def _thumbnail(answer: Answer, picture: bytes | Path) -> str:
    """A small copy as a data address; empty for what could not be answered."""
    if answer.trouble:
        return ""
    small, file = decode(picture), BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
