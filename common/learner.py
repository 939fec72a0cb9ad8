"""Interface of everything that a run trains and tests; `pipeline.run` drives one such learner.

`learner.build` in conf/learner/ names its class, `learner.check` a function that checks its configuration before
anything expensive. A new kind of learner (a classifier on frozen features, say) derives from `Learner`; with one
function and a YAML it gets run folder, resuming, evaluation, metrics, tables and figures from the pipeline.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.config.schema import Config
from common.data.task import TaskData
from common.evaluation.evaluate import Evaluation, Predictor
from common.plugins import locate
from common.types import Answers, Task, UserError

if TYPE_CHECKING:  # configuration checks import this module without torch
    import torch

    from common.run.checkpoint import Checkpoints
    from common.run.recorder import Recorder
    from common.vlm.prompting import TaskPrompts


class Learner(Predictor):
    """Base class of what is trained and tested.

    All ranks call the methods together, in this order: predict, train, save, predict, close.

    Attributes:
        task: Task whose images it classifies.
        weights: Path and sha256 of the initial weights; a run is not resumed with other weights.
    """

    weights: dict[str, str]

    @abstractmethod
    def __init__(
        self, config: Config, data: TaskData, device: torch.device, folder: Path, checkpoints: Checkpoints
    ) -> None:
        """Load the initial weights. With `doctor=true`, or before a long training, examine them.

        Args:
            config: Validated configuration.
            data: Images and labels of the run.
            device: Device of this rank.
            folder: Run folder.
            checkpoints: Checkpoints of the run, with the one to resume from.
        """

    @property
    @abstractmethod
    def decoding(self) -> str:
        """Return how answers are chosen, for the result."""

    @property
    def remarks(self) -> Sequence[str]:
        """Return notes for all tables of trained results, such as that they were selected on test images."""
        return ()

    @property
    def blank(self) -> bool:
        """Return whether it cannot predict before its training, so that the evaluation before is skipped."""
        return False

    @abstractmethod
    def train(self, recorder: Recorder) -> int:
        """Train to the end; return the number of updates over all attempts, or 0 if there is nothing to train.

        Report every update to the recorder, write checkpoints, and resume from the last one of an earlier attempt.
        """

    def held_out(self, after: Evaluation) -> tuple[str, Answers] | None:
        """Return answers to images that were not trained on, to calibrate confidences by, and where they are from.

        `after`: evaluation after training. By default those of its validation images (`val`), if there are any.
        """
        return ("val", after.answers["val"]) if "val" in after.answers else None

    def novelty(self) -> dict[str, Any]:
        """Return how well images of unknown classes are told from others (common/evaluation/novelty.py); by default
        nothing, where that is not measured.
        """
        return {}

    def examine_data(self, held_out: Answers, after: Evaluation) -> None:
        """Write into the run folder what the answers say about the data; by default nothing.

        `held_out`, `after`: as in `held_out`.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained weights into a folder that a later run can start from."""

    def load(self, folder: Path) -> None:
        """Load what `save` of a finished run wrote beside the weights that the learner was built from."""

    @classmethod
    def restored(cls, config: Config, folder: Path, began: Callable[[], Config]) -> Config:
        """Return the configuration for inference with a finished run.

        Args:
            config: Configuration of the run, without training, with the model that it trained.
            folder: Folder that `save` wrote.
            began: Function that returns the same with the model that the run started from.
        """
        return config

    @classmethod
    def answers_alone(cls, config: Config, folder: Path) -> bool:
        """Return whether a folder by `save` suffices to classify new images; False: training images are needed too."""
        return not config.learner.needs_shots

    @abstractmethod
    def set_task(self, task: Task) -> None:
        """Classify the images of another task from now on.

        Classes stay the same, but a key may stand for another image.
        """

    @abstractmethod
    def close(self) -> None:
        """Release memory and engines."""


class Check(Protocol):
    """Function that `learner.check` names. It loads no weights, and nothing heavy."""

    def __call__(self, config: Config, data: TaskData) -> TaskPrompts | None:
        """
        Returns:
            Prompts of the run, as far as they are known without weights; None for a learner without prompts.

        Raises:
            UserError: The learner cannot be built or cannot learn this task.
        """


def learner_class(config: Config) -> type[Learner]:
    """Return the class that `learner.build` names.

    Raises:
        UserError: `learner.build` names something else.
    """
    found: Any = locate(config.learner.build, "learner.build")
    if not (isinstance(found, type) and issubclass(found, Learner)):
        raise UserError(
            f"learner.build={config.learner.build} must be a class that derives from common.learner.Learner"
        )
    return found
