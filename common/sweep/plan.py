"""Expand a sweep's YAML and the command line into points; read sweeps that consist of other sweeps (chapters)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import OmegaConf

from common.config import composition
from common.types import UserError

# Points of a sweep. The YAML:
#
# params: {seed: [1, 2, 3], data: imagenet}          # of every point; a list is one point per item
# named:                                             # points that others build on
#   draft: {method: cafo, clip: rn50}
#   alert: {method: alert, method.draft: file, method.draft_file: "{draft}"}
# points:
# - {use: draft, shots: [1, 2, 4, 8, 16]}          # starts with the values of the named point
# - {use: alert, shots: [1, 2, 4, 8, 16]}          # {draft}: its run's folder, of the same data, shots and seed
# - {method: clip_zero_shot, shots: 1, labels: {shots: 0}}   # label on the page, if not the value
#
# A value with `{name}` makes the point depend on the named one, which runs before it, once for all that need it.


LATER = ("shots", "seed")  # they select no configuration file: points that differ only in them are composed once
DRAW = ("data", "shots", "seed")  # values that a point shares with those that it needs
RUN = re.compile(r"\{(\w+)\}")
PRIVATE = ("use", "labels")  # keys of a point that are not overrides


@dataclass(frozen=True)
class Point:
    """One run. overrides: as on the command line, where `{name}` stands for the folder of needs[name].

    labels: labels on the page, by key.
    """

    overrides: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    needs: dict[str, Point] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Length of the longest chain of points that must run before it."""
        return max((1 + point.depth for point in self.needs.values()), default=0)


@dataclass(frozen=True)
class Spec:
    """The YAML of a sweep, see the comment above."""

    params: Mapping[str, Any]
    named: Mapping[str, Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]


def expand(spec: Spec, given: Mapping[str, Sequence[str]]) -> list[Point]:
    """Return the points in their order, without those that only others need.

    Args:
        spec: The YAML.
        given: Values of the command line by key. They replace those of every point; `method` selects points.

    Raises:
        UserError: A name is not known, a point needs itself, or the sweep has no points of a method.


    >>> spec = Spec({"seed": [1, 2]}, {"a": {"method": "sft"}}, [{"use": "a", "shots": 4}, {"model.path": "{a}/model"}])
    >>> [point.overrides for point in expand(spec, {"data": ["dtd"], "seed": ["3"]})][0]
    {'method': 'sft', 'data': 'dtd', 'seed': '3', 'shots': '4'}
    >>> last = expand(spec, {"data": ["dtd"]})[3]
    >>> last.overrides, last.needs["a"].overrides
    ({'model.path': '{a}/model', 'data': 'dtd', 'seed': '2'}, {'seed': '2', 'method': 'sft', 'data': 'dtd'})
    """
    values = {key: texts for key, texts in given.items() if key != "method"}
    points = [point for row in spec.points for point in _of_row(spec, row, values)]
    if "method" not in given:
        return points
    methods = dict.fromkeys(point.overrides.get("method", "") for point in points)
    if unknown := [method for method in given["method"] if method not in methods]:
        raise UserError(f"method={unknown[0]}: the sweep has no such points; it has {', '.join(methods)}")
    return [point for point in points if point.overrides.get("method") in given["method"]]


def _of_row(spec: Spec, row: Mapping[str, Any], given: Mapping[str, Sequence[str]]) -> list[Point]:
    merged = {**spec.params, **based(spec, row)}
    labels = {str(key): str(value) for key, value in (merged.get("labels") or {}).items()}
    values = {key: choices(value) for key, value in merged.items() if key not in PRIVATE}
    values |= {key: list(texts) for key, texts in given.items()}
    values = dict(sorted(values.items(), key=lambda each: each[0] in LATER))  # shots and seed vary fastest
    points = []
    for chosen in itertools.product(*values.values()):
        overrides = dict(zip(values, chosen, strict=True))
        points.append(Point(overrides, labels, _needs(spec, overrides, given, ())))
    return points


def based(spec: Spec, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of points, with the values of the named point that it uses."""
    if "use" not in row:
        return dict(row)
    return {**_named(spec, str(row["use"])), **row}


def _named(spec: Spec, name: str) -> Mapping[str, Any]:
    if name not in spec.named:
        raise UserError(f"the sweep has no point named {name!r} under hydra.sweeper.named; it has {[*spec.named]}")
    return based(spec, spec.named[name])


def _needs(
    spec: Spec, overrides: Mapping[str, str], given: Collection[str], below: tuple[str, ...]
) -> dict[str, Point]:
    """Return the points whose folders the values refer to; values of the command line apply to them as well."""
    needs = {}
    for name in dict.fromkeys(found for value in overrides.values() for found in RUN.findall(value)):
        if name in below:
            raise UserError(f"the sweep's point {name!r} needs itself: {' -> '.join([*below, name])}")
        values = {**spec.params, **_named(spec, name)}
        single = {str(key): choices(value)[0] for key, value in values.items() if key not in PRIVATE}
        single |= {key: value for key, value in overrides.items() if key in DRAW or key in given}
        needs[name] = Point(single, {}, _needs(spec, single, given, (*below, name)))
    return needs


def decides(key: str) -> bool:
    """Tell whether a result depends on an override's key.

    >>> [decides(key) for key in ("gpus", "tracking.mode", "data.root", "data", "rollout.temperature")]
    [False, False, False, True, True]
    >>> [decides(f"model.{key}") for key in ("max_prompt_tokens", "path")]
    [False, True]
    """
    first, *rest = key.lstrip("+~").split("@")[0].replace("/", ".").split(".")
    parts = {"data": composition.NOT_IN_SIGNATURE_OF_DATA, "model": composition.NOT_IN_SIGNATURE_OF_MODEL}
    return first not in composition.NOT_IN_SIGNATURE and rest[:1] not in [[name] for name in parts.get(first, ())]


def choices(value: Any) -> list[str]:
    """Return the values of a key, each in Hydra's grammar."""
    return [_text(each) for each in value] if isinstance(value, list | tuple) else [_text(value)]


def _text(value: Any) -> str:
    """Return a value in Hydra's grammar.

    >>> [_text(value) for value in (True, None, 4, "rn50", "{a}/model")]
    ['true', 'null', '4', 'rn50', '{a}/model']
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


# A book: a sweep that consists of others, its chapters. Their points run together, each has its own page, and one
# report shows all of them. sweeps/mini_paper.yaml is one. The YAML:
#
# title: Both papers in miniature
# given: {trainer.updates: 60}                                         # of every chapter
# chapters:
# - {sweep: clsrl_table2, title: Few shots, text: What is asked., given: {model: tiny_qwen2_vl}}
#
# A chapter is a YAML beside the book's. `given` replaces its values; the command line takes precedence.

LONGEST = 120  # characters of a sweep's folder name
KEYS = {"sweep", "title", "text", "given"}
# With other values of these it is still the paper's table; common/report/paper/cells.py checks single rows.
STILL_THE_PAPERS = (
    *("seed", "protocol", "rollout", "deepspeed", "selection"),
    *("clip.prompts", "few_shot.generated", "few_shot.per_class", "clip.options.file", "visual.options.file"),
)


@dataclass(frozen=True)
class Chapter:
    """One sweep. given: values that replace its own; tiny: values that apply with a tiny model."""

    name: str
    spec: Spec
    page: dict[str, Any]
    tiny: dict[str, list[str]]
    title: str = ""
    text: str = ""
    given: dict[str, list[str]] = field(default_factory=dict)

    @property
    def methods(self) -> set[str]:
        """The methods of its points, as its YAML gives them."""
        rows = [{**self.spec.params, **based(self.spec, row)} for row in self.spec.points]
        return {method for row in rows for method in choices(row.get("method", ""))}

    def values(self, given: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """Return the values that replace the sweep's own, including `given` from the command line."""
        values = {**self.given, **given}
        is_tiny = any(name.startswith("tiny_") for name in values.get("model", ()))
        return {**(self.tiny if is_tiny else {}), **values}

    def parted(self, values: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], dict[str, str]]:
        """Split the values that replace the sweep's own: those that make it another table than the paper's, and those
        that only select among values that all of its points have.
        """
        rows = [{**self.spec.params, **based(self.spec, row)} for row in self.spec.points]
        texts = {key: ",".join(each) for key, each in values.items() if key.lstrip("+") not in STILL_THE_PAPERS}
        chosen = {
            key: text
            for key, text in texts.items()
            if key == "method" or all(key in row and {*values[key]} <= {*choices(row[key])} for row in rows)
        }
        return {key: text for key, text in texts.items() if key not in chosen}, chosen


def folders(loader: ConfigLoader) -> list[Path]:
    """Return the folders in which Hydra searches configurations, in its order."""
    return [Path(source.path) for source in loader.get_sources() if source.scheme() == "file"]


def alone(name: str, keys: Mapping[str, Any]) -> Chapter:
    """Return a sweep as its only chapter. `keys`: keys of the sweeper, see conf/hydra/sweeper/paper.yaml."""
    return Chapter(name, Spec(keys["params"], keys["named"], keys["points"]), keys["page"], _texts(keys["tiny"]))


def read(keys: Mapping[str, Any], folders: Sequence[Path]) -> list[Chapter]:
    """Read the chapters of a book.

    Args:
        keys: Keys of the sweeper.
        folders: Folders of configurations, in Hydra's search order.

    Raises:
        UserError: A chapter is wrong, or its sweep does not exist.
    """
    found: list[Chapter] = []
    for number, each in enumerate(keys["chapters"], 1):
        key = f"hydra.sweeper.chapters[{number}]"
        if unknown := sorted(set(each) - KEYS):
            raise UserError(f"{key}: {unknown[0]} is no key of a chapter; it has {', '.join(sorted(KEYS))}")
        name = str(each.get("sweep", ""))
        if name in [chapter.name for chapter in found]:
            raise UserError(f"{key}.sweep={name}: it is a chapter already; give the values of both to one")
        path = next(
            (folder / f"{name}.yaml" for folder in folders if name and (folder / f"{name}.yaml").is_file()), None
        )
        if path is None:
            raise UserError(f"{key}.sweep={name}: there is no such file in {', '.join(map(str, folders))}")
        whole: Any = OmegaConf.to_container(OmegaConf.load(path))
        own = whole.get("hydra", {}).get("sweeper", {})
        # a chapter contributes only its sweeper's keys, so other values of its YAML would have no effect
        if beside := sorted(set(whole) - {"defaults", "hydra"}):
            raise UserError(f"{key}.sweep={name}: {beside[0]} of {path} would be lost; move it into its params")
        if not own.get("points") or not own.get("page"):
            raise UserError(f"{key}.sweep={name}: {path} has no hydra.sweeper.points or page of its own")
        spec = Spec({**keys["params"], **own.get("params", {})}, own.get("named", {}), own["points"])
        tiny = _texts({**keys["tiny"], **own.get("tiny", {})})
        given = _texts({**keys["given"], **(each.get("given") or {})})
        found.append(Chapter(name, spec, own["page"], tiny, each.get("title", name), each.get("text", ""), given))
    return found


def with_methods(chapters: Sequence[Chapter], methods: Sequence[str] | None) -> list[Chapter]:
    """Return the chapters with points of some methods; all for None, or if none has any, so that its error says so."""
    fitting = [chapter for chapter in chapters if methods is None or chapter.methods & set(methods)]
    return fitting or list(chapters)


def _texts(values: Mapping[str, Any]) -> dict[str, list[str]]:
    return {key: choices(value) for key, value in values.items()}


def folder_name(sweep: str, given: Mapping[str, str]) -> str:
    """Return a sweep's folder name: its name and the changes by the command line, so that pages are not overwritten.

    >>> folder_name("clsrl_table2", {"model": "tiny_qwen2_vl", "data": "digits,fashion", "seed": "1"})
    'clsrl_table2-tiny_qwen2_vl-digits+fashion-seed1'
    """
    words = [text if key in ("model", "data") else f"{key}{text}" for key, text in given.items()]
    name = re.sub(r"[^\w.+-]", "_", "-".join([sweep, *words]).replace(",", "+"))
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{sha256(name.encode()).hexdigest()[:6]}"
