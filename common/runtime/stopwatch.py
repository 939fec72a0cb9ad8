"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Seconds by phase since it was made; what no phase claims is `other`, so that they add up to the total."""

    def __init__(self, earlier: float = 0.0) -> None:
        """`earlier`: seconds that former attempts of the run took."""
        self.began, self.earlier = time.perf_counter(), earlier
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside belongs to `name`."""
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - clock

    def elapsed(self) -> float:
        """Seconds of this attempt and those before it."""
        return self.earlier + time.perf_counter() - self.began

    def split(self, known: Mapping[str, float]) -> dict[str, float]:
        """All phases, `known` ones from elsewhere, `other`, and the total."""
        phases, total = {**self.phases, **known}, self.elapsed()
        return {**phases, "other": total - sum(phases.values()), "total": total}
