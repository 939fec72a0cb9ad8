"""Process uploads: refuse what is too large, classify one request at a time, save corrections."""

from __future__ import annotations

import csv
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from common.data.images import decode
from common.data.listing import visible
from common.data.names import display, objection
from common.predict.classifier import Answer, Classifier
from common.types import BadImage, UserError

COLUMNS = ("path", "label", "answered")
# Formats whose size PIL reads before it decodes; others, such as ICO, are decoded at once.
FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "GIF", "BMP", "TIFF")
LONGEST = 100  # characters of a typed class name


@dataclass(frozen=True)
class Limits:
    """Limits of one request: bytes and pixels of a picture, number of pictures, and their bytes together."""

    megabytes: float = 20.0
    megapixels: float = 50.0
    pictures: int = 64
    together: float = 200.0

    def check(self, sizes: Sequence[int]) -> None:
        """Check sizes before anything is read.

        Args:
            sizes: Sizes of the files in bytes.

        Raises:
            UserError: There are too many files, or they are too large together.
        """
        if len(sizes) > self.pictures:
            raise UserError(f"{len(sizes)} pictures at once; at most {self.pictures} are answered together")
        if sum(sizes) > self.together * 1e6:
            raise UserError(f"{sum(sizes) / 1e6:.0f} MB at once; at most {self.together:g} MB are taken together")


class PredictionService:
    """Handles requests from many threads. No upload is kept unless it is corrected."""

    def __init__(self, classifier: Classifier, feedback: Path, limits: Limits | None = None) -> None:
        """
        Args:
            classifier: A loaded classifier.
            feedback: Folder of corrected pictures and of feedback.csv, created at the first correction.
            limits: Limits of a request.
        """
        self.classifier, self.feedback, self.limits = classifier, feedback, limits or Limits()
        self.asking, self.keeping = threading.Lock(), threading.Lock()

    def answer(self, pictures: Mapping[str, bytes]) -> list[Answer]:
        """Answer pictures by name, in their order; the answer to a refused one says why.

        Raises:
            UserError: There are too many.
        """
        self.limits.check([len(content) for content in pictures.values()])
        refused = {name: why for name, content in pictures.items() if (why := self.refusal(content))}
        good = {name: content for name, content in pictures.items() if name not in refused}
        with self.asking:
            answers = {answer.image: answer for answer in self.classifier(good)} if good else {}
        return [Answer(name, error=refused[name]) if name in refused else answers[name] for name in pictures]

    def refusal(self, content: bytes) -> str:
        """Return why a picture is not even decoded; empty if it may be. Reads only its header."""
        if len(content) > self.limits.megabytes * 1e6:
            return f"{len(content) / 1e6:.3g} MB are more than {self.limits.megabytes:g} MB"
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as picture:
                pixels = picture.width * picture.height
        except Exception:  # PIL's readers raise nearly every kind on files that are not images
            return f"not a picture that is taken here ({', '.join(FORMATS)})"
        if pixels > self.limits.megapixels * 1e6:
            return f"{pixels / 1e6:.4g} megapixels are more than {self.limits.megapixels:g}"
        return ""

    def keep(self, content: bytes, label: str, answered: str | None) -> Path:
        """Save a picture under its right name; a later name for the same picture replaces the earlier one.

        The picture is encoded again, without metadata such as the place where it was taken.

        Args:
            content: The upload.
            label: Class name, as `data=folder` will read it.
            answered: Answer of the model.

        Returns:
            Path of feedback.csv, which `data=folder data.folder=<path>` reads.

        Raises:
            UserError: The name or the picture cannot be used.
        """
        label = display(label)
        # own names may contain a comma; new ones may not, since some methods list names with commas in their prompts
        known = label in self.classifier.names
        if not known and (len(label) > LONGEST or "," in label or not any(letter.isalnum() for letter in label)):
            raise UserError(f"{label[:LONGEST]!r} is no class name: 1 to {LONGEST} characters without a comma")
        if why := objection(label):
            raise UserError(f"the name '{visible(label)}' {why}; write it differently")
        if why := self.refusal(content):
            raise UserError(why)
        try:
            picture = decode(content, self.classifier.background)
        except BadImage as error:
            raise UserError(str(error)) from error
        # the name is a hash of the pixels, so the same picture gets one row
        name = f"{hashlib.sha256(f'{picture.size}'.encode() + picture.tobytes()).hexdigest()[:16]}.png"
        table = self.feedback / "feedback.csv"
        with self.keeping:
            (self.feedback / "pictures").mkdir(parents=True, exist_ok=True)
            picture.save(self.feedback / "pictures" / name)
            rows = self._rows(table)
            rows[f"pictures/{name}"] = (label, answered or "")
            part = table.with_suffix(".part")
            with part.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows((path, *values) for path, values in rows.items())
            os.replace(part, table)
        return table

    def _rows(self, table: Path) -> dict[str, tuple[str, str]]:
        if not table.is_file():
            return {}
        with table.open(encoding="utf-8-sig", newline="") as file:  # -sig: a spreadsheet may have added a mark
            return {row["path"]: (row["label"], row["answered"]) for row in csv.DictReader(file)}
