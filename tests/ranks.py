"""Ranks without processes: the same function in one thread for each, whose `gather` really collects."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from common.runtime import distributed

NAMES = ("rank", "world", "gather")


class Ranks:
    """Calls functions as several ranks would: `share_of` gives each its part, `gather` waits for all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = threading.local()
        originals = {name: getattr(distributed, name) for name in NAMES}
        for module in list(sys.modules.values()):
            for name, original in originals.items():
                if (
                    getattr(module, "__name__", "").startswith(("common", "alert", "clsrl"))
                    and vars(module).get(name) is original
                ):
                    monkeypatch.setattr(module, name, getattr(self, name))

    def rank(self) -> int:
        return getattr(self.own, "rank", 0)

    def world(self) -> int:
        return getattr(self.own, "world", 1)

    def gather(self, item: Any) -> list[Any]:
        if self.world() == 1:
            return [item]
        self.items[self.rank()] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found

    def __call__(self, count: int, function: Callable[[int], Any]) -> list[Any]:
        """What the function returns on each of `count` ranks; it gets the rank's number."""
        self.items, self.barrier = [None] * count, threading.Barrier(count, timeout=60)
        results: list[Any] = [None] * count
        errors: list[BaseException] = []

        def run(number: int) -> None:
            self.own.rank, self.own.world = number, count
            try:
                results[number] = function(number)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results
