"""Where a dataset lies, and the errors of readers: one line with the folder that was looked for and what to read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from common.data.contents import Contents
from common.data.spelling import composed, invisible, on_disk
from common.types import UserError


@dataclass(frozen=True)
class Location:
    """Where a dataset lies on this machine.

    Args:
        name: Of the dataset; its section in docs/datasets.md, and the first part of its images' keys.
        root: The folder of all datasets (CoOp's `$DATA`).
        folder: This dataset's.
        allow_fallback_split: Whether a split of our own may stand in for a missing split file.
        only_test: The training images are not needed; a reader may save the time that it takes to list them.
        tried: Where the dataset was looked for, if `folder` is not the only choice.
        passed_over: What readers left aside so far, by its path, and why.
        notes: What readers have to say about how they took what they found, each a sentence.
        background: Colour behind transparent parts of its pictures.
        contents: Where the hashes of its files are kept.
    """

    name: str
    root: Path
    folder: Path
    allow_fallback_split: bool = False
    only_test: bool = False
    tried: tuple[Path, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    background: str = "white"
    contents: Contents = field(default_factory=Contents, compare=False, repr=False)

    @property
    def section(self) -> str:
        return f"docs/datasets.md#{self.name}"

    def need(self, relative: str) -> Path:
        """A file or folder of the dataset.

        Raises:
            UserError: It is not there.
        """
        if not _is_there(self.folder) and len(self.tried) > 1:
            paths = " nor ".join(map(str, self.tried))
            raise UserError(
                f"data={self.name}: neither {paths} exists{_hidden(paths)}; {self.section} says what belongs there"
            )
        for path in (self.folder, self.folder / relative):
            if not _is_there(path):
                raise UserError(
                    f"data={self.name}: {path} does not exist{_hidden(str(path))}; {self.section} says what belongs"
                    " there"
                )
        return self.folder / relative

    def key(self, relative: str) -> str:
        """The key of an image, from its path inside the folder (with `/`); in NFC, however the path is written."""
        return composed(f"{self.name}/{relative}")

    def pass_over(self, path: Path, why: str) -> None:
        """Note a file or folder that is no data. A folder counts once; so does what is listed twice."""
        self.passed_over[str(path)] = why

    def error(self, what: str) -> UserError:
        """A mistake in the dataset's files."""
        return UserError(f"data={self.name}: {what}; see {self.section}")


def _hidden(path: str) -> str:
    """What a path has that nobody sees, as copied from a web page or a window of Windows."""
    return f" (the path has the invisible character {character})" if (character := invisible(path)) else ""


def _is_there(path: Path) -> bool:
    return os.path.exists(on_disk(path))  # unlike Path.exists, it answers for every path
