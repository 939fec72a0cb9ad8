"""From the pictures and names of a task to what a learner is fitted on: the encoders of a run, and their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from common.config.schema import Config
from common.few_shot.encoders import generated, prompts
from common.few_shot.encoders.encoder import TextEncoder, load
from common.few_shot.encoders.store import Encoded, Rows
from common.few_shot.encoders.views import TEST, View
from common.few_shot.heads.base import FewShotHead
from common.few_shot.heads.data import CHUNK, Pictures, Support, Text
from common.few_shot.heads.zero_shot import text_weights
from common.types import Images, Item, Task


class FeatureExtractor:
    """The encoders that a learner needs. All ranks call the methods together."""

    def __init__(self, config: Config, learner: FewShotHead, device: torch.device) -> None:
        """
        Args:
            config: The run's configuration.
            learner: What it `needs` decides which encoders are loaded.
            device: Where encoders compute and features lie.

        Raises:
            UserError: Weights are missing or of another model.
        """
        self.config, self.needs, self.crop, self.device = config, learner.needs, learner.crop, device
        cache = Path(config.cache_dir)
        reads, looks = config.clip, config.visual  # a run may have neither: `check_fit` refuses that
        self.clip = cast(TextEncoder, load("clip", reads, device, cache)) if reads and reads.load else None
        beside = self.clip is None or "second" in learner.needs
        self.visual = load("visual", looks, device, cache) if beside and looks and looks.load else None
        encoders = [each for each in (self.clip, self.visual) if each is not None]
        self.weights = {
            "path": "; ".join(each.source for each in encoders),
            "sha256": "+".join(each.identity for each in encoders),
        }
        self.encoded = [
            Encoded(each, cache, chosen.dtype, chosen.batch)
            for chosen, each in ((reads, self.clip), (looks, self.visual))
            if chosen is not None and each is not None
        ]

    def close(self) -> None:
        """End this process's files."""
        for each in self.encoded:
            each.close()

    def text(self, names: Sequence[str]) -> Text:
        """Class names as CLIP reads them."""
        chosen = self.config.clip
        if self.clip is None or chosen is None:
            return Text(tuple(names))
        if chosen.prompts is None:
            sentences = prompts.of_templates(names, chosen.templates)
        else:
            sentences = prompts.of_file(Path(chosen.prompts).expanduser(), names)
        features = self.clip.texts([sentence for each in sentences for sentence in each])
        parts = features.split([len(each) for each in sentences])
        return Text(tuple(names), text_weights(parts).to(self.device), self.clip)

    def chunks(self, images: Images, items: Sequence[Item]) -> Iterator[Pictures]:
        """The test views of some pictures, so many at a time that memory is bounded."""
        rows = self._rows(images, items, TEST, maps="maps" in self.needs)
        for start in range(0, len(items), CHUNK):
            yield self._pictures(rows, items[start : start + CHUNK], slice(start, start + CHUNK))

    def pictures(self, images: Images, items: Sequence[Item]) -> Pictures:
        """The test views of some pictures at once."""
        return self._pictures(self._rows(images, items, TEST, maps="maps" in self.needs), items, slice(None))

    def support(self, task: Task, source: str | None = None, per_class: int = 0) -> Support:
        """The shots of a task, and generated pictures if there are any."""
        made = self._support(task.images, task.train.items)
        if source is None or not per_class:
            return made
        drawn = generated.pick("few_shot.generated", source, per_class, task.train.names, self.config.seed)
        return replace(made, generated=self._support(generated.Folder(), drawn))

    def _support(self, images: Images, items: Sequence[Item]) -> Support:
        chosen = self.config.clip if self.clip is not None else self.config.visual
        assert chosen is not None, "an encoder was loaded"
        scale = self.crop if chosen.crop is None else (chosen.crop[0], chosen.crop[1])
        known: dict[int, list[Rows | None]] = {}  # where they lie: the views of a large set do not fit into memory

        def view(number: int) -> Pictures:
            if number not in known:
                wanted = View(number, self.config.seed, scale, chosen.flip)
                known[number] = self._rows(images, items, wanted, maps=False)
            return self._pictures(known[number], items, slice(None))

        return Support(self.pictures(images, items), view, chosen.views)

    def _rows(self, images: Images, items: Sequence[Item], view: View, maps: bool) -> list[Rows | None]:
        keys = [item.image for item in items]
        rows: list[Rows | None] = [each.images(images, keys, view) for each in self.encoded]
        rows = [*rows, None] if len(rows) == 1 else rows
        return [*rows, self.encoded[0].maps(images, keys, view) if maps else None]

    def _pictures(self, rows: list[Rows | None], items: Sequence[Item], part: slice) -> Pictures:
        images, second, maps = (None if each is None else each[part].to(self.device) for each in rows)
        assert images is not None
        return Pictures(images, torch.tensor([item.label for item in items], device=self.device), maps, second)
