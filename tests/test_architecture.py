"""The house: papers stand apart, arrows only go down, nothing imports in a circle, and the light parts need no torch.

Packages are found by looking, so that a new one cannot escape the rules.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from common.config import schema

ROOT = Path(__file__).parent.parent
BESIDE = {"tests", "benchmarks"}  # they may import anything
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - BESIDE
PAPERS = PACKAGES - {"common"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for p in PACKAGES for path in (ROOT / p).rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()} | {"run": ROOT / "run.py"}

# From the ground up: a folder or module of `common` imports from those above it in this list alone. A new one is put in.
FLOORS = (
    *("types", "counted", "plugins", "parsing", "runtime", "cli", "rewards", "config", "data"),
    *(
        "vlm.prompting",
        "models",
        "vlm.check",
        "judge",
        "forward",
        "rollout",
        "training",
        "cost",
        "evaluation",
        "run",
        "learner",
    ),
    *("few_shot", "vlm", "preflight", "report", "sweep", "pipeline", "launch", "predict", "export", "serve"),
)


def targets(path: Path) -> set[str]:
    """Modules of ours that a module imports anywhere in its code, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inside}
    return {name for name in found if name in MODULES}


IMPORTS = {name: targets(path) - {name} for name, path in MODULES.items()}


def floor(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts) if ".".join(parts) in FLOORS else parts[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rule_of_place(module):
    package, imported = module.split(".")[0], {name.split(".")[0] for name in IMPORTS[module]}
    forbidden = PAPERS if package in ("common", "run") else PAPERS - {package}
    assert not imported & forbidden, "common knows no paper, and papers do not know each other"


def test_arrows_only_go_down():
    of_common = {name for name in MODULES if name.startswith("common.")}
    assert {floor(name) for name in of_common} == set(FLOORS), "put a new folder of common into FLOORS"
    up = [
        f"{name} -> {other}"
        for name in of_common
        for other in IMPORTS[name] & of_common
        if floor(name) != floor(other) and FLOORS.index(floor(other)) > FLOORS.index(floor(name))
    ]
    assert not up


def test_nothing_imports_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_say_what_they_are(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())), "a module begins with a docstring"


HEAVY_PARTS = (
    "alert.tiny",
    "alert.bank",
    "alert.draft",
    "alert.export",
    "alert.learner",
    "clsrl.related.dive_k_learner",
    "clsrl.related.fine_r1_learner",
    "clsrl.related.tapo",
)
LIGHT = (
    "run",
    "common.config.composition",
    "common.data.check",
    "common.data.hub",
    "common.data.names",
    "common.data.task",
    "common.evaluation.metrics",
    "common.evaluation.metrics",
    "common.few_shot.candidates",
    "common.few_shot.check",
    "common.judge.reward",
    "common.launch",
    "common.learner",
    "common.models.files",
    "common.parsing",
    "common.report.figures",
    "common.report.prompts",
    "common.report.tables",
    "common.rewards",
    "common.preflight",
    "common.run.result",
    "common.run.run_folder",
    "common.vlm.prompting",
    "common.vlm.prompting",
    *(name for name in MODULES if name.split(".")[0] in PAPERS and not name.startswith(HEAVY_PARTS)),
    "alert.bank.file",
)
HEAVY = ["torch", "transformers", "deepspeed", "sklearn", "datasets"]


@pytest.mark.slow
def test_light_modules_do_not_import_torch():
    """One process imports one after the other, until the first that brings something heavy."""
    code = f"""
import importlib, json, sys
found = {{}}
for name in {sorted(set(LIGHT) - {"alert.inspect"})!r}:
    importlib.import_module(name)
    found[name] = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    if found[name]:
        break
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not {name: heavy for name, heavy in found.items() if heavy}


def unencoded(path: Path) -> list[str]:
    """Calls that open text with the locale's encoding."""
    found = []
    for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        words = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = [word.value for word in words if isinstance(word, ast.Constant) and word.value in ("r", "w", "a", "x")]
        if (name in ("read_text", "write_text") or (name == "open" and modes)) and not any(
            keyword.arg == "encoding" for keyword in call.keywords
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_text_files_are_utf8_under_every_locale():
    assert not {name: calls for name, path in MODULES.items() if (calls := unencoded(path))}


NOUNS = (
    "classes|images|pictures|photos|shots|runs|files|updates|points|values|groups|names|labels|tokens|processes|ranks|"
    "folders|questions|columns|rows|weights|samples|seeds|categories|candidates|prompts|replies|cells"
)
COUNTED = re.compile(rf" (?:test |training |class )?(?:{NOUNS})\b")
NEVER_ONE = {  # bounds, whole data sets, and sizes that are refused below two
    *("len(choices)", "len(known)", "WINDOW", "candidates.DEPTH", "each", "test", "classes"),
    *("len(names)", "length", "longest", "len(row)", "len(sizes)", "updates", "min(stale)", "len(self.images)"),
    *("100 * test['difference']", "world()", "len(columns)"),
}


def test_one_of_a_thing_has_no_plural():
    """Messages say numbers with `counted` (common/counted.py); those that remain cannot be one."""
    found = []
    for name, path in MODULES.items():
        for text in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)):
            for value, after in pairwise(text.values):
                if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                    counts = ast.unparse(value.value)
                    if COUNTED.match(after.value) and counts not in NEVER_ONE | {
                        "part",
                        "key",
                        "name",
                        "source",
                        "index.name",
                        "run.records / 'manifest.json'",
                    }:
                        found.append(f"{name}: {{{counts}}}{after.value[:30]}")
    assert found == []


KILLED = re.compile(rf'"((?:{"|".join(sorted(PACKAGES))})[\w.]*):([\w.]+)"')


def defines(tree: ast.AST, path: str) -> bool:
    """Whether a module has the class or function `Class.name` or `name`."""
    name, _, rest = path.partition(".")
    found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == name]
    return bool(found) and (not rest or defines(found[0], rest))


def test_what_a_test_kills_exists():
    """`make test-faults` takes long; a renamed function must not wait for it."""
    named = {match for path in (ROOT / "tests").glob("*.py") for match in KILLED.findall(path.read_text())}
    assert len(named) > 20
    missing = {
        f"{module}:{name}" for module, name in named if not defines(ast.parse(MODULES[module].read_text()), name)
    }
    assert not missing


# Methods and learners that came after the two papers', which other packages could bring as well, and model families.
LATER = (
    *("think_after_answer", "adaptive_thinking", "visual_rft", "refine_rft", "speciarl", "dive_k", "fine_r1"),
    *("lp_plus_plus", "clap", "cross_modal", "proker", "ape", "ape_t", "timo", "timo_s"),
)
LISTS = {"README.md", "conf/config.yaml"}


@cache
def texts() -> dict[Path, str]:
    places = [ROOT / "README.md", ROOT / "run.py", ROOT / "Makefile", ROOT / "conf/config.yaml", *FILES.values()]
    return {path: path.read_text(encoding="utf-8") for path in places}


def files_naming(name: str) -> set[str]:
    """Files of the product that name an addition, without its own: its modules, and its class among the families."""
    return {
        path.relative_to(ROOT).as_posix()
        for path, text in texts().items()
        if path.stem not in (name, "families") and path.parent.name != "related" and re.search(rf"\b{name}\b", text)
    }


@pytest.mark.parametrize("name", LATER)
def test_an_addition_touches_two_lists(name):
    """What `common/` asks by the name of a method or learner would be a missing hook."""
    assert name in yaml.safe_load((ROOT / f"conf/method/{name}.yaml").read_text())["method"].values()
    assert "conf/config.yaml" in (found := files_naming(name)) and found <= LISTS


@pytest.mark.parametrize("name", sorted(schema.FAMILIES.keys() - {"qwen2_vl", "gemma3"}))  # these two are the papers'
def test_a_family_touches_its_short_name(name):
    """Beside the two lists, which name its models."""
    tiny = ROOT / "common/models/tiny"  # random weights for tests
    found = {path for path in files_naming(name) if not (ROOT / path).is_relative_to(tiny)}
    assert found == {"common/config/schema.py"}
