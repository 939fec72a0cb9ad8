"""What travels between the stages of a run. Data only moves down this list; a later stage never reaches back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    from numpy.typing import NDArray
    from PIL.Image import Image


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
        """A text that is another one whenever the picture is another one, wherever and under whatever times it lies:
        in it is a hash of its bytes. Decodes nothing.

        Raises:
            BadImage: There is no such picture, or it has no content.
        """

    def size(self, image: str) -> int:
        """How many bytes the picture has as it is stored; reads none of them. Raises BadImage as `stamp` does."""

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        """These bytes, or `length` of them from `start` on. Raises BadImage as `stamp` does."""


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
    is. `passed_over` counts what its reader left aside, by reason; `notes` say how it took what it found.
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
    for its label. `categories` are the labels whose embeddings take the positions of the CATEGORY marks in the text, in
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
    """What a model said about one image. `correct_official`: right as the method's authors match, if they do."""

    text: str
    tokens: int
    truncated: bool
    well_formed: bool
    correct_official: bool | None = None


@dataclass(frozen=True)
class Prediction:
    """One evaluated image: of the class `label`, number `label_index` of its split.

    `answer` is the name that was answered, empty if there was none or more than one. A reply is right by the answer's
    name (`correct`: the label, `correct_alias`: the label or another word for it), a classifier by the class index.
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
    """How probable each offered class is, for every image of a split.

    names: Of the classes, each once. Length: C.
    classes: Offered to each image, in the order of its prompt: places in `names`; -1 fills shorter lists up. [N, K]
    values: Their probabilities, each row adds up to 1; 0 where `classes` is -1. fp32 [N, K]
    raw: The same without length normalisation, for replies of several tokens. fp32 [N, K]
    """

    names: tuple[str, ...]
    classes: NDArray[numpy.int32]
    values: NDArray[numpy.float32]
    raw: NDArray[numpy.float32] | None = None


@dataclass(frozen=True)
class Answers:
    """The predictions of one split, and the seconds that they and the probabilities took.

    columns: what the method says about each prediction, by name; see `Accounts.columns`.
    """

    predictions: list[Prediction]
    seconds: float
    probabilities: Probabilities | None = None
    scoring_seconds: float = 0.0
    columns: dict[str, list[Any]] = field(default_factory=dict)
