"""The page itself, in Gradio: drop photos, see answers, correct them. Its API: docs/predict.md."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.predict import cards
from common.predict.classifier import Answer
from common.serve.desk import Desk
from common.types import UserError

STALE = 20.0  # seconds since something was written to an upload that nobody has read


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
            files = gradio.File(
                label=f"Photos, at most {desk.limits.megabytes:g} MB each",
                file_count="multiple",
                file_types=["image"],
                height=140,
            )
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
        threading.Thread(target=self._tidy, daemon=True).start()

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
            css=cards.STYLE,
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
        choices = gradio.Dropdown(choices=list(told), value=next(iter(told), None))
        return told, None, cards.render(answers, contents), gradio.Row(visible=bool(told)), choices, ""

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

    def _tidy(self) -> None:
        """Delete what Gradio leaves of uploads that it has refused as too large, and what nobody asked about."""
        while True:
            time.sleep(STALE / 4)
            for path in self.uploads.rglob("*"):
                with suppress(OSError):  # read and deleted meanwhile
                    if path.is_file() and time.time() - path.stat().st_mtime > STALE:
                        path.unlink()

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
