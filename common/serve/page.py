"""The page itself, in Gradio: drop photos, see answers, correct them. Its API: docs/predict.md."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from common.predict.classifier import Answer
from common.serve.desk import Desk
from common.types import UserError

SIDE = 160  # of a thumbnail in pixels
CARDS = Environment(autoescape=True).from_string("""
{% for answer, picture in answers %}
<article class="answer">
  {% if picture %}<img src="{{ picture }}" alt="">{% endif %}
  <div>
    <h3>{{ answer.trouble and "not answered" or answer.abstained and "abstains" or answer.label or "no name" }}</h3>
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
STYLE = """
.answer { display: flex; gap: 1rem; padding: .8rem 0; border-bottom: 1px solid var(--border-color-primary); }
.answer > div { flex: 1; min-width: 0; }
.answer img { width: 160px; height: 160px; object-fit: contain; image-rendering: auto; }
.answer h3 { margin: 0; } .answer .file { margin: 0 0 .4rem; opacity: .7; overflow-wrap: anywhere; }
.answer .trouble { color: var(--error-text-color, #b00020); }
.answer .bar { position: relative; display: flex; justify-content: space-between; padding: 0 .4rem; margin: 2px 0; }
.answer .bar i { position: absolute; inset: 0 auto 0 0; background: var(--primary-200); opacity: .6; }
.answer .bar span, .answer .bar b { position: relative; }
.answer .reasoning { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


class Page:
    """A Gradio page over a desk."""

    def __init__(self, desk: Desk, title: str, uploads: Path) -> None:
        """
        Args:
            desk: Answers and keeps.
            title: Of the page.
            uploads: An empty folder of ours, in which Gradio keeps an upload until it is read.
        """
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio

        self.desk, self.uploads, self.gradio = desk, uploads.resolve(), gradio
        with gradio.Blocks(title=title, analytics_enabled=False) as self.blocks:
            gradio.Markdown(f"## {title}")
            kept = gradio.State({})
            files = gradio.File(label="Photos", file_count="multiple", file_types=["image"], height=140)
            answers = gradio.HTML()
            with gradio.Row(visible=False) as correction:
                which = gradio.Dropdown(label="Picture", choices=[], interactive=True)
                right = gradio.Dropdown(
                    label="Right name", choices=list(desk.classifier.names), allow_custom_value=True, interactive=True
                )
                save = gradio.Button("Save correction")
            said = gradio.Markdown()
            files.upload(self.show, files, [kept, files, answers, correction, which, said], api_visibility="private")
            save.click(self.correct, [kept, which, right], said, api_visibility="private")
            gradio.api(self.classify, api_name="classify")
        self.blocks.queue(default_concurrency_limit=4, max_size=256)

    def launch(self, host: str, port: int) -> Any:
        """Serve in the background; returns Gradio's server object, whose `local_url` says where."""
        theme = self.gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        self.blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=int(self.desk.limits.megabytes * 1e6),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=True,
            footer_links=["api"],
            theme=theme,
            css=STYLE,
        )
        return self.blocks

    def classify(self, pictures: list[dict]) -> list[dict]:  # type: ignore[type-arg]
        """Answers to uploaded pictures, as `python -m common.predict --format jsonl` writes them."""
        return [vars(answer) for answer in self._answers(self._read(pictures))]

    def show(self, paths: Sequence[str] | None) -> tuple[Any, ...]:
        """What the page shows after an upload."""
        gradio = self.gradio
        contents = self._read([{"path": path, "orig_name": Path(path).name} for path in paths or []])
        answers = self._answers(contents)
        told = {answer.image: (contents[answer.image], answer.label) for answer in answers if not answer.trouble}
        cards = CARDS.render(answers=[(each, thumbnail(contents[each.image], each)) for each in answers])
        choices = gradio.Dropdown(choices=list(told), value=next(iter(told), None))
        return told, None, cards, gradio.Row(visible=bool(told)), choices, ""

    def correct(self, kept: Mapping[str, tuple[bytes, str | None]], which: str | None, label: str | None) -> str:
        """Save a correction and say where."""
        if which not in kept or not label:
            return "Choose a picture and its right name."
        content, answered = kept[which]
        try:
            table = self.desk.keep(content, label, answered)
        except UserError as error:
            return f"Not saved: {error}"
        return f"Saved. Train on it: `python run.py data=folder data.folder={table}`"

    def _answers(self, contents: Mapping[str, bytes]) -> list[Answer]:
        try:
            return self.desk.answer(contents)
        except UserError as error:
            raise self.gradio.Error(str(error)) from error

    def _read(self, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """Contents by name; the files are deleted. Only what was uploaded here is read."""
        contents: dict[str, bytes] = {}
        for number, file in enumerate(files):
            path = Path(str(file.get("path", ""))).resolve()
            if not path.is_relative_to(self.uploads) or not path.is_file():
                raise self.gradio.Error("this is no uploaded picture: upload it first")
            name = str(file.get("orig_name") or path.name)
            contents[name if name not in contents else f"{name} ({number})"] = path.read_bytes()
            path.unlink(missing_ok=True)
        return contents


def thumbnail(content: bytes, answer: Answer) -> str:
    """A small copy as a data address; empty for what could not be answered."""
    if answer.trouble:
        return ""
    with Image.open(BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    file = BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
