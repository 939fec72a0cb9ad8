"""ALERT (section 3): the meta-task prompt over category embeddings, with references while training and a draft's
candidates when testing.

`method=alert` and `method=gemma_1shot` are this one class with other arguments.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alert.bank import file as bank_file
from alert.draft import accounting, candidate_file, candidates, categories, class_means, published, settled
from alert.draft import references as reference
from alert.draft.class_means import ClassMeans
from alert.prompt import INSTRUCTIONS, meta_task
from alert.rewards import tagged_answer
from common import parsing
from common.config.checks import one_of
from common.method import Embeddings, Words
from common.runtime.distributed import gather, rank
from common.types import Answers, Item, Prediction, Prompt, Split, Task, UserError

if TYPE_CHECKING:
    import torch

    from common.config.schema import Config
    from common.data.task import Questions
    from common.method import Vision

log = logging.getLogger(__name__)
DRAFTS = ("class_means", "oracle_recall", "file")
INITIALISATIONS = ("proposed", "averaging", "random", "one_shot")


class Alert:
    """Asks which of some reference categories an image shows, each given by its name and its embedding."""

    kept = (bank_file.FACTS, bank_file.ENTRIES, class_means.FILE)

    def __init__(
        self,
        *,
        seed: int,
        instruction: str = "paper",
        initialisation: str = "proposed",
        trainable: bool = True,
        bank: str | None = None,
        tau: float = 0.1,
        smallest: int = 2,
        largest: int = 8,
        features: str = "mean",
        draft: str = "class_means",
        draft_file: str | None = None,
        k: int = 2,
        order: str = "rank",
    ) -> None:
        """
        Args:
            seed: Of references and initialisation; the order of candidates depends on the image alone.
            instruction: `paper` (appendix A) or `short` (for tiny models).
            initialisation: Of the embeddings, see `alert.bank.embeddings.see`.
            trainable: False: the bank stays as it begins (Table 3).
            bank: Folder of an exported bank to begin from, instead of an initialisation.
            tau: Temperature of the reference weights (section 4.1.2).
            smallest: Fewest references in a training prompt.
            largest: Most.
            features: What stands for an image in class means, of references and draft: `mean` of the patches, or
                all `patches` in a row (our choice: the paper does not say; patches know places, and take P times the
                memory).
            draft: Who chooses the candidates of a test image: `class_means`, `oracle_recall` (an upper bound: it knows
                the truth), `file`, or an entry of `few_shot`, which is fitted on the same shots first.
            draft_file: For `file`: the folder of a few-shot learner's run, or what `alert.draft.candidate_file.write`
                wrote; `SPLIT` stands for the split.
            k: Candidates of a test image.
            order: Of the candidates in the prompt, `rank` or `shuffle` (our choice: the paper does not say).

        Raises:
            UserError: An argument has an unknown value.
        """
        for key, value, allowed in (
            ("instruction", instruction, tuple(INSTRUCTIONS)),
            ("initialisation", initialisation, INITIALISATIONS),
            ("features", features, ("mean", "patches")),
            ("order", order, candidates.ORDERS),
        ):
            one_of(f"method.{key}", value, allowed)
        if draft == "file" and draft_file is None:
            raise UserError("method.draft=file needs method.draft_file, the candidates that a learner wrote")
        if not (2 <= smallest <= largest and k >= 1 and tau > 0):
            raise UserError(
                f"method.smallest={smallest}, largest={largest}, k={k}, tau={tau}: 2 <= smallest <= largest, k >= 1"
                " and tau > 0 are needed"
            )
        if k > candidates.DEPTH:
            raise UserError(f"method.k={k}: at most {candidates.DEPTH} candidates are kept of a draft")
        self.seed, self.instruction = seed, instruction
        self.initialisation, self.trainable = initialisation, trainable
        self.bank = None if bank is None else Path(bank).expanduser()
        self.tau, self.smallest, self.largest = tau, smallest, largest
        self.draft, self.draft_file, self.k, self.order = draft, draft_file, k, order
        self.patches = features == "patches"
        self.means: ClassMeans | None = None  # known once pictures were seen
        self.similarities: Any = None  # [C, C]
        self.drafted: dict[str, candidates.Candidates] = {}
        self.ranks: Callable[[Task, str], candidates.Candidates] | None = None  # pictures that come later
        self.architecture = ""

    def sources(self, task: Task) -> dict[str, str]:
        sources = {}
        if self.bank is not None:
            with bank_file.asked_by("method.bank"):
                sources["method.bank"] = bank_file.facts(self.bank, task.train.names)["sha256"]
        if self.draft == "file":
            for split in task.evaluation:
                sources[f"method.draft_file of '{split}'"] = candidate_file.identity(self._draft_path(split))
        return sources

    def check(self, config: Config, task: Task) -> None:
        if self.draft in DRAFTS:
            return
        one_of("method.draft", self.draft, (*DRAFTS, *config.few_shot))
        settled.check(config, self.draft, task)

    def prepare(self, config: Config, questions: Questions, device: torch.device, folder: Path) -> None:
        """Fit the few-shot learner that names the candidates, if the draft is one."""
        if self.draft not in DRAFTS:
            from alert.draft.fit.drafted import Drafted

            learner = Drafted(config, questions, self.draft, device, folder / "draft")
            self.drafted, self.ranks = learner.candidates(), learner.of

    def look(self, vision: Vision, task: Task, folder: Path | None = None) -> Embeddings:
        """Similarities of the categories, candidates of the test images, and the bank that training starts from.

        That bank lies in the folder afterwards; a continued run takes it from there.
        """
        from alert.bank import embeddings as bank

        train, count = task.train, len(task.train.names)
        known = folder if folder is not None and all(gather((folder / bank_file.BEGUN).is_file())) else None
        image = next(item.image for split in (train, *task.evaluation.values()) for item in split.items)
        self.architecture, shape = vision.architecture, (count, *bank.shape_of(vision, image))
        entries = bank_file.known_entries(known, self.bank, train.names, shape, self.architecture)
        if (means := self.means) is None or entries is None:
            how = self.initialisation if entries is None else None
            seen, fresh = bank.see(vision, train.items, count, how, self.seed, self.patches)
            entries = fresh if entries is None else entries
            means = ClassMeans(reference.class_means(seen.numpy(), range(count), count), self.patches)
            self.means = None if self.patches else means  # ImageNet's patches are 38 GB
        assert entries is not None
        if folder is not None and known is None and rank() == 0:
            bank_file.export_begun(folder, entries)
        self.similarities = reference.similarities(means.means)
        ranks = partial(means.candidates, vision, self.seed, self.k if self.draft == "oracle_recall" else None)
        self.drafted |= {split: ranks(task, split) for split in task.evaluation if split not in self.drafted}
        if folder is None and self.ranks is None and self.draft in ("class_means", "oracle_recall"):
            self.ranks = ranks  # other pictures may follow: keep what sees them
        return Embeddings(entries, self.trainable)

    def look_again(self, task: Task, split: str) -> None:
        self.drafted.pop(split, None)
        if self.ranks is not None:
            self.drafted[split] = self.ranks(task, split)

    def recall(self, folder: Path) -> bool:
        self.means = ClassMeans.load(folder) if self.draft == "class_means" else None
        return self.means is not None

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """With other references in every epoch. Before `look`, the longest prompts that there could be."""
        split = task.train
        self._check_images(task)
        longest = categories.longest(split, self.largest)
        return [self._prompt(item, split, self._references(item, split, longest, epoch)) for item in split.items]

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        asked = task.evaluation[split]
        self._check_images(task)
        labels = categories.train_labels(task, split)
        if self.k > len(asked.choices):
            raise UserError(
                f"method.k={self.k}, but '{split}' has only {len(asked.choices)} to choose among; use fewer candidates"
            )
        if self.draft == "file" and split not in self.drafted:
            # before the model is loaded: a file that does not fit costs a second then
            images = [item.image for item in asked.items]
            path = self._draft_path(split)
            self.drafted[split] = candidate_file.read(path, images, asked.names, settled.dataset_of(task, split), split)
        if split not in self.drafted:
            shown = [categories.longest(asked, self.k)] * len(asked.items)
        else:
            shown = [self.drafted[split].shown(item.image, self.k, self.order) for item in asked.items]
        return [self._prompt(item, asked, chosen, labels) for item, chosen in zip(asked.items, shown, strict=True)]

    def well_formed(self, completion: str) -> bool:
        return parsing.is_strict_format(completion)

    def answer(self, completion: str) -> str | None:
        return tagged_answer(completion)

    def label_response(self, name: str) -> str:
        """The name in its tags."""
        return f"<answer>{name}</answer>"

    def facts(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """The accounts of the two stages, and whether reasoning and answer agree (alert/draft/accounting.py).

        What an image was asked with stands in its columns: the answers may be those of an earlier attempt of the run,
        whose draft may have differed by a rounding. What follows in the ranking is this attempt's.
        """
        drafted, names, predictions = self.drafted[split], task.evaluation[split].names, answers.predictions
        asked = [tuple(shown) for shown in answers.columns["candidates"]]
        differing = sum(a != b for a, b in zip(asked, self._shown(task, split, predictions), strict=True))
        if differing and rank() == 0:
            log.warning(
                "%d of the %d images of '%s' were asked with other candidates than the draft gives now; they are"
                " accounted for with those that they were asked with",
                differing,
                len(asked),
                split,
            )
        cases = []
        for p, shown in zip(predictions, asked, strict=True):
            ranking = candidates.led_by(shown, [names[label] for label in drafted.ranking(p.image)], self.order)
            cases.append(accounting.Case(p.label, shown, ranking, p.answer))
        said = zip(predictions, answers.columns["reasoning_agrees"], strict=True)
        verdicts = [verdict for p, verdict in said if parsing.FORMAT.search(_text(p))]
        accounts = accounting.account(cases)
        origin = drafted.origin
        draft = {**vars(origin), "k": self.k, **accounts, **published.above(origin.dataset, origin.shots, accounts)}
        return {"draft": draft, "reasoning": accounting.agreement(verdicts, len(predictions) - len(verdicts))}

    def columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """The candidates in the order of the prompt, and whether the reasoning concludes the answer (None: it names no
        candidate, or there is none).
        """
        shown = self._shown(task, split, predictions)
        asked = zip(predictions, shown, strict=True)
        agrees = [accounting.agrees(_text(p), p.answer, names) for p, names in asked]
        return {"candidates": [list(names) for names in shown], "reasoning_agrees": agrees}

    def export(self, folder: Path, embeddings: torch.Tensor, task: Task) -> None:
        bank_file.export(folder, embeddings, task.train.names, self.architecture)
        if self.means is not None:
            self.means.save(folder)

    def into_vocabulary(self, model: Any, processor: Any, silent: int, embeddings: Path) -> Words:
        from alert.export import into_vocabulary

        return into_vocabulary(model, processor, silent, embeddings, self.instruction)

    def _check_images(self, task: Task) -> None:
        if self.means is None:
            categories.check_images(task)

    def _draft_path(self, split: str) -> Path:
        assert self.draft_file is not None
        path = Path(self.draft_file.replace("SPLIT", split)).expanduser()
        return path / candidate_file.FOLDER / split if path.is_dir() else path

    def _shown(self, task: Task, split: str, predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
        """Names of the candidates of every image, in the order of the prompt."""
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
