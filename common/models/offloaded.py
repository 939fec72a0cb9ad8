"""Extra embeddings in host memory, for tables too large for a device, with an AdamW that skips rows without gradients.

In three parts: lazy AdamW, the table shared by the ranks of a machine, and the embedding module on top of it.
"""

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

# Lazy AdamW: updates in which a row had no gradient are replayed when the row is next read.
#
# The arithmetic and its order are those of `torch.optim.AdamW` on the whole table: without a gradient a row still
# shrinks by weight decay and moves by its momentum.
#
# Shapes: any, equal for all tensors.

EPSILON = 1e-8  # default of torch's AdamW
FORGOTTEN = 2.0**-30  # share of a step that is lost to rounding in fp32


@dataclass(frozen=True)
class Rule:
    """Hyperparameters of AdamW that stay the same in all updates."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def horizon(self) -> int:
        """Return the number of missed updates after which momentum no longer moves a row."""
        # per missed update the step, first moment / sqrt(second moment), shrinks by this factor
        shrinks = self.betas[0] / math.sqrt(self.betas[1]) if self.betas[1] > 0 else 0.0
        return 1 if shrinks == 0 else math.ceil(math.log(FORGOTTEN) / math.log(min(shrinks, 1 - 1e-4)))


@dataclass
class Moments:
    """First and second moment of some rows. last: number of the last update they include, from 1; 0: none."""

    first: torch.Tensor
    second: torch.Tensor
    last: int


def adamw_step(rows: torch.Tensor, moments: Moments, gradient: torch.Tensor, rate: float, rule: Rule) -> None:
    """Make update number `moments.last + 1`, in place."""
    rows.mul_(1 - rate * rule.weight_decay)
    moments.first.lerp_(gradient, 1 - rule.betas[0])
    moments.second.mul_(rule.betas[1]).addcmul_(gradient, gradient, value=1 - rule.betas[1])
    moments.last += 1
    _move(rows, moments, rate, rule)


def catch_up(rows: torch.Tensor, moments: Moments, rates: Sequence[float], rule: Rule) -> None:
    """Replay the updates `moments.last + 1` to `len(rates)`, in which the rows had no gradient.

    Args:
        rows: Rows to change in place.
        moments: Moments to change in place.
        rates: Learning rates of all updates so far.
        rule: Hyperparameters of all updates.
    """
    # while momentum lasts: one AdamW step with a gradient of zero per missed update
    for number in range(moments.last, min(moments.last + rule.horizon, len(rates)) if moments.last else 0):
        rows.mul_(1 - rates[number] * rule.weight_decay)
        moments.first.mul_(rule.betas[0])
        moments.second.mul_(rule.betas[1])
        moments.last = number + 1
        _move(rows, moments, rates[number], rule)
    # afterwards, and for rows that never had a gradient, only weight decay is left: all at once
    if missed := rates[moments.last :]:
        rows.mul_(math.prod(1 - rate * rule.weight_decay for rate in missed))
        moments.first.zero_()
        moments.second.mul_(rule.betas[1] ** len(missed))
        moments.last = len(rates)


def _move(rows: torch.Tensor, moments: Moments, rate: float, rule: Rule) -> None:
    # bias correction, then the operations of torch's AdamW in their order, so that results round alike
    corrections = [1 - beta**moments.last for beta in rule.betas]
    root = moments.second.sqrt().div_(math.sqrt(corrections[1])).add_(EPSILON)
    rows.addcdiv_(moments.first, root, value=-rate / corrections[0])


# The table: one copy per machine in a file on a local disk ($TMPDIR) that all its ranks map into memory.
#
# Why: ALERT's bank for ImageNet is 1,000 x 256 x 2,560 numbers, 2.6 GB in fp32, and on a device gradient, two moments,
# master copy and reference would each be as large. Here, moments and initial rows take space only for entries that an
# update has touched. The ranks of a machine divide the updates among them; every machine computes all of them.
#
# Shapes: E entries, m rows of an entry, D width, b entries fetched.

FILES = ("rows", "first", "second", "begun")
FACTS = "facts.json"
FETCHED = 64  # entries kept up to date in memory, since several forwards of an update fetch the same ones


class OffloadedRows:
    """Table of entries in shared memory. All ranks call `step`, `flush` and `restore` together; each reads alone."""

    def __init__(self, entries: torch.Tensor, rule: Rule) -> None:
        """
        Args:
            entries: Initial entries, equal on all ranks. Shape: [E, m, D].
            rule: Hyperparameters of the updates.

        Raises:
            UserError: The disk is full, or cannot be written.
        """
        self.shape, self.rule = tuple(entries.shape), rule
        self.rates: list[float] = []
        self.begins = False  # True for a copy that reads initial rows, see `__deepcopy__`
        self.now: dict[int, torch.Tensor] = {}
        # the ranks of a machine take turns in updating entries; the first of them creates the files
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
                shutil.rmtree(folder, ignore_errors=True)  # mapped files exist until the processes end

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
                file.truncate(size)  # a sparse file: takes space only where it is written
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
        """Return a view of the same table that reads the initial rows, for a frozen reference policy."""
        other = object.__new__(OffloadedRows)
        other.__dict__ |= self.__dict__ | {"begins": True, "now": {}}
        return other

    def __len__(self) -> int:
        return self.shape[0]

    def fetch(self, entries: Sequence[int], begun: bool = False) -> torch.Tensor:
        """Return entries as they are now, or with `begun` as they were initially. Shape: [b, m, D], fp32 on the CPU."""
        # an entry that no update has touched still has its initial rows in `rows`
        if begun or self.begins:
            return torch.stack([(self.begun if self.last[e] else self.rows)[e] for e in entries])
        if len(self.now) > FETCHED:
            self.now.clear()
        for entry in entries:
            if entry not in self.now:
                self.now[entry] = self._current(entry)[0]
        return torch.stack([self.now[entry] for entry in entries])

    def step(self, gradients: Mapping[int, torch.Tensor], rate: float) -> None:
        """Make one update; entries without a gradient count as having one of zero.

        Args:
            gradients: Gradient by entry, equal on all ranks. Shape of each: [m, D].
            rate: Learning rate.
        """
        for entry in self._mine(gradients):
            rows, moments = self._current(entry)
            if not self.last[entry]:  # the first update of this entry: keep the initial rows
                self.begun[entry] = self.rows[entry]
            adamw_step(rows, moments, gradients[entry].float().cpu(), rate, self.rule)
            self._keep(entry, rows, moments)
        self.rates.append(rate)
        self.now.clear()
        barrier()

    def flush(self) -> None:
        """Bring all touched entries up to date once, before many forwards read them."""
        barrier()  # no rank reads any more
        for entry in self._mine(self.touched()):
            if self.last[entry] < len(self.rates):
                self._keep(entry, *self._current(entry))
        self.now.clear()
        barrier()

    def touched(self) -> list[int]:
        """Return the entries that had a gradient in at least one update."""
        return self.last.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]

    def table(self) -> torch.Tensor:
        """Return all entries as they are now. Shape: [E, m, D]; as large as the file."""
        whole = torch.empty(self.shape)
        for entry in range(len(self)):
            whole[entry] = self._current(entry)[0]
        return whole

    def save(self, folder: Path) -> None:
        """Write a checkpoint for `restore`: touched entries with moments and initial rows; others have not changed."""
        folder.mkdir(parents=True, exist_ok=True)
        touched = self.touched()
        for name in FILES:
            with (folder / name).open("wb") as file:
                for entry in touched:
                    getattr(self, name)[entry].numpy().tofile(file)
        facts = {"entries": touched, "last": self.last[touched].tolist(), "rates": self.rates}
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Restore the state that `save` wrote. All ranks call it together."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        kept = {entry: number for number, entry in enumerate(facts["entries"])}
        size, shape = len(kept) * math.prod(self.shape[1:]), (len(kept), *self.shape[1:])
        saved = {name: torch.from_file(str(folder / name), size=size).view(shape) for name in FILES if kept}
        barrier()  # no rank reads any more
        for entry in self._mine({*self.touched(), *kept}):
            if entry not in kept:  # touched after the checkpoint only: back to the initial rows
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
        """Return copies of rows and moments with missed updates replayed. Shape: [m, D]."""
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


# The embedding module, which fetches the entries of a batch to the device.
#
# Shapes: E entries, m rows of an entry, D width, b entries of a batch.

SPREAD = 16  # entries per all-reduce of gradients; bounds its buffer on the device


class OffloadedEmbeddings(ExtraEmbeddings):
    """Extra embeddings whose rows stay on the host (`OffloadedRows`) and are fetched to the device for a forward.

    The rows are no parameter, so DeepSpeed neither holds nor updates them. Gradient clipping still covers them: the
    norm of their gradients is passed off as the gradient of `norm`, a parameter of one number that is never
    changed, so the engine's total norm is that of all gradients.
    """

    def __init__(self, embedding: Any, entries: torch.Tensor, trainable: bool, rule: Rule, dtype: torch.dtype) -> None:
        """
        Args:
            embedding: Input embedding of the model.
            entries: Initial rows. Shape: [E, m, D].
            trainable: Whether the rows get gradients.
            rule: Hyperparameters of their updates.
            dtype: Number format of the engine's trained parameters.
        """
        super().__init__(embedding, entries.shape[0], entries.shape[1], trainable)
        self.host = OffloadedRows(entries, rule)
        self.norm = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=embedding.weight.device), trainable)
        self.gradients: dict[int, torch.Tensor] = {}
        self.last = False  # whether the next backward is the last one of an update

    def table(self) -> torch.Tensor:
        """Return all rows, see `ExtraEmbeddings.table`."""
        return self.host.table()

    def parts(self) -> list[torch.nn.Parameter]:
        """Return no parameters: the rows are not part of the model."""
        return []

    def remember(self) -> None:
        """Do nothing: the table keeps its initial rows by itself."""

    def flush(self) -> None:
        """Bring all touched entries up to date. All ranks call it together."""
        self.host.flush()

    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """Return the rows of some ids, see `ExtraEmbeddings.rows`."""
        entries = numbers // self.width
        used = torch.unique(entries[beyond])
        # A batch without entries fetches entry 0, so that `norm` is in the graph of every forward.
        if not len(used):
            used = entries.new_zeros(1)
        fetched = self.host.fetch(used.tolist(), self.back).to(numbers.device)
        if self.trainable and torch.is_grad_enabled() and not self.back:
            fetched = _Fetched.apply(fetched, self.norm, self, used.tolist())
        # Index of each entry among the fetched ones; ids of the vocabulary get any valid index, they are masked later.
        places = torch.searchsorted(used, entries).clamp(max=len(used) - 1)
        return fetched.flatten(0, 1)[places * self.width + numbers % self.width]

    def add(self, entries: Sequence[int], gradients: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradients of one backward and return the gradient for `norm`.

        It is zero, except in the last backward of an update: there it is the norm of all gradients, over all ranks.
        """
        for entry, gradient in zip(entries, gradients.float(), strict=True):
            known = self.gradients.get(entry)
            self.gradients[entry] = gradient.clone() if known is None else known.add_(gradient)
        if not self.last:
            return torch.zeros_like(self.norm)
        self._over_ranks(gradients)
        squares = [gradient.square().sum() for gradient in self.gradients.values()]
        return torch.stack(squares).sum().sqrt().to(self.norm).expand_as(self.norm)

    def _over_ranks(self, like: torch.Tensor) -> None:
        """Average over ranks, as the engine does with the gradients of its parameters."""
        if world() == 1:
            return
        # ranks have seen different entries; one that a rank has not seen counts as zero there
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
        """Make one update with the gradients times `share`, which is below 1 if they are clipped."""
        self.host.step({entry: gradient * share for entry, gradient in self.gradients.items()}, rate)
        self.forget()

    def forget(self) -> None:
        """Drop gradients that no update will use."""
        self.gradients.clear()
        self.last = False


class _Fetched(torch.autograd.Function):
    """Identity on fetched rows; backward hands their gradients to `OffloadedEmbeddings.add`, the result to `norm`."""

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
