"""The garbage collector rests only while a process imports its libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = """
import gc, weakref
from common.runtime import process

class Thing:
    def __init__(self):
        self.itself = self

with process.garbage_collector_paused():
    resting, libraries = not gc.isenabled(), Thing()
aside, on = gc.get_freeze_count(), gc.isenabled()
own = weakref.ref(Thing())
gc.collect()
with process.garbage_collector_paused():  # the second run
    never = gc.isenabled()
print(resting, aside > 0, on, own() is None, never, gc.isenabled(), gc.get_freeze_count() == aside)
"""
FAILS = """
import gc
from common.runtime import process
try:
    with process.garbage_collector_paused():
        raise ImportError
except ImportError:
    print(gc.isenabled())
"""


def python(lines: str) -> str:
    command = [sys.executable, "-c", lines]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_it_rests_once_and_what_a_run_makes_is_collected():
    assert python(STEPS).split() == ["True"] * 7


def test_it_collects_again_where_an_import_fails():
    assert python(FAILS) == "True"
