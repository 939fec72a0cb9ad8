"""SpeciaRL (arXiv 2603.03197): an open question, and a reward for being as specific as the group's best reply.

The model answers with any name, or abstains with the word None. A verifier says how specific an answer is; a completion
earns 1 if none of its group is more specific, so a name above the true one is paid where the model knows no better, and
abstaining where all others are wrong. The paper's verifier is a language model; here it is a taxonomy, or a language
model (clsrl/related/speciarl_judge.py). What earns nothing beside a right answer, such as a generic word, earns as much
as it in a group that has no right one.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import yaml

from clsrl.prompting import ClassListPrompt
from common.config.schema import one_of
from common.parsing import is_strict_format, normalize, strict_answer
from common.runtime.distributed import gather, interleave, share_of
from common.types import Answers, Prediction, Prompt, Sample, Split, Task, UserError

log = logging.getLogger(__name__)

# 1. The verifier: from a label and an answer to a verdict. Names are compared as `normalize` writes them.

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


# 3. The reward. The paper's main one is `best`; the others are its ablations.

Kind = Literal["best", "first_best", "specific", "scale_1", "scale_2", "scale_3"]
STATIC = {  # by rank, from 1 to 5
    "specific": (1.0, 0.0, 0.0, 0.0, 0.0),
    "scale_1": (1.0, 0.75, 0.5, 0.25, 0.0),
    "scale_2": (1.0, 0.75, 0.5, 0.0, 0.0),
    "scale_3": (1.0, 0.75, 0.0, 0.0, 0.0),
}
WORST = max(RANKS.values())
UNPARSABLE = "unparsable"  # in place of a verdict: no answer in its tags
UNJUDGED = "unjudged"  # in place of a verdict: what the judge said of the answer cannot be read


class Specificity:
    """Reward of -1, 0 or 1 (static scales: also between) for how specific every sample's answer is."""

    def __init__(self, *, taxonomy: str, group_size: int, kind: Kind = "best") -> None:
        """
        Args:
            taxonomy: The verifier's, see `files_of`.
            group_size: Completions of one prompt, which follow each other.
            kind: `best`: 1 for the best rank of the group, unless that is wrong, else 0. `first_best`: only for the
                first of them. `specific`, `scale_1` to `scale_3`: by the own rank alone, see STATIC. A reply without
                one answer in its tags has -1 in all of them.

        Raises:
            UserError: Begins with the argument at fault.
        """
        check_kind(kind, group_size)
        files_of(taxonomy)
        self.taxonomy, self.group_size, self.kind = taxonomy, group_size, kind

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        verdicts = by_taxonomy(self.taxonomy, [Stated.of(sample) for sample in samples])
        return earned(samples, verdicts, self.group_size, self.kind)


def check_kind(kind: Kind, group_size: int) -> None:
    """Check the arguments of the reward. Raises UserError, which begins with the argument at fault."""
    one_of("kind", kind, get_args(Kind))
    if group_size < 1:
        raise UserError(f"group_size={group_size} must be 1 or more")


@dataclass(frozen=True)
class Stated:
    """What is verified: label, answer (see `stated`) and other words for the label."""

    label: str
    answer: str | None
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, sample: Sample) -> Stated:
        """Return that of a sample."""
        return cls(sample.label, stated(sample.completion), tuple(sample.prompt.aliases))


def by_taxonomy(taxonomy: str, given: Sequence[Stated]) -> list[str | None]:
    """Return the verdict on every answer, UNPARSABLE where there is none."""
    known = load(taxonomy)
    return [
        UNPARSABLE if each.answer is None else known.verdict(each.label, each.answer, each.aliases) for each in given
    ]


def earned(
    samples: Sequence[Sample], verdicts: Sequence[str | None], group_size: int, kind: Kind, unjudged: float = 0.0
) -> list[float]:
    """Return the reward of every sample by its verdict.

    Args:
        samples: Completions, group after group. Length: N.
        verdicts: A verdict, UNPARSABLE (-1), UNJUDGED, or None: the judge did not reply (NaN). Length: N.
        group_size: See `Specificity`.
        kind: See `Specificity`.
        unjudged: Value of UNJUDGED, which has no rank in its group.
    """
    special = {UNPARSABLE: -1.0, UNJUDGED: unjudged, None: math.nan}
    ranks = {place: RANKS[verdict] for place, verdict in enumerate(verdicts) if verdict in RANKS}
    values = [special.get(verdict, 0.0) for verdict in verdicts]
    if kind in STATIC:
        return [STATIC[kind][ranks[n] - 1] if n in ranks else value for n, value in enumerate(values)]
    for group in groups(samples, group_size):
        best = min((ranks[place] for place in group if place in ranks), default=WORST)
        winners = [place for place in group if ranks.get(place) == best != WORST]
        for place in winners if kind == "best" else winners[:1]:
            values[place] = 1.0
    return values


def groups(samples: Sequence[Sample], size: int) -> list[range]:
    """Return the places of each group: neighbours with the same image, at most `size` of them.

    An image may be asked about twice in a batch, and other ranks have other parts of it, so the image does not suffice.
    """
    starts: list[int] = []
    for place, sample in enumerate(samples):
        if not starts or place - starts[-1] == size or sample.prompt.image != samples[place - 1].prompt.image:
            starts.append(place)
    return [range(start, end) for start, end in pairwise([*starts, len(samples)])]


def stated(completion: str) -> str | None:
    """Return the one answer in the asked form, normalised; None if there is none.

    >>> stated("<think>a loop</think><answer>Six</answer>"), stated("six"), stated("<think></think><answer> </answer>")
    ('six', None, None)
    """
    return (strict_answer(completion) or None) if is_strict_format(completion) else None


# 4. The method. Wording: ours, after the paper's description (thoughts and answer in tags, one label or the word None).

QUESTION = "Classify the photo: what does it show?"
ENDING = (
    "\n Please output the thinking process in <think> </think> and final answer in <answer> </answer> tags. The answer"
    " is one name, as specific as you are sure of, or None."
)
KINDS = (*RANKS, UNPARSABLE)
REWARD = "specificity"  # name of the reward whose judge the evaluation asks, too


class Verifier(Protocol):
    """Judge that gives verdicts (clsrl/related/speciarl_judge.py)."""

    def verdicts(self, given: Sequence[Stated]) -> list[str | None]:
        """Return the verdict on every answer; UNPARSABLE, UNJUDGED or None where there is none."""

    def fingerprint(self) -> str:
        """Return a hash of all that a verdict depends on."""

    def metrics(self) -> dict[str, float]:
        """Return counts since the last call."""


class SpeciaRLPrompt(ClassListPrompt):
    """Prompting without a list of names, whose answer may be less specific than the label, or None."""

    def __init__(
        self,
        *,
        seed: int,
        taxonomy: str,
        question: str = "general",
        list_share: float = 0.0,
        judge: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            seed: Unused: nothing is drawn.
            taxonomy: Taxonomy by which the evaluation measures how specific an answer is, see `files_of`.
            question: `general` (as the paper's: nothing about the kind of thing) or `data` (`data.open_question`).
            list_share: 0, an open question.
            judge: That of the reward `specificity`, which then measures in place of the taxonomy; None: the taxonomy.

        Raises:
            UserError: An argument has an unknown value.
        """
        super().__init__(instruction="think", seed=seed, list_share=0.0)
        one_of("method.question", question, ("general", "data"))
        if list_share != 0:
            raise UserError(f"method.list_share={list_share}: SpeciaRL lists no names, set it to 0")
        self.taxonomy, self.question, self.judge = taxonomy, question, judge
        self.verifier: Verifier | None = None  # the judge, as soon as it is there

    def sources(self, task: Task) -> dict[str, str]:
        if not task.train.items:  # new pictures have no labels to compare with
            return {}
        taken = [name for split in (task.train, *task.evaluation.values()) for name in split.names]
        if any(normalize(name) == ABSTAINS for name in taken):
            raise UserError("a class is named 'none', the answer of a model that abstains; rename it")
        if self.judge is not None:
            return {} if self.verifier is None else {f"rewards.{REWARD}.judge": self.verifier.fingerprint()}
        try:
            load(self.taxonomy)  # what is wrong in it is reported before anything is computed
            return {"method.taxonomy": identity(self.taxonomy)}
        except UserError as error:
            raise UserError(f"method.{error}") from error

    def evaluates_by(self, task: Task, rewards: Mapping[str, Mapping[str, Any]]) -> str | None:
        if self.judge is None or not task.train.items:
            return None
        if rewards.get(REWARD, {}).get("judge") != self.judge:
            raise UserError(
                f"method.judge is not the judge of rewards.{REWARD}, which the evaluation asks, too; add"
                " rewards=speciarl_judge and choose the judge there, or measure by the taxonomy with method.judge=null"
            )
        return REWARD

    def take(self, reward: Any) -> None:
        if not hasattr(reward, "verdicts"):
            raise UserError(f"rewards.{REWARD}.fn gives no verdicts; take rewards=speciarl_judge")
        self.verifier = reward

    def answer(self, completion: str) -> str | None:
        found = super().answer(completion)
        return None if found == ABSTAINS else found

    def _prompts(self, split: Split, instruction: str) -> list[Prompt]:
        text = f"{QUESTION if self.question == 'general' else split.open_question}{ENDING}"
        return [Prompt(item.image, text, item.name, aliases=split.aliases.get(item.name, ())) for item in split.items]

    def extra_columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """Return the verdict on every answer; None for images without a label."""
        aliases = task.evaluation[split].aliases
        said = [stated(each.reply.text) if each.reply is not None else None for each in predictions]
        given = [
            Stated(each.label, answer, tuple(aliases.get(each.label, ())))
            for each, answer in zip(predictions, said, strict=True)
        ]
        found = self._verified([each for each in given if each.label])
        columns = super().extra_columns(task, split, predictions)
        return {**columns, "verdict": [found[each] if each.label else None for each in given]}

    def _verified(self, given: Sequence[Stated]) -> dict[Stated, str | None]:
        """Return the verdict on each answer. All ranks call it together, with the answers of all."""
        different = list(dict.fromkeys(given))
        if self.judge is None:
            return dict(zip(different, by_taxonomy(self.taxonomy, different), strict=True)) if different else {}
        if not different:
            return {}
        assert self.verifier is not None, "take() has not been called"
        mine = [verdict or UNJUDGED for verdict in self.verifier.verdicts(share_of(different))]
        self.verifier.metrics()  # reset: the counts of an update are not those of an evaluation
        found = dict(zip(different, interleave(gather(mine)), strict=True))
        if open_ones := sum(found[each] == UNJUDGED for each in given):
            log.warning("the judge gave no readable verdict on %d of %d answers", open_ones, len(given))
        return dict(found)

    def diagnostics(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        return {**super().diagnostics(task, split, answers), "specificity": measures(answers.columns["verdict"])}


def measures(verdicts: Sequence[str | None]) -> dict[str, Any]:
    """Return the paper's measures, as shares of the images with a label.

    correctness: neither wrong, unparsable nor abstained. specificity: as specific as the label or more, among the
    correct (our reading). harmonic_mean: of the two. verdicts: share of each; `unjudged`, on which the judge said
    nothing readable, counts as not correct.

    >>> measures(["specific", "specific", "generic", "wrong"])["harmonic_mean"]
    0.7058823529411765
    """
    counts = Counter(verdict for verdict in verdicts if verdict is not None)
    total = counts.total()
    if not total:
        return {}
    kinds = (*KINDS, UNJUDGED) if counts[UNJUDGED] else KINDS
    right, specific = (
        sum(counts[kind] for kind, rank in RANKS.items() if rank <= worst) for worst in (RANKS["generic"], 1)
    )
    correctness, specificity = right / total, specific / right if right else 0.0
    both = correctness + specificity
    return {
        "correctness": correctness,
        "specificity": specificity,
        "harmonic_mean": 2 * correctness * specificity / both if both else 0.0,
        "verdicts": {kind: counts[kind] / total for kind in kinds},
    }
