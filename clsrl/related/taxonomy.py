"""Taxonomies: which names stand above a name, and the verdict of that on an answer; SpeciaRL's verifier by rules.

Shipped ones are in taxonomies.yaml; others come from tables, WordNet, or FGVC-Aircraft's own files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config.schema import one_of
from common.parsing import normalize
from common.types import UserError

# 1. From a label and an answer to a verdict. Names are compared as `normalize` writes them.

Verdict = Literal["more specific", "specific", "less specific", "generic", "abstain", "wrong"]
RANKS: dict[Verdict, int] = {
    "more specific": 1,
    "specific": 1,
    "less specific": 2,
    "generic": 3,
    "abstain": 4,
    "wrong": 5,
}
ABSTAINS = "none"  # the answer of a model that abstains
NEAR = 2  # steps above the label that are less specific, those beyond are generic; our choice
RULES = ("none", "head_noun", "car")
MAKES = ("am general", "aston martin", "land rover")  # makes of two words in Stanford Cars
BODIES = re.compile(
    r" (sedan|coupe|convertible|hatchback|suv|wagon|minivan|van|(?:(?:regular|crew|extended|quad|club) )?cab)$"
)


@dataclass(frozen=True)
class Taxonomy:
    """What stands above a name.

    Attributes:
        parents: What stands directly above each thing.
        things: Things that a name stands for, where a name may have several meanings; a name that is not in it stands
            for the thing of that name.
        generic: Names that are right and say nothing, whatever the class.
        rule: What follows from a label that `parents` does not have: `none`; `head_noun` (the last words of the name:
            "footed albatross" and "albatross" are above "black footed albatross"); `car` (a year, a make, a model and a
            body, see `of_a_car`).
    """

    parents: Mapping[str, frozenset[str]] = field(default_factory=dict)
    things: Mapping[str, frozenset[str]] = field(default_factory=dict)
    generic: frozenset[str] = frozenset()
    rule: str = "none"

    def above(self, thing: str) -> dict[str, int]:
        """Return everything above a thing, with the smallest number of steps to it."""
        found, front = {thing: 0}, {thing}
        while front:
            step = found[next(iter(front))] + 1
            front = {up for each in front for up in self.parents.get(each, ())} - found.keys()
            found |= dict.fromkeys(front, step)
        return {up: step for up, step in found.items() if step}

    def verdict(self, label: str, answer: str, aliases: Iterable[str] = ()) -> Verdict:
        """Return how specific an answer is; where a name has several meanings, the best of them counts.

        Names follow from a label by `rule`, never from an answer: "no fox" or "owl or fox" is no kind of fox.

        >>> birds = Taxonomy({"albatross": frozenset({"bird"})}, rule="head_noun")
        >>> [birds.verdict("Black footed albatross", answer) for answer in ("albatross", "bird", "none", "gull")]
        ['less specific', 'generic', 'abstain', 'wrong']
        """
        name, said = normalize(label), normalize(answer)
        if said == ABSTAINS:
            return "abstain"
        labels, answers = self._things(name), self._things(said)
        same = {name, *map(normalize, aliases)} | ({other_order(name)} if self.rule == "car" else set())
        if said in same or labels & answers:
            return "specific"
        if any(labels & self.above(thing).keys() for thing in answers):
            return "more specific"
        if said in self.generic:
            return "generic"
        steps = self._steps(name, labels)
        if not (reached := answers & steps.keys()):
            return "wrong"
        nearest = min(reached, key=steps.__getitem__)
        root = nearest not in self.parents and any(nearest in ups for ups in self.parents.values())
        return "generic" if root or steps[nearest] > NEAR else "less specific"

    def _things(self, name: str) -> frozenset[str]:
        return self.things.get(name, frozenset({name}))

    def _steps(self, name: str, things: frozenset[str]) -> dict[str, int]:
        """Return what is above a label by the smallest number of steps, by `rule` if the taxonomy lacks the label."""
        begun = {thing: 0 for thing in things}
        if not things & self.parents.keys():
            by_name = of_a_car(name) if self.rule == "car" else dict.fromkeys(_endings(name), 1)
            by_name = by_name if self.rule != "none" else {}
            begun |= {thing: step for each, step in by_name.items() for thing in self._things(each)}
        found: dict[str, int] = {thing: step for thing, step in begun.items() if step}
        for thing, step in begun.items():
            for up, more in self.above(thing).items():
                found[up] = min(step + more, found.get(up, step + more))
        return found


def _endings(name: str) -> list[str]:
    words = name.split()
    return [" ".join(words[start:]) for start in range(1, len(words))]


def of_a_car(name: str) -> dict[str, int]:
    """Return what stands above a car of Stanford Cars, by steps; the body alone is generic.

    >>> of_a_car("2012 audi tts coupe")
    {'audi tts coupe': 1, 'audi tts': 2, 'audi': 2, 'coupe': 3}
    """
    model = re.sub(r"^\d{4} | \d{4}$", "", name)
    body = BODIES.search(model)
    make = next((make for make in MAKES if model.startswith(f"{make} ")), model.split()[0])
    found = {} if model == name else {model: 1}
    found |= {} if body is None else {model[: body.start()]: 2}
    return found | ({} if make in found else {make: 2}) | ({} if body is None else {body[1]: 3})


def other_order(name: str) -> str:
    """Return a car's name with the year at its end, as the dataset's own files have it.

    >>> other_order("2012 audi tts coupe")
    'audi tts coupe 2012'
    """
    return re.sub(r"^(\d{4}) (.+)$", r"\2 \1", name)


# 2. Where taxonomies come from. Shipped ones are in taxonomies.yaml, by the name of their dataset.

SHIPPED = Path(__file__).with_name("taxonomies.yaml")
NAMES = "names"  # the head nouns of the class names, for any dataset
AIRCRAFT = ("images_variant_train.txt", "images_family_train.txt", "images_manufacturer_train.txt")
WORDNET = "data.noun"


def files_of(taxonomy: str) -> list[Path]:
    """Return the files that a value of `method.taxonomy` stands for.

    Raises:
        UserError: There are none.
    """
    if taxonomy in (NAMES, *_shipped()):
        return [SHIPPED]
    path = Path(taxonomy).expanduser()
    for names in (AIRCRAFT, (WORDNET,)):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    if path.is_file() and path.suffix in (".csv", ".yaml", ".yml"):
        return [path]
    raise UserError(
        f"taxonomy={taxonomy}: give method.taxonomy={NAMES} (the last words of a class name stand above it), a shipped"
        f" one ({', '.join(_shipped())}), a file (.csv: rows child,parent; .yaml), or a folder of WordNet ({WORDNET})"
        f" or FGVC-Aircraft ({AIRCRAFT[1]})"
    )


def identity(taxonomy: str) -> str:
    """Return the SHA-256 of the files of a taxonomy. Raises UserError like `files_of`."""
    return sha256(b"".join(path.read_bytes() for path in files_of(taxonomy))).hexdigest()


@cache
def load(taxonomy: str) -> Taxonomy:
    """Read the taxonomy that a value of `method.taxonomy` stands for.

    Raises:
        UserError: There is none, or a file is not of the right form.
    """
    files = files_of(taxonomy)
    if files == [SHIPPED]:
        return Taxonomy(rule="head_noun") if taxonomy == NAMES else of_entry(_shipped()[taxonomy], SHIPPED)
    if files[0].name == WORDNET:
        return of_wordnet(files[0])
    if files[0].name == AIRCRAFT[0]:
        return of_aircraft(files)
    if files[0].suffix == ".csv":
        with files[0].open(encoding="utf-8-sig", newline="") as lines:
            rows = [row for row in csv.reader(lines) if row]
        if bad := next((row for row in rows if len(row) != 2), None):
            raise UserError(f"taxonomy={taxonomy}: the row {','.join(bad)} is not child,parent")
        return _built([(child, parent) for child, parent in rows if (child, parent) != ("child", "parent")], files[0])
    try:
        entry = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"taxonomy={taxonomy} is no YAML ({' '.join(str(error).split())})") from error
    return of_entry(entry, files[0])


@cache
def _shipped() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return found


def of_entry(entry: Any, path: Path) -> Taxonomy:
    """Build a taxonomy from YAML.

    Args:
        entry: `parents` (child: parent, or a list of them), `synonyms` (rows of names of one thing, whose first one
            `parents` has), `generic` and `rule` (see `Taxonomy`); all may be missing.
        path: Its file, for messages.

    Raises:
        UserError: It has another form, or something stands above itself.
    """
    kinds = {"parents": dict, "synonyms": list, "generic": list, "rule": str}
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key, kind()), kind) for key, kind in kinds.items()):
        raise UserError(f"taxonomy: {path} must hold parents (child: parent), synonyms, generic (lists) and rule")
    if unknown := [key for key in entry if key not in kinds]:
        raise UserError(f"taxonomy: {path} has {unknown[0]}; known are {', '.join(kinds)}")
    one_of(f"taxonomy: {path}: rule", entry.get("rule", "none"), RULES)
    parents = entry.get("parents", {}).items()
    rows = [(child, up) for child, ups in parents for up in (ups if isinstance(ups, list) else [ups])]
    return _built(rows, path, entry.get("synonyms", []), entry.get("generic", []), entry.get("rule", "none"))


def _built(
    rows: Iterable[tuple[Any, Any]],
    path: Path,
    synonyms: Iterable[Any] = (),
    generic: Iterable[Any] = (),
    rule: str = "none",
) -> Taxonomy:
    parents: dict[str, set[str]] = {}
    for child, parent in rows:
        parents.setdefault(normalize(str(child)), set()).add(normalize(str(parent)))
    things = {normalize(str(name)): frozenset({normalize(str(row[0]))}) for row in synonyms for name in row}
    made = Taxonomy(
        {child: frozenset(ups) for child, ups in parents.items()},
        things,
        frozenset(normalize(str(name)) for name in generic),
        rule,
    )
    if circle := next((child for child, ups in parents.items() if child in {*ups, *_above_all(made, ups)}), None):
        raise UserError(f"taxonomy: {path}: '{circle}' stands above itself; correct its rows")
    return made


def _above_all(taxonomy: Taxonomy, things: Iterable[str]) -> set[str]:
    return {up for thing in things for up in taxonomy.above(thing)}


def of_aircraft(files: Sequence[Path]) -> Taxonomy:
    """Join FGVC-Aircraft's lists of variants, families and makers: lines `0034309 Boeing 737`, an image and a name."""
    lists = []
    for path in files:
        lines = [line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        lists.append({image: normalize(name) for image, _, name in lines})
    variants, families, makers = lists
    if missing := [image for image in variants if image not in families or image not in makers]:
        raise UserError(f"taxonomy: no family or no maker of image {missing[0]} is in {files[1].parent}")
    # where a variant has the name of its family, other variants are no kinds of it
    named = {image: f"{family} family" if family in variants.values() else family for image, family in families.items()}
    rows = [(variants[image], named[image]) for image in variants] + [
        (named[image], makers[image]) for image in variants
    ]
    rows += [(maker, "aircraft") for maker in makers.values()]
    return _built(rows, files[0], generic=("aircraft", "airplane", "plane"))


def of_wordnet(path: Path) -> Taxonomy:
    """Read WordNet's nouns (wndb(5WN)): every meaning of a word counts, and last words of names that it lacks."""
    parents: dict[str, frozenset[str]] = {}
    things: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields = line.partition(" | ")[0].split(" ")
        # offset, file, kind, number of words in hexadecimal digits, words with their numbers, pointers of four fields
        end = 4 + 2 * int(fields[3], 16)
        for word in fields[4:end:2]:
            things.setdefault(normalize(word), set()).add(fields[0])
        pointers = fields[end + 1 :]
        above = zip(pointers[0::4], pointers[1::4], pointers[2::4], strict=False)
        parents[fields[0]] = frozenset(target for kind, target, of in above if kind in ("@", "@i") and of == "n")
    known = {name: frozenset(meanings) for name, meanings in things.items()}
    return Taxonomy({offset: ups for offset, ups in parents.items() if ups}, known, rule="head_noun")
