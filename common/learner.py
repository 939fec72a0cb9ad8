"""What a run trains and tests. `pipeline.run` drives one, whatever it is: `learner.build` in conf/learner/ names the
function that makes it, `learner.check` one that checks its configuration before anything expensive.

A new kind of learner (a classifier on frozen features, say) is a class with these members, two functions and a YAML; it
gets the run folder, resuming, evaluation, metrics, tables and figures from the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from common.config.schema import Config
from common.data.task import Questions
from common.evaluation.evaluate import Predictor
from common.types import Task

if TYPE_CHECKING:  # checks of a configuration import this module, and need no torch
    import torch

    from common.run.checkpoint import Checkpoints
    from common.run.recorder import Recorder


class Learner(Predictor, Protocol):
    """All ranks call the methods together, in this order: predict, train, save, predict, close."""

    @property
    def weights(self) -> dict[str, str]:
        """Path and sha256 of what it begins from; a run is not continued from other weights."""

    @property
    def decoding(self) -> str:
        """How its answers are chosen, for the result."""

    @property
    def remarks(self) -> Sequence[str]:
        """What every table must say of its trained results, such as that they were chosen by the test images."""

    def train(self, recorder: Recorder) -> int:
        """Train to the end and return the number of updates that were made over all attempts; 0: nothing to train.

        Tells the recorder about every update, writes checkpoints, and goes on from the last one of an earlier attempt.
        """

    def save(self, folder: Path) -> None:
        """Write what was trained into a folder that a later run can begin from."""

    def close(self) -> None:
        """Release memory and engines."""


class Build(Protocol):
    """The function that `learner.build` names."""

    def __call__(
        self, config: Config, questions: Questions, device: torch.device, folder: Path, checkpoints: Checkpoints
    ) -> Learner:
        """Load what the run begins from. With `doctor=true`, or before a long training, examine it.

        Args:
            config: Validated configuration.
            questions: Images, labels and prompts of the run.
            device: This rank's.
            folder: Run folder.
            checkpoints: Of the run, with the one to continue from.
        """


class Check(Protocol):
    """The function that `learner.check` names. It loads no weights, and nothing heavy."""

    def __call__(self, config: Config, questions: Questions) -> None:
        """
        Raises:
            UserError: The learner could not be built or could not answer these questions.
        """


@runtime_checkable
class Restores(Protocol):
    """A learner whose training is not all in the weights that it begins from."""

    def take_over(self, folder: Path) -> None:
        """Load what `save` of a finished run wrote, instead of training."""


@runtime_checkable
class BeginsBlank(Protocol):
    """A learner that may know nothing before its training, so that there is nothing to measure before it."""

    @property
    def blank(self) -> bool:
        """Whether all its answers before the training would be one class, whatever the image."""


@runtime_checkable
class Asks(Protocol):
    """A learner that can be asked about pictures that it did not know when it was built."""

    def ask(self, questions: Questions) -> None:
        """Take other questions in place of those before; a picture's name may stand for another one now."""


@runtime_checkable
class Prepares(Protocol):
    """A method that needs something made before the model is loaded, such as a classifier that names candidates."""

    def check(self, config: Config, task: Task) -> None:
        """What can be refused at once. Loads no weights.

        Raises:
            UserError: What it needs cannot be made.
        """

    def prepare(self, config: Config, questions: Questions, device: torch.device, folder: Path) -> None:
        """Make it, or take what an earlier attempt of the run made. All ranks call it together.

        Args:
            config: Of the run.
            questions: Of the run, asked as if nothing had been made.
            device: This rank's.
            folder: Run folder.
        """
