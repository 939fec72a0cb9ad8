"""What a run trains and tests. `pipeline.run` drives one, whatever it is: `learner.build` in conf/learner/ names its
class, `learner.check` a function that checks its configuration before anything expensive.

A new kind of learner (a classifier on frozen features, say) derives from `Learner`; with one function and a YAML it
gets the run folder, resuming, evaluation, metrics, tables and figures from the pipeline.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.config.schema import Config
from common.data.task import TaskData
from common.evaluation.evaluate import Predictor
from common.plugins import locate
from common.types import Task, UserError

if TYPE_CHECKING:  # checks of a configuration import this module, and need no torch
    import torch

    from common.run.checkpoint import Checkpoints
    from common.run.recorder import Recorder
    from common.vlm.prompting import TaskPrompts


class Learner(Predictor):
    """What is trained and tested. All ranks call the methods together, in this order: predict, train, save, predict,
    close.

    Attributes:
        task: What it answers about.
        weights: Path and sha256 of what it begins from; a run is not continued from other weights.
    """

    weights: dict[str, str]

    @abstractmethod
    def __init__(
        self, config: Config, data: TaskData, device: torch.device, folder: Path, checkpoints: Checkpoints
    ) -> None:
        """Load what the run begins from. With `doctor=true`, or before a long training, examine it.

        Args:
            config: Validated configuration.
            data: Images and labels of the run.
            device: Device of this rank.
            folder: Run folder.
            checkpoints: The run's checkpoints, with the one to continue from.
        """

    @property
    @abstractmethod
    def decoding(self) -> str:
        """How its answers are chosen, for the result."""

    @property
    def remarks(self) -> Sequence[str]:
        """What every table must say of its trained results, such as that they were chosen by the test images."""
        return ()

    @property
    def blank(self) -> bool:
        """Whether it knows nothing before its training, so that there is nothing to measure before it."""
        return False

    @abstractmethod
    def train(self, recorder: Recorder) -> int:
        """Train to the end and return the number of updates that were made over all attempts; 0: nothing to train.

        Tells the recorder about every update, writes checkpoints, and goes on from the last one of an earlier attempt.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained into a folder that a later run can begin from."""

    def load(self, folder: Path) -> None:
        """Take over what `save` of a finished run wrote beside the weights that the learner was built from."""

    @classmethod
    def restored(cls, config: Config, folder: Path, began: Callable[[], Config]) -> Config:
        """The configuration with which a finished run is asked.

        Args:
            config: The run's configuration, without training, with the model that it trained.
            folder: What `save` wrote.
            began: Gives the same with the model that the run began from.
        """
        return config

    @classmethod
    def answers_alone(cls, config: Config, folder: Path) -> bool:
        """Whether what `save` wrote into a folder is all that answering about new pictures needs; False: the images
        that the run was trained on are read again.
        """
        return not config.learner.needs_shots

    @abstractmethod
    def set_task(self, task: Task) -> None:
        """Answer about the images of another task from now on; the classes are the same, and a key may stand for
        another picture than before.
        """

    @abstractmethod
    def close(self) -> None:
        """Release memory and engines."""


class Check(Protocol):
    """The function that `learner.check` names. It loads no weights, and nothing heavy."""

    def __call__(self, config: Config, data: TaskData) -> TaskPrompts | None:
        """
        Returns:
            What a learner that answers in words will ask, as far as it is known without weights; None: it asks nothing.

        Raises:
            UserError: The learner could not be built or could not learn this task.
        """


def learner_class(config: Config) -> type[Learner]:
    """The class that `learner.build` names.

    Raises:
        UserError: It names something else.
    """
    found: Any = locate(config.learner.build, "learner.build")
    if not (isinstance(found, type) and issubclass(found, Learner)):
        raise UserError(
            f"learner.build={config.learner.build} must be a class that derives from common.learner.Learner"
        )
    return found
