"""The probability of every class name as the reply to a prompt, or as the end of one, by the shared-prefix forward.

The names of a prompt are the completions of one group, so prompt and image are computed once for all of them. A list
that is longer than one row allows is cut, and its prompt computed again for every part; short lists of several prompts
share a row. Every reply ends with the end-of-sequence token, which tells 'cat' from 'caterpillar'. The distribution is
that of sampling at temperature 1, the same ids banned; a name counts in the one tokenisation that its text has, and so
does the reasoning before it.

Shapes: N prompts, C choices of one prompt, S completions of a row, T their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from common.forward.logprobs import PolicyScorer
from common.forward.packing import Group, followed_by, pack_shared
from common.models.encoder import Encoded
from common.models.vlm import VLM

# Keys that the completions of a row attend to, the copies of their prompts included: the largest tensors of a forward,
# about 0.8 GB in Qwen2-VL-2B. At its 700 prompt tokens some 180 names fit.
BUDGET = 2**17
HEAD_CHUNK = 1024  # rows per vocabulary projection, as in training


@dataclass(frozen=True)
class LabelScores:
    """Log-probabilities (nats) of the replies to one prompt, and their lengths in tokens, end included. Both [C]."""

    logps: torch.Tensor
    lengths: torch.Tensor

    @property
    def raw(self) -> tuple[float, ...]:
        """Probabilities of the replies, as shares of what all choices have together."""
        return tuple(self.logps.softmax(0).float().tolist())  # what a file will hold

    @property
    def normalised(self) -> tuple[float, ...]:
        """The same from the mean log-probability per token, so that a long name is not less probable for its length."""
        return tuple((self.logps / self.lengths).softmax(0).float().tolist())


class LabelScorer:
    """Scores given replies to prompts under the current weights."""

    def __init__(self, vlm: VLM, budget: int = BUDGET) -> None:
        """
        Args:
            vlm: The policy.
            budget: Keys per row (see `rows`).
        """
        self.vlm, self.budget = vlm, budget
        self.scorer = PolicyScorer(vlm.model, vlm.banned, temperature=1.0, chunk=HEAD_CHUNK).to(vlm.device)
        self.memory: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Encoded], responses: Sequence[Sequence[str]], begun: Sequence[str] | None = None
    ) -> list[LabelScores]:
        """Score replies to every prompt.

        Args:
            prompts: N of them.
            responses: N lists of C texts.
            begun: N texts that the replies go on from; their own probability does not count.
        """
        if begun is not None:
            prompts = [followed_by(p, self._ids(text)) if text else p for p, text in zip(prompts, begun, strict=True)]
        model = self.vlm.model
        was_training = model.training
        model.eval()
        replies = [[self._tokens(text) for text in texts] for texts in responses]
        lengths = [[len(ids) for ids in texts] for texts in replies]
        parts: list[list[torch.Tensor]] = [[] for _ in prompts]
        for row in rows([len(prompt.ids) for prompt in prompts], lengths, self.budget):
            groups = [Group(prompts[number], tuple(replies[number][start:stop])) for number, start, stop in row]
            packed = pack_shared(groups, self.vlm.family, self.vlm.device)
            logps = self.scorer(packed, entropy=False)[0].double().cpu()  # [T]
            sums = torch.zeros(packed.completions, dtype=torch.double).index_add(0, packed.owner.cpu(), logps)  # [S]
            sizes = [len(group.completions) for group in groups]
            for (number, *_), part in zip(row, sums.split(sizes), strict=True):
                parts[number].append(part)
        model.train(was_training)
        return [LabelScores(torch.cat(part), torch.tensor(own)) for part, own in zip(parts, lengths, strict=True)]

    def _tokens(self, text: str) -> torch.Tensor:
        if text not in self.memory:
            self.memory[text] = torch.cat([self._ids(text), torch.tensor([self.vlm.end_of_turn])])
        return self.memory[text]

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def rows(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], budget: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Which replies share a forward: lists of (prompt, first reply, end).

    A reply costs the keys that it attends to, its prompt and itself, at the width of the row's widest. A reply that
    alone exceeds the budget gets a row of its own.

    Args:
        prompts: Lengths of the prompts.
        responses: Lengths of the replies to each.
        budget: Keys per row.

    >>> list(rows([8, 8, 8], [[2, 1], [2, 2], [1]], budget=40))
    [[(0, 0, 2), (1, 0, 2)], [(2, 0, 1)]]
    >>> list(rows([8, 8], [[2, 2, 2, 2, 2], [2]], budget=20))
    [[(0, 0, 2)], [(0, 2, 4)], [(0, 4, 5), (1, 0, 1)]]
    """
    row: list[tuple[int, int, int]] = []
    count, widest = 0, 0
    for number, (prompt, lengths) in enumerate(zip(prompts, responses, strict=True)):
        width = prompt + max(lengths)
        step = max(1, budget // width)
        for start in range(0, len(lengths), step):
            stop = min(start + step, len(lengths))
            if row and (count + stop - start) * max(widest, width) > budget:
                yield row
                row, count, widest = [], 0, 0
            row.append((number, start, stop))
            count, widest = count + stop - start, max(widest, width)
    if row:
        yield row
