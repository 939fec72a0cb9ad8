"""Render answers as HTML: facts about the model, and every image beside its name, probabilities and reasoning."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment
from markupsafe import Markup

from common.counted import counted
from common.data.images import decode
from common.evaluation import novelty
from common.run.result import Result

if TYPE_CHECKING:
    from common.predict.classifier import Answer, Classifier

SIDE = 160  # longest side of a thumbnail in pixels
FEW = 12  # most class names that are shown without unfolding
STYLE = """
.about { margin: 0 0 1.2rem; }
.about dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; margin: .6rem 0; }
.about dt { opacity: .7; } .about dd { margin: 0; overflow-wrap: anywhere; }
.answer { display: flex; gap: 1rem; padding: .8rem 0; border-bottom: 1px solid #8884; }
.answer[hidden] { display: none; }
.answer > div { flex: 1; min-width: 0; }
.answer img { width: 160px; height: 160px; object-fit: contain; flex: none; }
.answer h3, .answer p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
.answer .file { opacity: .7; }
.answer .error { color: light-dark(#b01818, #ff9a90); }
.answer .bar { display: grid; grid-template-columns: minmax(0, 14rem) minmax(2rem, 1fr) 4rem; gap: .8rem;
  align-items: center; margin: 3px 0; }
.answer .bar span { overflow-wrap: anywhere; }
.answer .bar i { display: block; height: .7rem; border-radius: 2px; background: #8883; }
.answer .bar i i { background: #4a7bd0; min-width: 1px; }
.answer .bar b { text-align: right; font-variant-numeric: tabular-nums; font-weight: 500; }
.answer .reasoning { white-space: pre-wrap; }
@media (max-width: 32rem) {
  .answer { flex-direction: column; gap: .5rem; } .answer > div { width: 100%; }
  .about dl { grid-template-columns: minmax(0, 1fr); gap: 0; } .about dd { margin-bottom: .4rem; }
}
"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.4 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { overflow-wrap: anywhere; margin: 0 0 .3rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; padding: .7rem; background: #8881; }
label { display: flex; flex-direction: column; font-size: .85rem; min-width: 0; max-width: 14rem; }
select, input { font: inherit; max-width: 100%; }
"""
SCRIPT = """
const find = name => document.getElementById(name);
const cards = [...document.querySelectorAll(".answer")];
function filter() {
  const words = find("words").value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    const fits = (!find("kind").value || card.dataset.kind === find("kind").value)
      && (!find("class").value || card.dataset.label === find("class").value)
      && (!find("below").value || Number(card.dataset.sure) < Number(find("below").value))
      && (!words || card.textContent.toLowerCase().includes(words));
    card.hidden = !fits;
    shown += fits;
  }
  find("shown").textContent = `${shown} of ${cards.length} shown`;
}
find("filter").addEventListener("input", filter);
find("filter").addEventListener("submit", event => event.preventDefault());
filter();
"""
KINDS = {
    "answered": "answered",
    "abstained": "abstained",
    "unknown": "like none of the classes",
    "none": "none of the names",
    "broken": "cannot be read",
}
TEMPLATES = Environment(autoescape=True)
CARDS = TEMPLATES.from_string("""
{% for answer, picture, kind in answers %}
<article class="answer" data-kind="{{ kind }}" data-label="{{ answer.label or "" }}"
  data-sure="{{ (100 * (answer.confidence or 0)) | round(2) }}">
  {% if picture %}<img src="{{ picture }}" alt="">{% endif %}
  <div>
    <h3><bdi>{{ answer.label if kind == "answered" else kinds[kind] }}</bdi></h3>
    <p class="file"><bdi>{{ answer.image }}</bdi></p>
    {% if answer.error %}<p class="error">{{ answer.error }}</p>{% endif %}
    {% for name, share in answer.top %}
    <div class="bar"><span><bdi>{{ name }}</bdi></span> <i><i style="width: {{ (100 * share) | round(1) }}%"></i></i>
      <b>{{ "%.1f" | format(100 * share) }} %</b></div>
    {% endfor %}
    {% if answer.candidates %}<p>Candidates: {{ answer.candidates | join(", ") }}</p>{% endif %}
    {% if answer.reasoning %}<p class="reasoning">{{ answer.reasoning }}</p>{% endif %}
  </div>
</article>
{% endfor %}
""")
ABOUT = TEMPLATES.from_string("""<div class="about">
<p><bdi>{{ about.title }}</bdi></p>
<dl>
{% if counts %}<dt>Pictures</dt><dd>{{ counts }}</dd>{% endif %}
<dt>Classes</dt><dd>{% if is_long %}<details><summary>{{ about.classes | length }}</summary>{% else %}
{{- about.classes | length }}: {% endif %}
{% for name in about.classes %}<bdi>{{ name }}</bdi>{{ ", " if not loop.last }}{% endfor %}
{% if is_long %}</details>{% endif %}</dd>
<dt>Measured</dt><dd>{{ about.measured }}</dd>
<dt>Threshold</dt><dd>{{ about.abstains }}</dd>
{% if about.novelty %}<dt>Unknown</dt><dd>{{ about.novelty }}</dd>{% endif %}
{% if photos %}<dt>Photos</dt><dd>{{ photos }}</dd>{% endif %}
</dl></div>
""")
PAGE = TEMPLATES.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{{ digest }}'">
<title>Answers of {{ about.run }}</title><style>{{ style }}</style>
</head><body><header><h1>Answers of <bdi>{{ about.run }}</bdi></h1>{{ head }}</header>
<form id="filter">
<label>Show <select id="kind"><option value="">all pictures</option>{% for kind, name in kinds.items() %}
<option value="{{ kind }}">{{ name }}</option>{% endfor %}</select></label>
<label>Answer <select id="class"><option value="">any</option>{% for name in labels %}
<option value="{{ name }}">{{ name }}</option>{% endfor %}</select></label>
<label>Sure below <input id="below" type="number" min="0" max="100" placeholder="%"></label>
<label>Search <input id="words" type="search" placeholder="file, name or reasoning"></label>
<span id="shown" role="status"></span>
</form>
<main>{{ cards }}</main><script>{{ script }}</script></body></html>
""")


@dataclass(frozen=True)
class About:
    """Facts about a model that help to judge its answers.

    run: name of its folder.
    title: method, data, model, shots, seed.
    classes: names that it chooses among.
    measured: its accuracy.
    abstains: the confidence from which on it answers.
    novelty: how well photos of other classes are noticed; empty where that is not measured.
    """

    run: str
    title: str
    classes: tuple[str, ...]
    measured: str
    abstains: str
    novelty: str = ""

    @classmethod
    def of(
        cls, folder: Path, records: Path, classes: Sequence[str], risk: float | None, threshold: float | None
    ) -> About:
        """Describe a finished run.

        Args:
            folder: Folder as it was given.
            records: Folder with metrics.json.
            classes: Names that the model chooses among here.
            risk: Accepted share of wrong answers; None: it always answers.
            threshold: Threshold of the confidence, chosen for that risk.
        """
        result = Result.load(records)
        title = (
            f"{result.method} · {result.data} · {result.model} · {counted(result.shots, 'shot')} · seed {result.seed}"
        )
        summaries = result.after or result.before
        # a test split if there is one; val only if it is the only split
        split, summary = next((name, one) for name, one in summaries.items() if name != "val" or len(summaries) == 1)
        low, high = (f"{100 * bound:.1f}" for bound in summary.ci95)
        measured = f"{100 * summary.accuracy:.1f} % right on {counted(summary.n, f'{split} image')} of its own data"
        measured += f" (95 % interval {low} to {high} %)"
        if threshold is None or risk is None:
            abstains = "none: it always answers (--risk sets one)"
        elif threshold == inf:
            abstains = f"no answer at all: none is sure enough for a risk of {100 * risk:g} %"
        else:
            abstains = f"answers from {100 * threshold:.1f} % on, for a risk of {100 * risk:g} % wrong answers"
        name = folder.expanduser().resolve().name
        return cls(name, title, tuple(classes), measured, abstains, novelty.line(result.novelty))


def about(classifier: Classifier, risk: float | None) -> About:
    """Describe a loaded model. `risk`: the risk for which its threshold was chosen."""
    run = classifier.run
    return About.of(run.folder, run.records, classifier.names, risk, classifier.threshold)


def render(answers: Sequence[Answer], pictures: Mapping[str, bytes | Path]) -> str:
    """Render a card per answer. `pictures`: images by the names of the answers. All texts are escaped."""
    shown = [(answer, _thumbnail(answer, pictures[answer.image]), _kind(answer)) for answer in answers]
    return CARDS.render(answers=shown, kinds=KINDS)


def head(about: About, counts: str = "", photos: str = "") -> str:
    """Render the head above the cards. `counts`: numbers of pictures. `photos`: what happens to uploads, or empty."""
    return ABOUT.render(about=about, is_long=len(about.classes) > FEW, counts=counts, photos=photos)


def page(answers: Sequence[Answer], pictures: Mapping[str, bytes | Path], about: About) -> str:
    """Render a self-contained page, which loads no other files."""
    kinds = Counter(map(_kind, answers))
    counts = f"{len(answers):,}: " + ", ".join(f"{kinds[kind]:,} {name}" for kind, name in KINDS.items() if kinds[kind])
    return PAGE.render(
        about=about,
        head=Markup(head(about, counts)),  # escaped by its template
        cards=Markup(render(answers, pictures)),
        kinds={kind: name for kind, name in KINDS.items() if kinds[kind]},
        labels=sorted({answer.label for answer in answers if answer.label}),
        style=Markup(STYLE + PAGE_STYLE),
        script=Markup(SCRIPT),
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _kind(answer: Answer) -> str:
    """Return the kind of an answer, one of KINDS."""
    if answer.error:
        return "broken"
    if answer.unknown:
        return "unknown"
    if answer.abstained:
        return "abstained"
    return "answered" if answer.label else "none"


def _thumbnail(answer: Answer, picture: bytes | Path) -> str:
    """Return a thumbnail as a data URI; empty for a picture that cannot be used."""
    if answer.error:
        return ""
    small, file = decode(picture), BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
