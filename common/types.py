"""Data that the stages of a run exchange. It only moves down this list, never back to an earlier stage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    from numpy.typing import NDArray
    from PIL.Image import Image


class UserError(Exception):
    """A mistake in the request, not in the program; shown as one line with what is wrong and the fix."""


class Images(Protocol):
    """Access to a dataset's images by their keys."""

    def open(self, image: str) -> Image:
        """Decode an image: RGB, upright, the first frame of an animation.

        Raises:
            BadImage: It cannot be decoded.
        """

    def stamp(self, image: str) -> str:
        """Return a text that changes whenever the image's content changes, but not with its place or times.

        It contains a hash of the bytes. Nothing is decoded.

        Raises:
            BadImage: There is no such image, or it is empty.
        """

    def size(self, image: str) -> int:
        """Return the number of stored bytes of an image without reading them. Raises BadImage like `stamp`."""

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        """Return the stored bytes, or `length` of them from `start` on. Raises BadImage like `stamp`."""


class BadImage(Exception):
    """An image that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)  # a dataset has up to 1.3 million
class Item:
    """One labelled image.

    `image` is its key: `<dataset>/<path inside the dataset's folder>`, unique over all datasets. Images of one `group`
    show the same moment or thing, and stay on one side of every split; "": it belongs to no other.
    """

    image: str
    label: int
    name: str
    group: str = ""


@dataclass(frozen=True)
class Source:
    """A whole dataset as its reader found it; one without a split of its own has all items in `train`.

    `names` are the classes by label. `added` are keys of images that are trained on and never tested: somebody, or a
    model, has labelled them later. `fingerprint` is a hash of what defines the dataset, `origin` names the author
    of its split. `passed_over` counts what the reader skipped, by reason; `notes` describe how it interpreted the
    files.
    """

    names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    images: Images
    fingerprint: str
    origin: str
    passed_over: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    added: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Split:
    """Images with the same choice of names and the same question of their dataset.

    `names` are the classes by label; two labels may share one. `aliases` are other words for a name.
    """

    items: tuple[Item, ...]
    names: tuple[str, ...]
    question: str
    open_question: str
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the names without duplicates."""
        return tuple(dict.fromkeys(self.names))


@dataclass(frozen=True)
class Task:
    """A few-shot problem: a training split, and evaluation splits by name.

    `origins` names the author of the split, per dataset; the first dataset is the one to train on.
    """

    train: Split
    evaluation: dict[str, Split]
    images: Images
    fingerprint: str
    origins: dict[str, str]


CATEGORY = "<category>"  # placeholder in a prompt's text for a category's embedding


@dataclass(frozen=True)
class Prompt:
    """One question about one image.

    `choices` are the names it lists (empty: an open question), `aliases` other words for its label. `categories`
    are the labels whose embeddings replace the CATEGORY placeholders in the text, in order. The image comes before
    the text, or with `image_last` after it. `begun` is the beginning of the reply, which the model only continues.

    `sampled_with` and `scored_with` are keys of other images, which only GRPO looks at: completions are sampled in
    equal parts about `image` and each of the first, and scored without gradient about each of the second, for the loss.
    All are trained about `image`. The prompts of a training have equally many.
    """

    image: str
    text: str
    label: str
    choices: tuple[str, ...] = ()
    system: str | None = None
    aliases: tuple[str, ...] = ()
    categories: tuple[int, ...] = ()
    image_last: bool = False
    begun: str = ""
    sampled_with: tuple[str, ...] = ()
    scored_with: tuple[str, ...] = ()

    def about(self, image: str) -> Prompt:
        """Return the same question about that image alone."""
        return replace(self, image=image, sampled_with=(), scored_with=())


@dataclass(frozen=True)
class Sample:
    """One completion, as the rewards see it. tokens: its length, the end of turn included. truncated: it was cut."""

    prompt: Prompt
    completion: str
    tokens: int = 0
    truncated: bool = False
    open_image: Callable[[str], Image] | None = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str:
        return self.prompt.label

    @property
    def picture(self) -> Image:
        """The image of the prompt, as its dataset has it.

        Raises:
            ValueError: The sample was made without access to pictures.
        """
        if self.open_image is None:
            raise ValueError(f"nothing opens the picture of '{self.prompt.image}' here")
        return self.open_image(self.prompt.image)


@dataclass(frozen=True)
class Reply:
    """A model's reply to one prompt. `correct_official`: correct by the authors' own matching, if they have one."""

    text: str
    tokens: int
    truncated: bool
    well_formed: bool
    correct_official: bool | None = None


@dataclass(frozen=True)
class Prediction:
    """One evaluated image of class `label`, which is number `label_index` of its split.

    `answer` is the answered name, empty if there was none or more than one. A reply is correct by the answer's name
    (`correct`: the label; `correct_alias`: the label or another word for it), a classifier by the class index.
    """

    image: str
    label: str
    label_index: int
    answer: str
    correct: bool
    correct_alias: bool
    reply: Reply | None = None


@dataclass(frozen=True)
class Probabilities:
    """Probability of each offered class, for every image of a split.

    names: Class names without duplicates. Length: C.
    classes: Classes offered for each image, in the order of its prompt: indices into `names`; -1 pads shorter
        lists. [N, K]
    values: Their probabilities; each row adds up to 1; 0 where `classes` is -1. fp32 [N, K]
    raw: The same without length normalisation, for replies of several tokens. fp32 [N, K]
    logs: Logarithms of `values`, where fp32 has some of these as 0: the logits of some few-shot learners are hundreds
        apart. Minus infinity where `classes` is -1. fp32 [N, K]
    """

    names: tuple[str, ...]
    classes: NDArray[numpy.int32]
    values: NDArray[numpy.float32]
    raw: NDArray[numpy.float32] | None = None
    logs: NDArray[numpy.float32] | None = None


OWN_RIGHT = "own_correct"  # column: whether the learner alone was right, where its answer was combined with another's


@dataclass(frozen=True)
class Answers:
    """Predictions of one split, with the seconds that they and the probabilities took.

    columns: further values of the method per prediction, by name; see `Prompting.extra_columns`.
    """

    predictions: list[Prediction]
    seconds: float
    probabilities: Probabilities | None = None
    scoring_seconds: float = 0.0
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def right_alone(self) -> list[bool]:
        """Whether the learner was right on each image, before its answer was combined with that of another."""
        own = self.columns.get(OWN_RIGHT)
        return [p.correct for p in self.predictions] if own is None else [bool(value) for value in own]
