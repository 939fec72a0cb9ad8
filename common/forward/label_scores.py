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
from typing import Any

import torch

from common.forward.logprobs import PolicyScorer, head_rows
from common.forward.packing import Group, followed_by, pack_shared
from common.models.encoder import Encoded
from common.models.vlm import VLM

# Keys that the completions of a row attend to, each with its prompt's. With model.attention=copy they are the largest
# tensors of a forward, about 0.8 GB in Qwen2-VL-2B. At its 700 prompt tokens some 180 names fit.
BUDGET = 2**17


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


@dataclass(frozen=True)
class Ending:
    """Token ids [R] at the end of a reply, end of sequence included; the first `given` of them do not count."""

    ids: torch.Tensor
    given: int


class LabelScorer:
    """Scores given replies to prompts under the current weights."""

    def __init__(self, vlm: VLM, budget: int = BUDGET) -> None:
        """
        Args:
            vlm: The policy.
            budget: Keys per row (see `rows`).
        """
        self.vlm, self.budget = vlm, budget
        self.scorer = PolicyScorer(vlm.model, vlm.banned, temperature=1.0, chunk=head_rows(vlm.model)).to(vlm.device)
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
        model = self.vlm.model
        was_training = model.training
        model.eval()
        contexts, endings = [], []
        for prompt, texts, start in zip(prompts, responses, begun or [""] * len(prompts), strict=True):
            shared, replies = self._endings(start, texts)
            contexts.append(followed_by(prompt, shared) if len(shared) else prompt)
            endings.append(replies)
        lengths = [[len(ending.ids) for ending in replies] for replies in endings]
        parts: list[list[torch.Tensor]] = [[] for _ in prompts]
        for row in rows([len(context.ids) for context in contexts], lengths, self.budget):
            scored = [endings[number][start:stop] for number, start, stop in row]
            groups = [
                Group(contexts[number], tuple(ending.ids for ending in own))
                for (number, *_), own in zip(row, scored, strict=True)
            ]
            packed = pack_shared(groups, self.vlm.family, self.vlm.device)
            logps = self.scorer(packed, entropy=False)[0].double().cpu()  # [T]
            counts = torch.cat([torch.arange(len(ending.ids)) >= ending.given for own in scored for ending in own])
            sums = torch.zeros(packed.completions, dtype=torch.double)  # [S]
            sums = sums.index_add(0, packed.owner.cpu(), logps * counts)
            for (number, *_), part in zip(row, sums.split([len(own) for own in scored]), strict=True):
                parts[number].append(part)
        model.train(was_training)
        tokens = [torch.tensor([len(ending.ids) - ending.given for ending in replies]) for replies in endings]
        return [LabelScores(torch.cat(part), own) for part, own in zip(parts, tokens, strict=True)]

    def _endings(self, begun: str, responses: Sequence[str]) -> tuple[torch.Tensor, list[Ending]]:
        """The token ids [R] that all replies begin with before the response does, and what follows them in each."""
        if not begun:
            return torch.empty(0, dtype=torch.long), [Ending(self._tokens(text), 0) for text in responses]
        wholes = self._tokenised([begun + response for response in responses])
        # a token that ends behind what was given is the first of the response, even if it begins before
        given = [sum(end <= len(begun) for _, end in whole["offsets"]) for whole in wholes]
        shared = min(given)
        while any(whole["ids"][:shared] != wholes[0]["ids"][:shared] for whole in wholes):
            shared -= 1
        endings = [
            Ending(torch.tensor([*whole["ids"][shared:], self.vlm.end_of_turn]), own - shared)
            for whole, own in zip(wholes, given, strict=True)
        ]
        return torch.tensor(wholes[0]["ids"][:shared], dtype=torch.long), endings

    def _tokens(self, text: str) -> torch.Tensor:
        if text not in self.memory:
            self.memory[text] = torch.tensor([*self._tokenised([text])[0]["ids"], self.vlm.end_of_turn])
        return self.memory[text]

    def _tokenised(self, texts: list[str]) -> list[dict[str, Any]]:
        tokenizer = self.vlm.processor.tokenizer
        found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            {"ids": ids, "offsets": offsets}
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]


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
