"""Build ALERT's prompts (section 3): the meta-task over category embeddings, with references in training. No torch.

In training a prompt lists reference categories drawn by similarity; in testing it lists a draft's candidates.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alert import error_analysis
from alert import fusion as fusions
from alert import references as reference
from alert.bank import file as bank_file
from alert.rewards import tagged_answer
from common import parsing
from common.config.schema import Config, one_of
from common.config.suggest import options
from common.counted import agree
from common.data.task import TaskData, dataset_of
from common.evaluation import consistency
from common.few_shot import candidates
from common.few_shot.check import check_fit
from common.runtime.distributed import rank
from common.types import Answers, Item, Prediction, Prompt, Split, Task, UserError
from common.vlm.check import check_vlm
from common.vlm.prompting import Prompting, TaskPrompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
from alert.prompt import INSTRUCTIONS, meta_task

# Categories: only those with training images have an embedding.


def check_images(task: Task) -> None:
    """Check that every category has an image, from which its embedding and its similarities are computed.

    Raises:
        UserError: Names the first category without one.
    """
    present = {item.label for item in task.train.items}
    if missing := [name for label, name in enumerate(task.train.names) if label not in present]:
        raise UserError(
            f"ALERT begins every category from its training images, but {len(missing)}"
            f" {agree(len(missing), 'has', 'have')} none, first: '{missing[0]}'"
            "; use more shots, or put the dataset's training images into its folder"
        )


def train_labels(task: Task, split: str) -> list[int]:
    """Return the trained category of every class of a split, by name.

    Raises:
        UserError: A class was not trained, so it has no embedding.
    """
    trained = {name: label for label, name in reversed(list(enumerate(task.train.names)))}
    names = task.evaluation[split].names
    if missing := [name for name in names if name not in trained]:
        raise UserError(
            f"ALERT knows only categories with training images, but {len(missing)} of '{split}'"
            f" {agree(len(missing), 'has', 'have')} none, first:"
            f" '{missing[0]}'; use setting=few_shot or shift"
        )
    if names == task.train.names:
        return list(range(len(names)))  # of two classes of one name each keeps its own embedding
    return [trained[name] for name in names]


def longest(split: Split, count: int) -> tuple[int, ...]:
    """Return the classes with the longest names, no name twice: by bytes, as the number of tokens grows with them."""
    first = {name: label for label, name in reversed(list(enumerate(split.names)))}
    return tuple(first[name] for name in sorted(first, key=lambda name: len(name.encode()), reverse=True)[:count])


# Configuration checks, before a model is loaded and without torch.


def check(config: Config, data: TaskData) -> TaskPrompts:
    """Check an ALERT run; implements `Check` of common/learner.py.

    Raises:
        UserError: Names the key, the file, the class or the image at fault.
    """
    if config.method["draft"] == "few_shot" and config.few_shot is None:
        raise UserError("method.draft=few_shot: no few-shot learner is chosen; add one, such as few_shot=cafo")
    check_images(data.task)
    prompts = check_vlm(config, data)
    check_fusion(config, data.task)
    if config.method["draft"] == "few_shot":
        check_fit(config, data.task)
    return prompts


def check_fusion(config: Config, task: Task) -> None:
    """Check that there is what `method.fusion` is fitted on.

    Raises:
        UserError: No validation images, or no probabilities of names.
    """
    kind = config.method.get("fusion", "none")
    if kind == "none":
        return
    if "val" not in task.evaluation:
        raise UserError(
            f"method.fusion={kind} is fitted on validation images, and there are none: validation=few, or"
            " validation=held_out where the dataset has no validation split"
        )
    if config.label_scoring is False:
        raise UserError(f"method.fusion={kind} needs the model's probabilities of names: label_scoring=true")
    if config.method["draft"] == "file":
        log.warning(
            "method.fusion=%s: a finished learner that chose its settings by the validation images is right on more of"
            " them than on others, so the fusion trusts it too much; method.draft=few_shot fits the draft without them",
            kind,
        )


# The prompting. `method=alert` and `method=gemma_1shot` are this one class with other arguments. alert/learner.py sets
# what depends on the images: the similarities of categories and the candidates.

log = logging.getLogger(__name__)
DRAFTS = ("class_means", "oracle_recall", "file", "few_shot")
INITIALISATIONS = ("proposed", "averaging", "random", "one_shot")


class AlertPrompting(Prompting):
    """Prompting that asks which of some reference categories an image shows, each given by name and embedding."""

    def __init__(
        self,
        *,
        seed: int,
        instruction: str = "paper",
        initialisation: str = "proposed",
        trainable: bool = True,
        bank: str | None = None,
        tower: str | None = None,
        tau: float = 0.1,
        smallest: int = 2,
        largest: int = 8,
        features: str = "mean",
        draft: str = "class_means",
        draft_file: str | None = None,
        k: int = 2,
        order: str = "rank",
        fusion: str = "none",
    ) -> None:
        """
        Args:
            seed: Seed of references and initialisation; the order of candidates depends only on the image.
            instruction: Wording, `paper` (appendix A) or `short` (for tiny models).
            initialisation: Initialisation of the embeddings, see `alert.bank.embeddings.see`.
            trainable: Train the bank; False: it stays as initialised (Table 3).
            bank: Folder of an exported bank to start from, instead of an initialisation.
            tower: Folder of the weights whose vision tower chooses the candidates; None: the model's own.
            tau: Temperature of the reference weights (section 4.1.2).
            smallest: Smallest number of references in a training prompt.
            largest: Largest number of references in a training prompt.
            features: Feature of an image in class means, for references and draft: `mean` of the patches, or all
                `patches` concatenated (our choice: the paper does not say; patches keep positions, and take P times
                the memory).
            draft: Source of a test image's candidates: `class_means`, `oracle_recall` (an upper bound that uses the
                label), `file`, or `few_shot`, the chosen few-shot learner, fitted on the same shots first.
            draft_file: Candidates for `file`: folder of a few-shot learner's run, or a file by `write_candidates` of
                common/few_shot/candidates.py; `SPLIT` stands for the split.
            k: Number of candidates of a test image.
            order: Order of the candidates in the prompt, `rank` or `shuffle` (our choice: the paper does not say).
            fusion: How the answer comes from the model's and the draft's probabilities (alert/fusion.py, ours): `none`
                (the paper: the model's reply is the answer), `gate` or `product`.

        Raises:
            UserError: An argument has an unknown value.
        """
        for key, value, allowed in (
            ("instruction", instruction, tuple(INSTRUCTIONS)),
            ("initialisation", initialisation, INITIALISATIONS),
            ("features", features, ("mean", "patches")),
            ("order", order, candidates.ORDERS),
            ("fusion", fusion, fusions.KINDS),
        ):
            one_of(f"method.{key}", value, allowed)
        if draft in options("few_shot"):
            raise UserError(
                f"method.draft={draft}: a few-shot learner as the draft is few_shot={draft} method.draft=few_shot"
            )
        one_of("method.draft", draft, DRAFTS)
        if draft == "file" and draft_file is None:
            raise UserError("method.draft=file needs method.draft_file, the candidates that a learner wrote")
        if not (2 <= smallest <= largest and k >= 1 and tau > 0):
            raise UserError(
                f"method.smallest={smallest}, largest={largest}, k={k}, tau={tau}: 2 <= smallest <= largest, k >= 1"
                " and tau > 0 are needed"
            )
        if fusion != "none" and (k == 1 or draft == "oracle_recall"):
            raise UserError(
                f"method.fusion={fusion} weighs at least two candidates by a draft that knows no labels: method.k=2 or"
                " more, and another method.draft than oracle_recall; or method.fusion=none"
            )
        if k > candidates.DEPTH:
            raise UserError(f"method.k={k}: at most {candidates.DEPTH} candidates are kept of a draft")
        self.seed, self.instruction = seed, instruction
        self.initialisation, self.trainable = initialisation, trainable
        self.bank = None if bank is None else Path(bank).expanduser()
        self.tau, self.smallest, self.largest = tau, smallest, largest
        self.draft, self.draft_file, self.k, self.order = draft, draft_file, k, order
        self.fusion = fusion
        self.patches = features == "patches"
        self.tower = None if tower is None else Path(tower).expanduser()
        # set by the learner, once it has encoded the images
        self.similarities: NDArray[np.float64] | None = None  # [C, C]
        self.drafted: dict[str, candidates.Candidates] = {}

    def sources(self, task: Task) -> dict[str, str]:
        sources = {}
        if self.bank is not None:
            with bank_file.asked_by("method.bank"):
                sources["method.bank"] = bank_file.facts(self.bank, task.train.names)["sha256"]
        if self.draft == "file":
            for split in task.evaluation:
                sources[f"method.draft_file of '{split}'"] = candidates.identity(self._draft_path(split))
        return sources

    @property
    def final(self) -> bool:
        return self.similarities is not None

    def embeddings(self, task: Task) -> int:
        return len(task.train.names)

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """Return prompts with other references in every epoch; before similarities exist, the longest possible ones."""
        split = task.train
        names = longest(split, self.largest)
        return [self._prompt(item, split, self._references(item, split, names, epoch)) for item in split.items]

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        tested = task.evaluation[split]
        labels = train_labels(task, split)
        if self.k > len(tested.choices):
            raise UserError(
                f"method.k={self.k}, but '{split}' has only {len(tested.choices)} to choose among; use fewer candidates"
            )
        if self.draft == "file" and split not in self.drafted:
            # Read before the model is loaded, so that a wrong file is an error within a second.
            images = [item.image for item in tested.items]
            path = self._draft_path(split)
            self.drafted[split] = candidates.read_candidates(path, images, tested.names, dataset_of(task, split), split)
        # No candidates yet (checks before the model is loaded): the longest names give the longest possible prompt.
        if split not in self.drafted:
            shown = [longest(tested, self.k)] * len(tested.items)
        else:
            shown = [self.drafted[split].shown(item.image, self.k, self.order) for item in tested.items]
        return [self._prompt(item, tested, chosen, labels) for item, chosen in zip(tested.items, shown, strict=True)]

    def well_formed(self, completion: str) -> bool:
        return parsing.is_strict_format(completion)

    def answer(self, completion: str) -> str | None:
        return tagged_answer(completion)

    def label_response(self, name: str) -> str:
        """Return the name in its tags."""
        return f"<answer>{name}</answer>"

    def diagnostics(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """Return the errors of the two stages, and how often reasoning and answer agree (alert/error_analysis.py).

        The candidates in an image's prompt come from its columns: answers may be those of an earlier attempt of the
        run, whose draft may differ by rounding. The rest of the ranking is this attempt's.
        """
        drafted, names, predictions = self.drafted[split], task.evaluation[split].names, answers.predictions
        candidates_asked = [tuple(shown) for shown in answers.columns["candidates"]]
        differing = sum(a != b for a, b in zip(candidates_asked, self._shown(task, split, predictions), strict=True))
        if differing and rank() == 0:
            log.warning(
                "%d of the %d images of '%s' were asked with other candidates than the draft gives now; they are"
                " analysed with those that they were asked with",
                differing,
                len(candidates_asked),
                split,
            )
        # of a fusion, the model's own answers are analysed
        own = answers.columns.get(fusions.OWN) or [p.answer for p in predictions]
        cases = []
        for p, shown, answer in zip(predictions, candidates_asked, own, strict=True):
            drafts = [names[label] for label in drafted.ranking(p.image)]
            ranking = error_analysis.ranking_from(shown, drafts, self.order)
            cases.append(error_analysis.Case(p.label, shown, ranking, answer))
        said = zip(predictions, answers.columns["reasoning_agrees"], strict=True)
        verdicts = [verdict for p, verdict in said if parsing.FORMAT.search(_text(p))]
        analysis = error_analysis.analyse(cases)
        origin = drafted.origin
        draft = {
            **vars(origin),
            "k": self.k,
            **analysis,
            **error_analysis.published_above(origin.dataset, origin.shots, analysis),
        }
        reasoning = consistency.agreement(verdicts, len(predictions) - len(verdicts))
        return {"draft": draft, "reasoning": reasoning, **fusions.compared(answers)}

    def extra_columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """Return the candidates in the order of the prompt, and whether the reasoning concludes the answer.

        The latter is None if the reasoning names no candidate, or if there is no reasoning.
        """
        shown = self._shown(task, split, predictions)
        pairs = zip(predictions, shown, strict=True)
        agrees = [consistency.agrees(_text(p), p.answer, names) for p, names in pairs]
        return {"candidates": [list(names) for names in shown], "reasoning_agrees": agrees}

    def _draft_path(self, split: str) -> Path:
        assert self.draft_file is not None
        path = Path(self.draft_file.replace("SPLIT", split)).expanduser()
        return path / candidates.FOLDER / split if path.is_dir() else path

    def _shown(self, task: Task, split: str, predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
        """Return the names of the candidates of every image, in the order of the prompt."""
        drafted, names = self.drafted[split], task.evaluation[split].names
        return [tuple(names[label] for label in drafted.shown(p.image, self.k, self.order)) for p in predictions]

    def _references(self, item: Item, split: Split, longest: tuple[int, ...], epoch: int) -> tuple[int, ...]:
        if self.similarities is None:
            return (item.label, *[label for label in longest if label != item.label][: self.largest - 1])
        return reference.sample_references(
            item.label,
            self.similarities[item.label],
            split.names,
            random.Random(f"references-{self.seed}-{epoch}-{item.image}"),
            tau=self.tau,
            smallest=self.smallest,
            largest=self.largest,
        )

    def _prompt(self, item: Item, split: Split, shown: Sequence[int], labels: Sequence[int] | None = None) -> Prompt:
        names = tuple(split.names[label] for label in shown)
        entries = tuple(shown if labels is None else (labels[label] for label in shown))
        return Prompt(
            image=item.image,
            text=meta_task(names, self.instruction),
            label=item.name,
            choices=names,
            aliases=split.aliases.get(item.name, ()),
            categories=entries,
            image_last=True,
        )


def _text(prediction: Prediction) -> str:
    assert prediction.reply is not None, "a vision-language model replies"
    return prediction.reply.text
