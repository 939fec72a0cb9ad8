"""A sweep that is made of others, its chapters: their points run together, each has its own page, and all of them stand
in one report. sweeps/mini_paper.yaml is one.

    title: Both papers in miniature
    given: {trainer.updates: 60}                                         # of every chapter
    chapters:
      - {sweep: clsrl_table2, title: Few shots, text: What is asked., given: {model: tiny_qwen2_vl}}

A chapter is a YAML beside the book's. What is given replaces its values, as the command line does, which goes before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import OmegaConf

from common.sweep.plan import Spec, based, choices
from common.types import UserError

LONGEST = 120  # characters of a sweep's folder
KEYS = {"sweep", "title", "text", "given"}
# Another choice of these is still the paper's table; what a row must have of them: common/report/paper/comparable.py.
STILL_THE_PAPERS = (
    *("seed", "protocol", "rollout", "deepspeed", "selection"),
    *("clip.prompts", "few_shot.generated", "few_shot.per_class", "clip.options.file", "visual.options.file"),
)


@dataclass(frozen=True)
class Chapter:
    """One sweep. given: values that replace its own; tiny: what a tiny model brings with it."""

    name: str
    spec: Spec
    page: dict[str, Any]
    tiny: dict[str, list[str]]
    title: str = ""
    text: str = ""
    given: dict[str, list[str]] = field(default_factory=dict)

    @property
    def methods(self) -> set[str]:
        """Of its points, as far as they stand in its YAML."""
        rows = [{**self.spec.params, **based(self.spec, row)} for row in self.spec.points]
        return {method for row in rows for method in choices(row.get("method", ""))}

    def values(self, given: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """What replaces the sweep's values, `given` on the command line included."""
        values = {**self.given, **given}
        is_tiny = any(name.startswith("tiny_") for name in values.get("model", ()))
        return {**(self.tiny if is_tiny else {}), **values}

    def parted(self, values: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], dict[str, str]]:
        """What replaces the sweep's values so that the table is not the paper's, and what only chooses among those that
        all of its points have.
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
    """Where Hydra looks for configurations, in its order."""
    return [Path(source.path) for source in loader.get_sources() if source.scheme() == "file"]


def alone(name: str, keys: Mapping[str, Any]) -> Chapter:
    """A sweep by itself. `keys`: of the sweeper, see conf/hydra/sweeper/paper.yaml."""
    return Chapter(name, Spec(keys["params"], keys["named"], keys["points"]), keys["page"], _texts(keys["tiny"]))


def read(keys: Mapping[str, Any], folders: Sequence[Path]) -> list[Chapter]:
    """The chapters of a book.

    Args:
        keys: Of the sweeper.
        folders: With configurations, in the order in which Hydra looks through them.

    Raises:
        UserError: One is wrong, or its sweep is not there.
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
    """Chapters that have points of some methods; of all, for None, or if none has any, so that its error says so."""
    fitting = [chapter for chapter in chapters if methods is None or chapter.methods & set(methods)]
    return fitting or list(chapters)


def _texts(values: Mapping[str, Any]) -> dict[str, list[str]]:
    return {key: choices(value) for key, value in values.items()}


def folder_name(sweep: str, given: Mapping[str, str]) -> str:
    """A sweep's folder: its name and what the command line changed of it, so that no other page is written over.

    >>> folder_name("clsrl_table2", {"model": "tiny_qwen2_vl", "data": "digits,fashion", "seed": "1"})
    'clsrl_table2-tiny_qwen2_vl-digits+fashion-seed1'
    """
    words = [text if key in ("model", "data") else f"{key}{text}" for key, text in given.items()]
    name = re.sub(r"[^\w.+-]", "_", "-".join([sweep, *words]).replace(",", "+"))
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{sha256(name.encode()).hexdigest()[:6]}"
