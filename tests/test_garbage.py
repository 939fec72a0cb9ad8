"""The garbage collector rests only while the first run of a process imports its libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STEPS = """
import gc, weakref
from common.runtime import garbage

class Thing:
    def __init__(self):
        self.itself = self

libraries = Thing()
garbage.rest()
resting = not gc.isenabled()
garbage.set_aside()
aside = gc.get_freeze_count()
own = weakref.ref(Thing())
held = own() is not None
garbage.resume()
gc.collect()
garbage.rest()  # the second run
garbage.set_aside()
print(resting, aside > 0, held, own() is None, gc.isenabled(), gc.get_freeze_count() == aside)
"""


def test_it_rests_once_and_what_a_run_makes_is_collected():
    assert python(STEPS).split() == ["True"] * 6


def test_nothing_is_set_aside_where_it_does_not_rest():
    assert (
        python("import gc; from common.runtime import garbage as g; g.set_aside(); print(gc.get_freeze_count())") == "0"
    )


@pytest.mark.slow
def test_a_run_that_ends_early_lets_it_collect_again(tmp_path):
    """The process may serve more runs. `dry=true` only looks whether the run is there."""
    arguments = ["run.py", "dry=true", f"hydra.run.dir={tmp_path}/run"]
    lines = f"import gc, runpy, sys; sys.argv = {arguments}; runpy.run_path('run.py', run_name='__main__')"
    lines += "; print(gc.isenabled())"
    assert python(lines).splitlines()[-1] == "True"


def python(lines: str) -> str:
    command = [sys.executable, "-c", lines]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
