"""Fine-R1 as the learner of a run: before training it measures which class the model takes each class for.

The result is kept in the run folder, so that a resumed run has the same negatives, to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clsrl.related.fine_r1 import FineR1Prompt, most_confused, pictures_of
from clsrl.related.measured import measured
from common.forward.label_scores import LabelScorer
from common.forward.packing import micro_batches
from common.runtime.distributed import gather, interleave, share_of
from common.runtime.progress import progress
from common.types import UserError
from common.vlm.learner import VLMLearner
from common.vlm.prompting import ask

SIMILAR = "similar.json"  # in the run folder: similar class by class
IMAGES = 16  # of a class, at most, that are looked at; our choice


class FineR1Learner(VLMLearner):
    """Vision-language model whose training prompts need the model's confusions; implements `Learner`."""

    prompting: FineR1Prompt

    def finish_prompts(self) -> None:
        """Measure the confusions with the initial weights, or read what an earlier attempt measured."""
        if self.prompting.final:
            return
        names = list(pictures_of(self.task.train.items))
        keep = bool(names) and self.config.doctor is not True  # doctor=true leaves no files
        self.prompting.confused = measured(
            self.folder / SIMILAR, lambda path: read(path, names), lambda: self.measure(names), keep
        )
        self.prompts = ask(self.prompting, self.task)

    def measure(self, names: Sequence[str]) -> dict[str, str]:
        """Return the most confused class of each class, see `most_confused`. All ranks call it together.

        Bare names are scored as replies to the question without thoughts, about the first pictures of each class.
        """
        split = self.task.train
        chosen = {image for images in pictures_of(split.items).values() for image in images[:IMAGES]}
        looked = replace(split, items=tuple(item for item in split.items if item.image in chosen))
        prompts = self.prompting.bare_prompts(looked)
        found: list[Sequence[float]] = []
        scorer = self.replies.labels or LabelScorer(self.policy)
        parts = list(micro_batches(share_of(prompts), self.config.rollout.evaluation_batch))
        with self._sampling():
            for part in progress(parts, "measuring confusions", len(parts)):
                found += [each.normalised for each in scorer(self.encoder(part), [list(names)] * len(part))]
        return most_confused([prompt.label for prompt in prompts], interleave(gather(found)), names)


def read(path: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the similar classes that an earlier attempt kept.

    Raises:
        UserError: They are of other classes, or the file is damaged.
    """
    try:
        found: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); use another run folder") from error
    if list(found) != list(names) or not set(found.values()) <= set(names):
        raise UserError(f"{path} is of other classes than these; use another run folder")
    return found
