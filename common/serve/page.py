"""Gradio page: drop photos, see answers, correct them. Its API: docs/predict.md."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import escape

from common.predict import cards
from common.predict.classifier import Answer
from common.serve.service import PredictionService
from common.types import UserError

STALE = 3600.0  # seconds after which an upload that was never classified is deleted
PARTIAL = 120.0  # seconds after which an incomplete or refused upload is deleted

KEPT = "An upload is deleted as soon as it is read; only what you correct is kept, as a copy without metadata."
LOCAL = f"They stay on this machine: the model that answers runs here. {KEPT}"
REMOTE = f"They go to the machine that serves this page, and no further. {KEPT}"


class Uploads:
    """Files that Gradio has received: each is read once from disk, and deleted there.

    Gradio stores equal files of one name once, at `<hash>/<name>`. So a second upload of the same picture is found
    here, among those read last.
    """

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        """
        Args:
            folder: Folder of the uploads; nothing outside is read.
            keep_bytes: Limit of the contents kept in memory.
        """
        self.folder, self.keep_bytes = folder.resolve(), keep_bytes
        self.read: OrderedDict[Path, bytes] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, paths: Sequence[str], check: Callable[[Sequence[int]], None]) -> list[bytes]:
        """Return the contents of files. `check`: called with their sizes before anything is read.

        Raises:
            UserError: A path is not an upload, an upload is gone, or the check refuses them.
        """
        found = [Path(path).resolve() for path in paths]
        if not all(path.is_relative_to(self.folder) for path in found):
            raise UserError("this is no uploaded picture: upload it first")
        with self.lock:
            try:
                check([len(self.read[path]) if path in self.read else path.stat().st_size for path in found])
                contents = [self.read[path] if path in self.read else path.read_bytes() for path in found]
            except FileNotFoundError as error:
                raise UserError("an upload is not there any more: upload it again") from error
            for path, content in zip(found, contents, strict=True):
                path.unlink(missing_ok=True)
                self.read[path] = content
                self.read.move_to_end(path)
            while sum(map(len, self.read.values())) > self.keep_bytes:
                self.read.popitem(last=False)
        return contents

    def tidy(self, now: float) -> None:
        """Delete uploads that Gradio has refused, and those that were never classified. `now`: seconds."""
        for path in self.folder.rglob("*"):
            whole = path.parent != self.folder  # Gradio moves complete uploads into a folder of their own
            with suppress(OSError):  # read and deleted by a request meanwhile
                if path.is_file() and now - path.stat().st_mtime > (STALE if whole else PARTIAL):
                    path.unlink()


class Page:
    """A Gradio page over a prediction service."""

    def __init__(self, service: PredictionService, about: cards.About, uploads: Path, is_local: bool = True) -> None:
        """
        Args:
            service: Answers requests and saves corrections.
            about: Facts about the run, for the head of the page.
            uploads: An empty folder of ours, in which Gradio keeps an upload until it is read.
            is_local: Whether only this machine can reach the page.
        """
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio

        self.service, self.gradio = service, gradio
        self.uploads = Uploads(uploads, int(service.limits.together * 1e6))
        photos = LOCAL if is_local else REMOTE
        with gradio.Blocks(title=about.run, analytics_enabled=False) as self.blocks:
            gradio.HTML(f"<h2>{escape(about.run)}</h2>{cards.head(about, photos=photos)}")
            kept = gradio.State({}, time_to_live=STALE)
            files = gradio.File(
                label=f"Photos, at most {service.limits.megabytes:g} MB each",
                file_count="multiple",
                file_types=["image"],
                height=140,
            )
            answers = gradio.HTML()
            with gradio.Row(visible=False) as correction:
                which = gradio.Dropdown(label="Picture", choices=[], interactive=True)
                right = gradio.Dropdown(
                    label="Right name",
                    info="Choose one, or type a new one",
                    value=None,
                    choices=list(service.classifier.names),
                    allow_custom_value=True,
                    interactive=True,
                )
                save = gradio.Button("Save correction")
            said = gradio.Markdown()
            files.upload(self.show, files, [kept, files, answers, correction, which, said], api_visibility="private")
            which.change(self.said, [kept, which], right, api_visibility="private")
            save.click(self.correct, [kept, which, right], said, api_visibility="private")
            gradio.api(self.classify, api_name="classify")  # type: ignore[attr-defined]
        self.blocks.queue(default_concurrency_limit=4, max_size=256)
        threading.Thread(target=self._tidy, daemon=True).start()

    def launch(self, host: str, port: int) -> Any:
        """Serve in the background; return Gradio's server object, which has the address in `local_url`."""
        theme = self.gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        self.blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=int(self.service.limits.megabytes * 1e6),
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
        """Return answers to uploaded pictures, as `python -m common.predict --format jsonl` writes them."""
        return [vars(answer) for answer in self._answers(self._read(pictures))]

    def show(self, paths: Sequence[str] | None) -> tuple[Any, ...]:
        """Return the new state of the page after an upload."""
        gradio = self.gradio
        contents = self._read([{"path": path, "orig_name": Path(path).name} for path in paths or []])
        answers = self._answers(contents)
        told = {answer.image: (contents[answer.image], answer.label) for answer in answers if not answer.error}
        choices = gradio.Dropdown(choices=list(told), value=next(iter(told), None))
        return told, None, cards.render(answers, contents), gradio.Row(visible=bool(told)), choices, ""

    def said(self, kept: Mapping[str, tuple[bytes, str | None]], which: str | None) -> Any:
        """Return the field of the right name with the answer to the chosen picture."""
        return self.gradio.Dropdown(value=kept[which][1] if which is not None and which in kept else None)

    def correct(self, kept: Mapping[str, tuple[bytes, str | None]], which: str | None, label: str | None) -> str:
        """Save a correction; return a message."""
        if which is None or which not in kept or not label:
            return "Choose a picture and its right name."
        content, answered = kept[which]
        try:
            table = self.service.keep(content, label, answered)
        except UserError as error:
            return f"Not saved: {error}"
        said = f"{which}: saved as {label} in `{table}`."
        if self.service.classifier.config.data.own_photos:
            return f"{said} Behind the run's command `data.reader.corrections={table}` trains on it, too"
        return f"{said} With nine or more of every class you can train on it (docs/predict.md)"

    def _tidy(self) -> None:
        while True:
            time.sleep(PARTIAL / 4)
            self.uploads.tidy(time.time())

    def _answers(self, contents: Mapping[str, bytes]) -> list[Answer]:
        try:
            return self.service.answer(contents)
        except UserError as error:
            raise self.gradio.Error(str(error)) from error

    def _read(self, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """Return the contents of uploads by name."""
        try:
            read = self.uploads([str(file.get("path", "")) for file in files], self.service.limits.check)
        except UserError as error:
            raise self.gradio.Error(str(error)) from error
        contents: dict[str, bytes] = {}
        for number, (file, content) in enumerate(zip(files, read, strict=True)):
            name = str(file.get("orig_name") or Path(str(file["path"])).name)
            contents[name if name not in contents else f"{name} ({number})"] = content
        return contents
