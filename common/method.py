"""What a paper's method is: how it asks, what a reply looks like, and what it may do beside.

A method is a class with the members of `Method`; `method._target_` names it. One that looks at pictures before it asks
also has those of `Looks` (and of `LooksAgain`, to serve without beginning anew), one that reads more files or says more
about its predictions those of `Accounts`, and one whose authors match answers in a way of their own those of
`OfficialMatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from common.types import Answers, Prediction, Prompt, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Embeddings:
    """Embeddings to put behind the vocabulary. Shape of `entries`: [entries, tokens of one, width]."""

    entries: torch.Tensor
    trainable: bool


class Vision(Protocol):
    """What a loaded model sees, for methods that look at pictures before they ask about them.

    Shapes: n pictures, P patches, V width of the vision tower, m tokens of a picture, D width of the language model.
    """

    batch: int  # pictures per forward

    @property
    def architecture(self) -> str:
        """Of the model, as its config.json calls it."""

    def hidden(self, keys: Sequence[str]) -> torch.Tensor:
        """Outputs of the vision tower. Shape: [n, P, V]; all at once, so ask for a batch."""

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tower outputs as input embeddings of the language model. Shape: [n, P, V] -> [n, m, D]."""

    def vectors(self, keys: Sequence[str], patches: bool = False) -> torch.Tensor:
        """One vector per picture: the mean of its patches [n, V], or all of them in a row [n, P V]."""


class Method(Protocol):
    """What every method decides: how to ask, and what a reply looks like."""

    def train_prompts(self, task: Task, epoch: int = 0) -> list[Prompt]:
        """One prompt per training item, in the order of `task.train.items`."""

    def evaluation_prompts(self, task: Task, split: str) -> list[Prompt]:
        """One prompt per item of `task.evaluation[split]`, in its order."""

    def well_formed(self, completion: str) -> bool:
        """Whether the reply follows the requested format."""

    def answer(self, completion: str) -> str | None:
        """The one answer that a reply gives, normalised; None if it gives none or several."""

    def label_response(self, name: str) -> str:
        """The answer `name` without reasoning: a reply, or the end of one, whose probability is that of the name."""


@runtime_checkable
class Looks(Protocol):
    """A method that sees the pictures as the loaded model does, and may put embeddings behind the vocabulary."""

    def look(self, vision: Vision, task: Task, folder: Path | None = None) -> Embeddings | None:
        """See pictures before the model is asked or trained.

        The method may ask other questions afterwards (before, it asks the longest that it ever will), and it may return
        embeddings that its prompts refer to.

        Args:
            vision: The model's tower.
            task: With the pictures.
            folder: Where `export` writes at last, the same when an interrupted run continues; what is costly to compute
                again may be kept there. None: nothing is trained, so nothing will be continued.
        """

    def export(self, folder: Path, embeddings: torch.Tensor, task: Task) -> None:
        """Write the embeddings as they are now, in a form that a later run of the method can begin from."""


@runtime_checkable
class LooksAgain(Protocol):
    """A method that looks, and that can be asked about other pictures without seeing those of the training again."""

    def look_again(self, task: Task, split: str) -> None:
        """See the pictures of a split that has others now; the rest of the task is as it was in `look`."""


@runtime_checkable
class Recalls(Protocol):
    """A method that keeps beside its embeddings what it saw of the training images, and needs them no more.

    kept: the files of `export` that `recall` reads.
    """

    kept: tuple[str, ...]

    def recall(self, folder: Path) -> bool:
        """Take over what `export` wrote. False: something is missing, so the images have to be seen again."""


@dataclass(frozen=True)
class Words:
    """Embeddings that have become words: the ids of these, and of what fills the vocabulary up, none of which is ever
    said; the word that stands for each name; and a question that has some of them.
    """

    ids: range
    of_names: dict[str, str]
    example: Prompt


@runtime_checkable
class Exports(Protocol):
    """A method whose embeddings can become words of the vocabulary, for readers that know nothing of it."""

    def into_vocabulary(self, model: Any, processor: Any, silent: int, embeddings: Path) -> Words:
        """Add them to a trained model, without adapters, and to its processor.

        Args:
            model: Is changed.
            processor: Is changed.
            silent: Id of a token that is never said.
            embeddings: The folder that `export` of `Looks` wrote.
        """


@runtime_checkable
class Accounts(Protocol):
    """A method that reads files beside the data, and has more to say about predictions than their accuracy."""

    def sources(self, task: Task) -> dict[str, str]:
        """A hash of every file that the method reads beside the data, by its config key; a run freezes them."""

    def facts(self, task: Task, split: str, answers: Answers) -> dict[str, Any]:
        """What the method has to say about the predictions of a split, beside the accuracies; for metrics.json.

        They may be those of an earlier attempt of the run; their columns say what was true of each then.
        """

    def columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """What the method has to say about each prediction: one value per prediction, by column; for
        predictions.parquet. Values are texts, truth values, numbers, lists of them, or None.
        """


@runtime_checkable
class OfficialMatch(Protocol):
    """A method whose paper's authors match answers in a way of their own, which is reported beside the strict one."""

    def matches_officially(self, completion: str, label: str) -> bool:
        """Whether the authors' code counts the reply as the label."""
