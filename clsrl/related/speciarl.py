"""SpeciaRL (arXiv 2603.03197): an open question, and a reward for being as specific as the group's best reply.

The model answers with any name, or abstains with the word None. A verifier says how specific an answer is; a completion
earns 1 if none of its group is more specific, so a name above the true one is paid where the model knows no better, and
abstaining where all others are wrong. The paper's verifier is a language model; here it is a taxonomy, or a language
model (clsrl/related/speciarl_judge.py). What earns nothing beside a right answer, such as a generic word, earns as much
as it in a group that has no right one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

from clsrl.prompting import ClassListPrompt
from clsrl.related import taxonomy as taxonomies
from clsrl.related.taxonomy import ABSTAINS, RANKS
from common.config.schema import one_of
from common.parsing import is_strict_format, normalize, strict_answer
from common.runtime.distributed import gather, interleave, share_of
from common.types import Answers, Prediction, Prompt, Sample, Split, Task, UserError

log = logging.getLogger(__name__)

# 1. The reward. The paper's main one is `best`; the others are its ablations.

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
            taxonomy: The verifier's, see `taxonomy.files_of`.
            group_size: Completions of one prompt, which follow each other.
            kind: `best`: 1 for the best rank of the group, unless that is wrong, else 0. `first_best`: only for the
                first of them. `specific`, `scale_1` to `scale_3`: by the own rank alone, see STATIC. A reply without
                one answer in its tags has -1 in all of them.

        Raises:
            UserError: Begins with the argument at fault.
        """
        check_kind(kind, group_size)
        taxonomies.files_of(taxonomy)
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
    known = taxonomies.load(taxonomy)
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


# 2. The method. Wording: ours, after the paper's description (thoughts and answer in tags, one label or the word None).

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
            taxonomy: Taxonomy by which the evaluation measures how specific an answer is, see `taxonomy.files_of`.
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
            taxonomies.load(self.taxonomy)  # what is wrong in it is reported before anything is computed
            return {"method.taxonomy": taxonomies.identity(self.taxonomy)}
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

    def use_reward(self, reward: Any) -> None:
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
        assert self.verifier is not None, "use_reward() has not been called"
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
