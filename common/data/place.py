"""Where a dataset lies, and the errors of readers: one line with the folder that was looked for and what to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.types import UserError


@dataclass(frozen=True)
class Place:
    """A dataset's place on this machine.

    Args:
        name: Of the dataset; its section in docs/datasets.md, and the first part of its images' keys.
        root: The folder of all datasets (CoOp's `$DATA`).
        folder: This dataset's.
        allow_fallback_split: Whether a split of our own may stand in for a missing split file.
        only_test: The training images are not needed; a reader may save the time that it takes to list them.
    """

    name: str
    root: Path
    folder: Path
    allow_fallback_split: bool = False
    only_test: bool = False

    @property
    def section(self) -> str:
        return f"docs/datasets.md#{self.name}"

    def need(self, relative: str) -> Path:
        """A file or folder of the dataset.

        Raises:
            UserError: It is not there.
        """
        for path in (self.folder, self.folder / relative):
            if not path.exists():
                raise UserError(f"data={self.name}: {path} does not exist; {self.section} says where to get it")
        return self.folder / relative

    def key(self, relative: str) -> str:
        """The key of an image, from its path inside the folder (with `/`)."""
        return f"{self.name}/{relative}"

    def error(self, what: str) -> UserError:
        """A mistake in the dataset's files."""
        return UserError(f"data={self.name}: {what}; see {self.section}")
