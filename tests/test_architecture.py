"""The rule of place, and what must stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPERS = {"alert", "clsrl"}
MODULES = sorted(path for package in ("common", *PAPERS) for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rule_of_place(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = PAPERS if package == "common" else PAPERS - {package}
    assert not imported(path) & forbidden, "common knows no paper, and papers do not know each other"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_say_what_they_are_and_stay_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module begins with a docstring"
    assert len(text.splitlines()) <= 300, "look for the noun that wants its own file"


def test_papers_are_reached_only_through_targets():
    assert not imported(ROOT / "run.py") & PAPERS


LIGHT = (
    "run",
    "common.config",
    "common.data.check",
    "common.data.hub",
    "common.data.names",
    "common.parsing",
    "common.rewards",
    "common.metrics",
    "common.report.tables",
    "common.report.figures",
    "common.preflight",
    "common.task",
    "common.run_folder",
    "clsrl.method",
    "alert.accounting",
    "alert.bank_file",
    "alert.candidate_file",
    "alert.reference",
    "alert.judge",
    "alert.judge_hf",
    "alert.judge_openai",
    "alert.method",
    "alert.rewards",
)


@pytest.mark.slow
@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; heavy = {{'torch', 'transformers', 'deepspeed', 'sklearn'}} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
