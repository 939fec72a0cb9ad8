"""What travels between the stages of a run. Data only moves down this list; a later stage never reaches back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from common.models.vision import Vision


class UserError(Exception):
    """A mistake in the request, not in the program: shown as one line that names what is wrong and the fix."""


class Images(Protocol):
    """The pictures behind a dataset's keys."""

    def open(self, image: str) -> Image:
        """The picture, decoded: RGB, upright, its first frame if it is animated.

        Raises:
            BadImage: It cannot be decoded.
        """

    def stamp(self, image: str) -> str:
        """A text that changes when the picture's bytes may have changed. Decodes nothing.

        Raises:
            BadImage: There is no such picture, or it has no content.
        """


class BadImage(Exception):
    """A picture that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)  # a dataset has up to 1.3 million
class Item:
    """One labelled image. `image` is its key: `<dataset>/<path inside the dataset's folder>`, unique among datasets."""

    image: str
    label: int
    name: str


@dataclass(frozen=True)
class Source:
    """A whole dataset as its reader found it. One without a split of its own has all items in `train`.

    `names` are the classes by label. `fingerprint` is a hash of what defines the dataset, `origin` says whose split it
    is.
    """

    names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    images: Images
    fingerprint: str
    origin: str


@dataclass(frozen=True)
class Split:
    """Images that are asked about alike: among the same names, with the question of their dataset.

    `names` are the classes by label; two labels may share one. `aliases` are other words for a name.
    """

    items: tuple[Item, ...]
    names: tuple[str, ...]
    question: str
    open_question: str
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def choices(self) -> tuple[str, ...]:
        """The names, each once."""
        return tuple(dict.fromkeys(self.names))


@dataclass(frozen=True)
class Task:
    """A few-shot problem: what to train on, and what to test on, by the name of the split.

    `origins` says of every dataset whose split it is; the first is the one to train on.
    """

    train: Split
    evaluation: dict[str, Split]
    images: Images
    fingerprint: str
    origins: dict[str, str]


CATEGORY = "<category>"  # in the text of a prompt: here stands the embedding of a category


@dataclass(frozen=True)
class Prompt:
    """One question about one image. `choices` are the names it lists (empty: an open question), `aliases` other words
    for its label. `categories` are the labels whose embeddings take the places of the CATEGORY marks in the text, in
    order. The image comes before the text, or with `image_last` after it.
    """

    image: str
    text: str
    label: str
    choices: tuple[str, ...] = ()
    system: str | None = None
    aliases: tuple[str, ...] = ()
    categories: tuple[int, ...] = ()
    image_last: bool = False


@dataclass(frozen=True)
class Sample:
    """One completion, as the rewards see it."""

    prompt: Prompt
    completion: str

    @property
    def label(self) -> str:
        return self.prompt.label


@dataclass(frozen=True)
class Prediction:
    """One evaluated image. `answer` is empty when the completion gives none or several. `correct` is the strict match,
    `correct_official` the authors' substring match, `correct_alias` a strict match of the label or another word for it.
    `probabilities` (length-normalised) and `probabilities_raw` belong
    to the names in `choices`; all three are empty without label scoring.
    """

    image: str
    label: str
    answer: str
    completion: str
    correct: bool
    correct_official: bool
    correct_alias: bool
    formatted: bool
    tokens: int
    truncated: bool
    choices: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    probabilities_raw: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answers:
    """The predictions of one split, and the seconds that generating and scoring the class names took.

    columns: what the method says about each prediction, by name; see `Method.columns`.
    """

    predictions: list[Prediction]
    seconds: float
    scoring_seconds: float
    columns: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one update reports: metrics by name, seconds by phase, its completions as table rows, and counts that a
    resumed run would not repeat (names with a `/`).
    """

    metrics: dict[str, float]
    seconds: dict[str, float]
    rows: list[dict[str, Any]]
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings to put behind the vocabulary. Shape of `entries`: [entries, tokens of one, width]."""

    entries: torch.Tensor
    trainable: bool


class Trainer(Protocol):
    """GRPO and SFT look the same from the loop. All ranks call the methods together. tokens: seen so far."""

    tokens: float

    def step(self, update: int) -> Step:
        """Update number `update`, counted from 0."""

    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, every rank holds all weights of the model, to sample, evaluate or save."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into a folder that a trainer can resume from."""

    def close(self) -> None:
        """Release the engine."""


class Method(Protocol):
    """What a paper's method decides: how to ask, and what a reply looks like. Found by `method._target_`."""

    def sources(self, task: Task) -> dict[str, str]:
        """A hash of every file that the method reads beside the data, by its config key; a run freezes them."""

    def look(self, vision: Vision, task: Task, place: Path | None = None) -> Embeddings | None:
        """See pictures as the loaded model does, before it is asked or trained.

        The method may ask other questions afterwards (before, it asks the longest that it ever will), and it may return
        embeddings that its prompts refer to.

        Args:
            vision: The model's tower.
            task: With the pictures.
            place: Folder that `export` writes to at last, the same when an interrupted run continues; what is costly to
                compute again may be kept there. None: nothing is trained, so nothing will be continued.
        """

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

    def facts(self, task: Task, split: str, found: Answers) -> dict[str, Any]:
        """What the method has to say about the predictions of a split, beside the accuracies; for metrics.json.

        They may be those of an earlier attempt of the run; their columns say what was true of each then.
        """

    def columns(self, task: Task, split: str, predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
        """What the method has to say about each prediction: one value per prediction, by column; for
        predictions.parquet. Values are texts, truth values, numbers, lists of them, or None.
        """

    def export(self, folder: Path, embeddings: torch.Tensor, task: Task) -> None:
        """Write the embeddings as they are now, in a form that a later run of the method can begin from."""


@dataclass
class Result:
    """What a finished run reports; written as metrics.json (field names are its keys)."""

    method: str
    data: str
    setting: str
    protocol: str
    model: str
    shots: int | str
    seed: int
    sampler: str
    origins: dict[str, str]
    left_out: int
    short_classes: dict[str, int]
    signature: str
    git_commit: str | None
    versions: dict[str, str]
    checkpoint: dict[str, str]
    manifest: str
    decoding: str
    eval: dict[str, Any] = field(default_factory=dict)
    zero_shot: dict[str, Any] = field(default_factory=dict)
    overall: dict[str, dict[str, float]] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
