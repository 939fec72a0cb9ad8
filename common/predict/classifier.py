"""Classify new images with a finished run: `Classifier.load(run)(pictures)`."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from common import parsing
from common.config.schema import NO_FAMILY, Config
from common.data import manifest
from common.data.loading import Loader, count_treated, examine
from common.evaluation import calibration
from common.evaluation.calibration import Calibration
from common.launch import quiet_libraries
from common.learner import Learner, learner_class
from common.predict.abstention import check_unknown, threshold_of
from common.predict.photos import Photos, Picture
from common.predict.trained_model import SPLIT, TrainedModel, config_of, data_of, without_list
from common.run.checkpoint import Checkpoints
from common.run.result import Result
from common.runtime import process
from common.runtime.group import init_process_group
from common.runtime.progress import say
from common.types import Answers, Item, Reply, Task, UserError

TOP = 5  # names with their probabilities in an answer
UNKNOWN = -1  # label of a picture without a true class


@dataclass(frozen=True)
class Answer:
    """The answer to one picture.

    label: the answered class name; None: the reply names no class (where the prompt lists them), the model
        abstains, or the picture is broken.
    confidence: probability of that name.
    top: at most five names with their probabilities.
    reasoning: text before the answer in the reply.
    candidates: names proposed by a draft.
    abstained: the confidence is below the threshold, or there is none.
    unknown: it looks like none of the classes (no label, either).
    p_value: share of the training photos that look at least as unusual; None where that is not known.
    error: why the picture cannot be used.
    """

    image: str
    label: str | None = None
    confidence: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    reasoning: str = ""
    reply: str = ""
    candidates: tuple[str, ...] = ()
    abstained: bool = False
    unknown: bool = False
    p_value: float | None = None
    error: str = ""


class Classifier:
    """The model of a finished run, ready for inference. Nothing is written into the run's folder."""

    def __init__(
        self,
        config: Config,
        run: TrainedModel,
        names: Sequence[str] | None = None,
        threshold: float | None = None,
        began_from: str | None = None,
        calibrated: Calibration | None = None,
        unknown: float | None = None,
    ) -> None:
        """Create a classifier; use `load`.

        Args:
            config: Configuration for inference.
            run: The trained run.
            names: Class names, if not those of the run.
            threshold: Confidence below which it abstains.
            began_from: Hash of the weights, if they are not the run's own.
            calibrated: Calibration of the probabilities; None: they stay as they are.
            unknown: p-value up to which a picture is called unknown (common/evaluation/novelty.py); None: never.
        """
        self.config, self.run, self.threshold = config, run, threshold
        self.calibrated = calibrated or Calibration()
        self.unknown = unknown
        self.workplace = tempfile.TemporaryDirectory(prefix="predict-")
        self.device = init_process_group(config.gpus)
        self.data = data_of(run, config, names)
        self.photos = Photos(self.data.task.images, config.data.background)
        self.began_from = began_from
        self.learner: Learner | None = None

    @classmethod
    def load(
        cls,
        run: str | Path,
        names: Sequence[str] | None = None,
        risk: float | None = None,
        lists_names: bool = True,
        trust_code: bool = False,
        data: str | Path | None = None,
        unknown: float | None = None,
    ) -> Classifier:
        """Load the model of a finished run.

        Args:
            run: Folder of a finished run, or of an export by `python -m common.export`.
            names: Other class names than the run's own, for methods that only read them.
            risk: Abstain where more than this share of the answers would be wrong, measured on the run's validation
                images; None: never.
            lists_names: False: the prompt lists no names, and the answer may be any word, for methods of CLS-RL.
            trust_code: Allow the folder's configuration to name code of other packages than this project; it is run.
            data: Folder in which the run's dataset lies now, for methods that need its images again.
            unknown: Name no class where a photo looks like none of them; about this share of the photos of known
                classes is then called unknown as well. None: never.

        Raises:
            UserError: The run is not finished, is of another version, names foreign code, or its method does not
                support an argument.
        """
        trained = TrainedModel.of(Path(run).expanduser(), trust_code, None if data is None else Path(data))
        result = Result.load(trained.records)
        if risk is not None and trained.records != trained.folder:
            raise UserError(f"risk={risk}: an export has no answers to validation images; ask the run itself")
        threshold = None if risk is None else threshold_of(trained.records, risk)
        if unknown is not None:
            check_unknown(trained.model, unknown)
        config = config_of(trained)
        config = learner_class(config).restored(config, trained.model, partial(config_of, trained, began=True))
        if not lists_names:
            config = without_list(config)
        # where the method trained no weights of its own, the base weights must still be the same
        began_from = None if config.model.path == str(trained.model) else result.weights["sha256"]
        return cls(config, trained, names, threshold, began_from, calibration.read(result.calibration), unknown)

    @property
    def background(self) -> str:
        """The colour behind transparent parts of images."""
        return self.config.data.background

    @property
    def names(self) -> tuple[str, ...]:
        """The class names that it chooses among."""
        return self.data.task.evaluation[SPLIT].choices

    def __call__(self, pictures: Mapping[str, Picture] | Iterable[Picture] | Picture) -> list[Answer]:
        """Classify pictures, or one; the answer to a broken one says what is wrong.

        Args:
            pictures: Files, bytes or PIL images; the keys of a mapping become the names in the answers, otherwise these
                are the file names, or #0, #1, …
        """
        if isinstance(pictures, str | Path | bytes | Image.Image):
            pictures = [pictures]
        given = dict(pictures) if isinstance(pictures, Mapping) else _named(pictures)
        self.photos.show(given)
        model = self.config.model
        load = Loader(self.photos, model.image_size, model.resize, workers=os.cpu_count() or 1)
        found = examine(load, list(given))
        for line in manifest.treated(count_treated(found.treated, given), self.background):
            say(line)
        broken = found.bad
        good = [key for key in given if key not in broken]
        answers = self._answers(good) if good else {}
        return [Answer(key, error=broken[key]) if key in broken else answers[key] for key in given]

    def quieten(self) -> None:
        """Turn off progress bars and notices of libraries, for commands; only if a language model is used."""
        if self.config.model.family != NO_FAMILY:
            quiet_libraries()

    def close(self) -> None:
        """Release the model."""
        if self.learner is not None:
            self.learner.close()
        self.workplace.cleanup()

    def _answers(self, keys: Sequence[str]) -> dict[str, Answer]:
        splits = self.data.task.evaluation  # kept: learners that are fitted again select on the validation images
        new = replace(splits[SPLIT], items=tuple(Item(key, UNKNOWN, "") for key in keys))
        task = replace(self.data.task, evaluation={**splits, SPLIT: new}, images=self.photos)
        return {answer.image: answer for answer in self._read(self._ready(task).predict(SPLIT))}

    def _ready(self, task: Task) -> Learner:
        """Return the learner with the images of a task; it is built at the first call."""
        if self.learner is not None:
            self.learner.set_task(task)
            return self.learner
        folder = Path(self.workplace.name) / "learner"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with process.garbage_collector_paused():
            build = learner_class(self.config)
        data = replace(self.data, task=task)
        learner = build(self.config, data, self.device, folder, Checkpoints(folder / "checkpoints", 1))
        if self.began_from is not None and learner.weights["sha256"] != self.began_from:
            path = learner.weights["path"]
            raise UserError(f"{self.run.folder} was made with other weights than {path} holds now; make it anew")
        if self.run.model.is_dir():
            learner.load(self.run.model)
        self.learner = learner  # last: a learner that was refused above must not be used
        return learner

    def _read(self, answers: Answers) -> Iterable[Answer]:
        table = answers.probabilities
        probabilities = None if table is None else self.calibrated(table)
        candidates, p_values = answers.columns.get("candidates"), answers.columns.get("p_value")
        for number, prediction in enumerate(answers.predictions):
            shares: dict[str, float] = {}  # of all names, the most probable first
            if table is not None and probabilities is not None:
                classes, values = table.classes[number], probabilities[number]
                order = [place for place in (-values).argsort(kind="stable") if classes[place] >= 0]
                shares = {table.names[classes[place]]: float(values[place]) for place in order}
            label = self._spelt(prediction.answer)
            confidence = shares.get(label or "")
            p_value = None if p_values is None else p_values[number]
            unknown = self.unknown is not None and p_value is not None and p_value <= self.unknown
            unsure = self.threshold is not None and (confidence is None or confidence < self.threshold)
            abstained = unsure and not unknown
            yield Answer(
                image=prediction.image,
                label=None if abstained or unknown else label,
                confidence=confidence,
                top=tuple(itertools.islice(shares.items(), TOP)),
                reasoning=_reasoning(prediction.reply),
                reply=prediction.reply.text if prediction.reply else "",
                candidates=() if candidates is None else tuple(candidates[number]),
                abstained=abstained,
                unknown=unknown,
                p_value=p_value,
            )

    def _spelt(self, answer: str) -> str | None:
        """Return the class name as it is written; without a list of names any other answer is returned as it is."""
        known = {parsing.normalize(name): name for name in self.names}
        any_word = self.config.method.get("list_share") == 0
        return known.get(parsing.normalize(answer), (answer or None) if any_word else None)


def _named(pictures: Iterable[Picture]) -> dict[str, Picture]:
    found: dict[str, Picture] = {}
    for number, picture in enumerate(pictures):
        name = str(picture) if isinstance(picture, str | Path) else f"#{number}"
        found[name if name not in found else f"{name} ({number})"] = picture
    return found


def _reasoning(reply: Reply | None) -> str:
    text = parsing.reasoning_before(reply.text) if reply is not None and reply.well_formed else ""
    return text.replace("<think>", "").replace("</think>", "").strip()
