"""Extra embeddings that stay on the host, for tables too large for every device, with an AdamW that skips idle rows."""

from __future__ import annotations

import json
import math
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.models.adapters import without_adapters
from common.models.extra_embeddings import ExtraEmbeddings, trained_format
from common.runtime.distributed import barrier, gather, rank, world
from common.types import UserError

# AdamW of rows that most updates do not touch: an update without a gradient is replayed when a row is next read.
#
# The same arithmetic as `torch.optim.AdamW` on the whole table, in the same order. A row without a gradient still
# shrinks by rate times decay and drifts on by its momentum; both are replayed, one missed update after the other.
#
# Shapes: any, all tensors alike.

EPSILON = 1e-8  # of torch's AdamW
FORGOTTEN = 2.0**-30  # share of a step that no fp32 row notices


@dataclass(frozen=True)
class Rule:
    """What does not change from update to update."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def horizon(self) -> int:
        """Missed updates after which the momentum has died away against the second moment's root."""
        shrinks = self.betas[0] / math.sqrt(self.betas[1]) if self.betas[1] > 0 else 0.0
        return 1 if shrinks == 0 else math.ceil(math.log(FORGOTTEN) / math.log(min(shrinks, 1 - 1e-4)))


@dataclass
class Moments:
    """Of some rows: first and second moment, and the update that they have seen last, from 1; 0: none."""

    first: torch.Tensor
    second: torch.Tensor
    last: int


def adamw_step(rows: torch.Tensor, moments: Moments, gradient: torch.Tensor, rate: float, rule: Rule) -> None:
    """Update number `moments.last + 1`, in place."""
    rows.mul_(1 - rate * rule.weight_decay)
    moments.first.lerp_(gradient, 1 - rule.betas[0])
    moments.second.mul_(rule.betas[1]).addcmul_(gradient, gradient, value=1 - rule.betas[1])
    moments.last += 1
    _move(rows, moments, rate, rule)


def catch_up(rows: torch.Tensor, moments: Moments, rates: Sequence[float], rule: Rule) -> None:
    """The updates `moments.last + 1` to `len(rates)`, none of which had a gradient, in place.

    Args:
        rows: Are changed.
        moments: Are changed.
        rates: Learning rates of all updates so far.
        rule: Of all updates.
    """
    for number in range(moments.last, min(moments.last + rule.horizon, len(rates)) if moments.last else 0):
        rows.mul_(1 - rates[number] * rule.weight_decay)
        moments.first.mul_(rule.betas[0])
        moments.second.mul_(rule.betas[1])
        moments.last = number + 1
        _move(rows, moments, rates[number], rule)
    if missed := rates[moments.last :]:  # rows that never moved, or whose momentum is forgotten, only shrink
        rows.mul_(math.prod(1 - rate * rule.weight_decay for rate in missed))
        moments.first.zero_()
        moments.second.mul_(rule.betas[1] ** len(missed))
        moments.last = len(rates)


def _move(rows: torch.Tensor, moments: Moments, rate: float, rule: Rule) -> None:
    corrections = [1 - beta**moments.last for beta in rule.betas]
    root = moments.second.sqrt().div_(math.sqrt(corrections[1])).add_(EPSILON)
    rows.addcdiv_(moments.first, root, value=-rate / corrections[0])


# A table of embeddings on the host: one copy for all ranks of a machine, from which devices fetch what a batch needs.
#
# For tables that are too large for every device: ALERT's bank for ImageNet is 1,000 x 256 x 2,560 numbers, 2.6 GB in
# fp32, and gradient, two moments, master copy and reference are as large again. Here the table lies in a file on a
# local disk ($TMPDIR) that the ranks of a machine map; the moments, and the rows as they began, take room for entries
# alone that an update has touched. Ranks of a machine share the arithmetic; machines do the same.
#
# Shapes: E entries, m rows of an entry, D width, b entries fetched.

FILES = ("rows", "first", "second", "begun")
FACTS = "facts.json"
FETCHED = 64  # entries that are kept as they are now, so that several forwards of an update need them once


class OffloadedRows:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedRows:
        """The same table as it began: what a frozen reference sees."""
        other = object.__new__(OffloadedRows)
        other.__dict__ |= self.__dict__ | {"begins": True, "now": {}}
        return other

    def __len__(self) -> int:
        return self.shape[0]

    def fetch(self, entries: Sequence[int], begun: bool = False) -> torch.Tensor:
        """Some entries as they are now, or as they began. Shape: [b, m, D], fp32 on the CPU."""
        if begun or self.begins:
            return torch.stack([(self.begun if self.last[e] else self.rows)[e] for e in entries])
        if len(self.now) > FETCHED:
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
            adamw_step(rows, moments, gradients[entry].float().cpu(), rate, self.rule)
            self._keep(entry, rows, moments)
        self.rates.append(rate)
        self.now.clear()
        barrier()

    def flush(self) -> None:
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


# Embeddings beyond the vocabulary that stay on the host, for tables too large for every device.
#
# Shapes: E entries, m rows of an entry, D width, b entries of a batch.

SPREAD = 16  # entries of which ranks add up the gradients at a time


class OffloadedEmbeddings(ExtraEmbeddings):
    """Slots whose rows stay on the host and are fetched to the device for a forward (`HostRows`).

    They are no parameter of the model, so an engine neither holds nor updates them. It does see how large their
    gradient is: that is the gradient of `norm`, a number that never moves. So the engine's norm is that of all
    gradients, and model and rows are clipped alike.
    """

    def __init__(self, embedding: Any, entries: torch.Tensor, trainable: bool, rule: Rule, dtype: torch.dtype) -> None:
        """
        Args:
            embedding: The model's own.
            entries: Shape: [E, m, D].
            trainable: Whether the rows get gradients.
            rule: Of their updates.
            dtype: Of the engine's trained parameters.
        """
        super().__init__(embedding, entries.shape[0], entries.shape[1], trainable)
        self.host = OffloadedRows(entries, rule)
        self.norm = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=embedding.weight.device), trainable)
        self.gradients: dict[int, torch.Tensor] = {}
        self.last = False  # the backward that follows is the last of an update

    def table(self) -> torch.Tensor:
        """See `Slots.table`."""
        return self.host.table()

    def parts(self) -> list[torch.nn.Parameter]:
        """See `Slots.parts`."""
        return []

    def remember(self) -> None:
        """The host's rows remember how they began."""

    def flush(self) -> None:
        """See `Slots.flush`."""
        self.host.flush()

    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """See `Slots.rows`."""
        entries = numbers // self.width
        used = torch.unique(entries[beyond])
        if not len(used):
            used = entries.new_zeros(1)  # so that every forward has the same graph
        fetched = self.host.fetch(used.tolist(), self.back).to(numbers.device)
        if self.trainable and torch.is_grad_enabled() and not self.back:
            fetched = _Fetched.apply(fetched, self.norm, self, used.tolist())
        places = torch.searchsorted(used, entries).clamp(max=len(used) - 1)
        return fetched.flatten(0, 1)[places * self.width + numbers % self.width]

    def add(self, entries: Sequence[int], gradients: torch.Tensor) -> torch.Tensor:
        """Gradients of one backward; of the last one of an update, the norm over all and all ranks is returned."""
        for entry, gradient in zip(entries, gradients.float(), strict=True):
            known = self.gradients.get(entry)
            self.gradients[entry] = gradient.clone() if known is None else known.add_(gradient)
        if not self.last:
            return torch.zeros_like(self.norm)
        self._over_ranks(gradients)
        squares = [gradient.square().sum() for gradient in self.gradients.values()]
        return torch.stack(squares).sum().sqrt().to(self.norm).expand_as(self.norm)

    def _over_ranks(self, like: torch.Tensor) -> None:
        """Average over ranks, as an engine does with the gradients of its parameters."""
        if world() == 1:
            return
        union = sorted(set().union(*gather(set(self.gradients))))
        for start in range(0, len(union), SPREAD):
            part = union[start : start + SPREAD]
            total = torch.zeros((len(part), *like.shape[1:]), device=like.device)
            for place, entry in enumerate(part):
                if entry in self.gradients:
                    total[place] = self.gradients[entry]
            torch.distributed.all_reduce(total)
            for place, entry in enumerate(part):
                self.gradients[entry] = total[place] / world()

    def step(self, rate: float, share: float) -> None:
        """One update with `share` of the gradients, which is below 1 if they were clipped."""
        self.host.step({entry: gradient * share for entry, gradient in self.gradients.items()}, rate)
        self.forget()

    def forget(self) -> None:
        """Drop gradients that no update will use."""
        self.gradients.clear()
        self.last = False


class _Fetched(torch.autograd.Function):
    """Fetched rows; their gradient goes back to the table, its norm to the parameter that stands for it."""

    @staticmethod
    def forward(
        ctx: Any, fetched: torch.Tensor, norm: torch.Tensor, extra: OffloadedEmbeddings, entries: list[int]
    ) -> Any:
        ctx.extra, ctx.entries = extra, entries
        return fetched.view_as(fetched)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, ctx.extra.add(ctx.entries, gradients[0]), None, None


def attach_offloaded(model: Any, entries: torch.Tensor, trainable: bool, rule: Rule) -> OffloadedEmbeddings:
    """Attach extra embeddings whose rows stay on the host and are updated by `rule`. All ranks call it together."""
    base = without_adapters(model)
    extra = OffloadedEmbeddings(base.get_input_embeddings(), entries, trainable, rule, trained_format(model))
    base.set_input_embeddings(extra)
    return extra
