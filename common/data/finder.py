"""Where the pictures of a table lie: names without their suffix or folder, as an address in the web has them, or as
Label Studio stores them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from common.data.layout import parts_by_name, pictures
from common.data.litter import reason
from common.data.location import Location
from common.data.spelling import URL, composed, invisible, on_disk, visible

# Label Studio's own addresses of an upload (whose name begins with eight digits of its own) and of a local file.
UPLOAD = re.compile(r"/data/(?:(?:upload/\d+/)((?:[\da-f]{8}-)?(.+))|local-files/\?d=(.+))")


class Finder:
    """Finds the pictures of a table: where it says, or near the table under what is left of their names."""

    def __init__(self, location: Location, table: Path) -> None:
        """
        Args:
            location: For errors, and for a note on what was found elsewhere.
            table: Its paths are relative to its folder; if its name means a part, pictures in that part go first.
        """
        self.location, self.table, self.folder = location, table, table.parent
        self.elsewhere: Counter[str] = Counter()  # how many pictures were found in a folder
        self.unknown: list[str] = []  # names without a suffix that no picture has
        self.known = 0
        self._index: dict[str, list[str]] | None = None

    def __call__(self, where: str, path: str) -> str:
        """The path of a picture, from the table's folder; as it is written if there is none.

        Raises:
            UserError: It is a URL, has a character that nobody sees, or could be two pictures.
        """
        if URL.match(path):
            raise self.location.error(
                f"{where}: '{path}' is a URL, and URLs are not read; download the pictures, and give their paths"
            )
        upload = UPLOAD.fullmatch(path)
        names = upload.groups() if upload else (path, path.replace("\\", "/"))
        ways = dict.fromkeys(way for name in names if name for way in (name, unquote(name)))
        for way in ways:
            if os.path.exists(on_disk(self.folder / way)):
                self.known += 1
                return way
        if character := invisible(path):
            raise self.location.error(
                f"{where}: path '{visible(path)}' has the invisible character {character}; remove it"
            )
        for way in ways:
            if found := self._near(where, way):
                self.known += 1
                return found
        if upload:
            raise self.location.error(
                f"{where}: {path} is an address inside Label Studio, and {list(ways)[-1]} is not in {self.folder}; copy"
                " the pictures there"
            )
        if not pictures([path]):
            self.unknown.append(path)
        return path.replace("\\", "/")  # as written on Windows

    def conclude(self) -> None:
        """Note what was found elsewhere.

        Raises:
            UserError: The table has names without suffixes, and there is a picture of none.
        """
        if self.unknown and not self.known:
            raise self.location.error(
                f"{self.table}: there is no picture called {self.unknown[0]} in {self.folder}, nor one of the"
                f" {len(self.unknown)} others; put the pictures there, or correct the column of paths"
            )
        if self.elsewhere:
            told = ", ".join(f"{count} in {folder}" for folder, count in sorted(self.elsewhere.items()))
            self.location.notes.append(f"{self.table.name}: pictures were found by their names, {told}")

    def _near(self, where: str, way: str) -> str:
        """A picture below the table's folder by its name alone, or by its path without a suffix; empty: there is none.

        Raises:
            UserError: There are two, and the table's name means no part or the part of both.
        """
        hits = self.index.get(composed(way), [])
        if part := parts_by_name([self.table.stem]).get(self.table.stem):
            tops = parts_by_name({hit.split("/")[0] for hit in hits})
            hits = [hit for hit in hits if tops.get(hit.split("/")[0]) == part] or hits
        if len(hits) > 1:
            raise self.location.error(f"{where}: '{way}' could be {hits[0]} or {hits[1]}; give its path")
        if not hits:
            return ""
        folder = hits[0].rpartition("/")[0]
        if folder != way.rpartition("/")[0]:
            self.elsewhere[f"{folder}/"] += 1
        return hits[0]

    @property
    def index(self) -> dict[str, list[str]]:
        """The pictures below the table's folder, by their names and paths, with and without their suffixes."""
        if self._index is None:
            self._index = {}
            for here, folders, names in os.walk(on_disk(self.folder)):
                folders[:] = [name for name in folders if not reason(name)]
                inside = Path(here).relative_to(on_disk(self.folder)).as_posix()
                for name in pictures([name for name in names if not reason(name)]):
                    path = name if inside == "." else f"{inside}/{name}"
                    for key in dict.fromkeys((name, Path(name).stem, path.rpartition(".")[0])):
                        self._index.setdefault(composed(key), []).append(path)
        return self._index
