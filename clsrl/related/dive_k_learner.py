"""DiVE-k as the learner of a run: it mines candidates before training, and anew at every evaluation.

Candidates of the training images are kept in the run folder, so that a resumed run asks what it asked before, to the
byte. Those of tested images are in the column `candidates` of predictions.parquet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from clsrl.related.dive_k import DiveKPrompt, most_frequent, options
from clsrl.related.measured import measured
from common.evaluation.evaluate import evenly_spaced
from common.forward.label_scores import LabelScorer
from common.forward.packing import micro_batches
from common.rollout.base import Decoding, requests
from common.runtime.distributed import gather, interleave, share_of
from common.runtime.progress import progress
from common.types import Answers, Prompt, Split, UserError
from common.vlm.learner import VLMLearner
from common.vlm.prompting import ask

MINED = "mined.json"  # in the run folder: candidates by training image
ROWS = 4  # completions in a batch of mining, as multiples of an evaluation's; our choice


class DiveKLearner(VLMLearner):
    """Vision-language model that is asked twice; implements `Learner` (common/learner.py)."""

    prompting: DiveKPrompt

    def finish_prompts(self) -> None:
        """Mine the training images with the initial weights, or read what an earlier attempt mined."""
        split = self.task.train
        images = [item.image for item in split.items]

        def mine() -> Mapping[str, list[str]]:
            with self._sampling():
                return self.mine(split, self.prompting.first_prompts(split), "training images")

        keep = bool(images) and self.config.doctor is not True  # doctor=true leaves no files
        self.prompting.mined = measured(self.folder / MINED, lambda path: read(path, images), mine, keep)
        self.prompts = ask(self.prompting, self.task)

    def predict(self, split: str, limit: int | None = None) -> Answers:
        method, tested, began = self.prompting, self.task.evaluation[split], time.perf_counter()
        first = evenly_spaced(self.prompts.evaluation[split], limit)
        with self._sampling():
            found = method.found[split] = self.mine(tested, first, split)
            second = [
                method.second_prompt(
                    tested,
                    prompt,
                    prompt.label,
                    options(found[prompt.image], tested.choices, method.k, method.seed, prompt.image),
                )
                for prompt in first
            ]
            mining = time.perf_counter() - began
            answers = self.replies(self.rollout, self.prompts, split, second, scored=limit is None)
        return replace(answers, seconds=answers.seconds + mining)

    def mine(self, split: Split, prompts: Sequence[Prompt], what: str) -> dict[str, list[str]]:
        """Return the candidates of some images of a split, by image, the best first. All ranks call it together.

        Args:
            split: Split with the class names.
            prompts: First questions about the images.
            what: What is mined, for the progress bar.
        """
        method, batch = self.prompting, self.config.rollout.evaluation_batch
        size = max(1, ROWS * batch // method.samples) if method.mining == "sampled" else batch
        parts, found = list(micro_batches(share_of(list(prompts)), size)), []
        for part in progress(parts, f"mining {what}", len(parts)):
            found += self._sampled(split, part) if method.mining == "sampled" else self._scored(split, part)
        everyone = interleave(gather(found))
        return {prompt.image: list(each) for prompt, each in zip(prompts, everyone, strict=True)}

    def _sampled(self, split: Split, prompts: Sequence[Prompt]) -> list[tuple[str, ...]]:
        method = self.prompting
        decoding = Decoding(method.temperature, 0, method.top_p, self.config.rollout.max_completion_tokens)
        # a seed of the image alone, so that two evaluations differ by the weights alone
        asked = requests(self.encoder, prompts, [f"mining-{method.seed}-{prompt.image}" for prompt in prompts])
        groups = self.rollout.generate(asked, method.samples, decoding)
        return [
            most_frequent((method.answer(each.text) for each in group), split.choices, method.k) for group in groups
        ]

    def _scored(self, split: Split, prompts: Sequence[Prompt]) -> list[tuple[str, ...]]:
        names = split.choices
        scorer = self.replies.labels or LabelScorer(self.policy)
        scores = scorer(self.encoder(prompts), [list(names)] * len(prompts))
        # a stable sort, so that the earlier class goes first where two are equal
        orders = [torch.tensor(each.normalised).argsort(descending=True, stable=True).tolist() for each in scores]
        return [tuple(names[place] for place in order[: self.prompting.k]) for order in orders]


def read(path: Path, images: Sequence[str]) -> Mapping[str, list[str]]:
    """Return the candidates that an earlier attempt kept.

    Raises:
        UserError: They are of other images, or the file is damaged.
    """
    try:
        found: Mapping[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); use another run folder") from error
    if list(found) != list(images):
        raise UserError(f"{path} has the candidates of other images than these; use another run folder")
    return found
