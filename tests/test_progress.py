"""What a log shows of a long training: a line a minute, and nothing of a short one."""

from __future__ import annotations

import pytest

from common.runtime import progress


@pytest.fixture
def said(monkeypatch):
    lines, clock = [], [1000.0]
    monkeypatch.setattr(progress, "is_shown", lambda: False)
    monkeypatch.setattr(progress, "say", lines.append)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return lines, clock


def test_a_line_a_minute_where_nobody_looks(said):
    """40 s a step, begun by an earlier attempt at 10 of 20: after three steps 2 min are gone, and 7 steps are left."""
    lines, clock = said
    with progress.bar("training", 20, done=10) as shown:
        for note in ("a", None, "reward 0.5"):
            clock[0] += 40.0
            shown.advance(note)
    assert lines == ["training: 12 of 20, 1 min gone, about 5 min left; a"]
    clock[0] += 60.0
    shown.advance()
    assert lines[1:] == ["training: 14 of 20, 3 min gone, about 4 min left; reward 0.5"]


def test_what_is_short_says_nothing(said):
    lines, clock = said
    for _ in progress.progress(range(50), "evaluating", 50):
        clock[0] += 1.0
    assert lines == []


def test_on_a_terminal_there_are_bars_instead(said, monkeypatch):
    lines, clock = said
    shown = progress.Bar("training", 3)
    monkeypatch.setattr(progress, "is_shown", lambda: True)
    clock[0] += 600.0
    shown.advance()
    assert lines == []
