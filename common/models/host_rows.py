"""A table of embeddings on the host: one copy for all ranks of a machine, of which devices are lent what a batch needs.

For tables that are too large for every device: ALERT's bank for ImageNet is 1,000 x 256 x 2,560 numbers, 2.6 GB in
fp32, and gradient, two moments, master copy and reference are as large again. Here the table lies in a file on a local
disk ($TMPDIR) that the ranks of a machine map; the moments, and the rows as they began, take room for entries alone
that an update has touched. Ranks of a machine share the arithmetic; machines do the same.

Shapes: E entries, m rows of an entry, D width, b entries lent.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.models.lazy_adamw import Moments, Rule, catch_up, step
from common.runtime.distributed import barrier, gather, rank
from common.types import UserError

FILES = ("rows", "first", "second", "begun")
FACTS = "facts.json"
LENT = 64  # entries that are kept as they are now, so that several forwards of an update need them once


class HostRows:
    """Entries by number. All ranks call what writes together; reading is a rank's own affair."""

    def __init__(self, entries: torch.Tensor, rule: Rule) -> None:
        """
        Args:
            entries: As they begin, equal on all ranks. Shape: [E, m, D].
            rule: How they are updated.

        Raises:
            UserError: The disk is full, or cannot be written.
        """
        self.shape, self.rule = tuple(entries.shape), rule
        self.rates: list[float] = []
        self.begins = False  # a copy that stays as it began, see `__deepcopy__`
        self.now: dict[int, torch.Tensor] = {}
        hosts = gather(socket.gethostname())
        here = [number for number, host in enumerate(hosts) if host == hosts[rank()]]
        self.turn, self.turns = here.index(rank()), len(here)
        folder = Path(tempfile.mkdtemp(prefix="embeddings-")) if self.turn == 0 else None
        try:
            if folder is not None:
                self._write(folder, entries)
            folders = gather(folder)
            self._map(folders[here[0]])
            barrier()
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays until the processes end

    def _write(self, folder: Path, entries: torch.Tensor) -> None:
        size = entries.numel() * 4
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(
                f"trainer.embeddings=host needs {size / 2**30:.1f} GiB in {folder.parent}, and up to four times as much"
                f" when every category was trained; {free / 2**30:.1f} are free. Set TMPDIR to a larger local disk"
            )
        with (folder / "rows").open("wb") as file:
            for entry in entries:
                entry.float().contiguous().numpy().tofile(file)
        for name in FILES[1:]:
            with (folder / name).open("wb") as file:
                file.truncate(size)  # takes room once it is written to
        with (folder / "last").open("wb") as file:
            file.truncate(len(entries) * 8)

    def _map(self, folder: Path | None) -> None:
        assert folder is not None
        size = self.shape[0] * self.shape[1] * self.shape[2]
        self.rows, self.first, self.second, self.begun = (
            torch.from_file(str(folder / name), shared=True, size=size).view(self.shape) for name in FILES
        )
        self.last = torch.from_file(str(folder / "last"), shared=True, size=self.shape[0], dtype=torch.long)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostRows:
        """The same table as it began: what a frozen reference sees."""
        other = object.__new__(HostRows)
        other.__dict__ |= self.__dict__ | {"begins": True, "now": {}}
        return other

    def __len__(self) -> int:
        return self.shape[0]

    def lend(self, entries: Sequence[int], begun: bool = False) -> torch.Tensor:
        """Some entries as they are now, or as they began. Shape: [b, m, D], fp32 on the CPU."""
        if begun or self.begins:
            return torch.stack([(self.begun if self.last[e] else self.rows)[e] for e in entries])
        if len(self.now) > LENT:
            self.now.clear()
        for entry in entries:
            if entry not in self.now:
                self.now[entry] = self._current(entry)[0]
        return torch.stack([self.now[entry] for entry in entries])

    def step(self, gradients: Mapping[int, torch.Tensor], rate: float) -> None:
        """One update; entries without a gradient have one of zero.

        Args:
            gradients: By entry, equal on all ranks. Shape of each: [m, D].
            rate: Learning rate.
        """
        for entry in self._mine(gradients):
            rows, moments = self._current(entry)
            if not self.last[entry]:
                self.begun[entry] = self.rows[entry]
            step(rows, moments, gradients[entry].float().cpu(), rate, self.rule)
            self._keep(entry, rows, moments)
        self.rates.append(rate)
        self.now.clear()
        barrier()

    def settle(self) -> None:
        """Do for all touched entries what updates without them have left to be done, before many are read."""
        barrier()  # nobody reads any more
        for entry in self._mine(self.touched()):
            if self.last[entry] < len(self.rates):
                self._keep(entry, *self._current(entry))
        self.now.clear()
        barrier()

    def touched(self) -> list[int]:
        """Entries that an update has had a gradient for."""
        return self.last.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]

    def table(self) -> torch.Tensor:
        """All entries as they are now. Shape: [E, m, D]; as large as the file."""
        whole = torch.empty(self.shape)
        for entry in range(len(self)):
            whole[entry] = self._current(entry)[0]
        return whole

    def save(self, folder: Path) -> None:
        """Write what `restore` reads: the touched entries, and how they began; the others are as they began."""
        folder.mkdir(parents=True, exist_ok=True)
        touched = self.touched()
        for name in FILES:
            with (folder / name).open("wb") as file:
                for entry in touched:
                    getattr(self, name)[entry].numpy().tofile(file)
        facts = {"entries": touched, "last": self.last[touched].tolist(), "rates": self.rates}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Be as `save` found them, whatever has happened since. All ranks call it together."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        kept = {entry: number for number, entry in enumerate(facts["entries"])}
        size, shape = len(kept) * math.prod(self.shape[1:]), (len(kept), *self.shape[1:])
        saved = {name: torch.from_file(str(folder / name), size=size).view(shape) for name in FILES if kept}
        barrier()  # nobody reads any more
        for entry in self._mine({*self.touched(), *kept}):
            if entry not in kept:
                self.rows[entry] = self.begun[entry]
                self.first[entry], self.second[entry], self.last[entry] = 0, 0, 0
                continue
            for name in FILES:
                getattr(self, name)[entry] = saved[name][kept[entry]]
            self.last[entry] = facts["last"][kept[entry]]
        self.rates = facts["rates"]
        self.now.clear()
        barrier()

    def _mine(self, entries: Iterable[int]) -> list[int]:
        return [entry for entry in sorted(entries) if entry % self.turns == self.turn]

    def _current(self, entry: int) -> tuple[torch.Tensor, Moments]:
        """Copies, up to date. Shape: [m, D]."""
        last = int(self.last[entry])
        if last:
            moments = Moments(self.first[entry].clone(), self.second[entry].clone(), last)
        else:
            moments = Moments(torch.zeros(self.shape[1:]), torch.zeros(self.shape[1:]), last)
        rows = self.rows[entry].clone()
        catch_up(rows, moments, self.rates, self.rule)
        return rows, moments

    def _keep(self, entry: int, rows: torch.Tensor, moments: Moments) -> None:
        self.rows[entry], self.first[entry], self.second[entry] = rows, moments.first, moments.second
        self.last[entry] = moments.last
