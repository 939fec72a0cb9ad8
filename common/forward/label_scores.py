"""Score every class name as the reply to a prompt, or as its end, with one shared-prefix forward.

The names of a prompt are the completions of one group, so prompt and image are computed once for all of them. A list
that is too long for one row is cut, and its prompt is computed again for every part; short lists of several prompts
share a row. Every reply ends with the end-of-sequence token, which distinguishes 'cat' from 'caterpillar'. The
distribution is that of sampling at temperature 1 with the same banned ids; a name, like the reasoning before it, counts
only in the tokenisation that the tokenizer gives its text.

Shapes: N prompts, C choices of one prompt, S completions of a row, T their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.forward.logprobs import PolicyScorer, head_rows
from common.forward.packing import PromptGroup, followed_by, pack_shared
from common.models.encoder import EncodedPrompt
from common.models.vlm import VLM

# Keys per row: summed over its completions, those of the prompt and of the completion itself. With model.attention=copy
# they are the largest tensors of a forward, about 0.8 GB in Qwen2-VL-2B. With its 700 prompt tokens some 180 names fit.
BUDGET = 2**17


@dataclass(frozen=True)
class LabelScores:
    """Log-probabilities (nats) of the replies to one prompt, and their lengths in tokens, end included. Both [C]."""

    logps: torch.Tensor
    lengths: torch.Tensor

    @property
    def raw(self) -> tuple[float, ...]:
        """Return the probabilities of the replies, normalised over the choices."""
        return tuple(self.logps.softmax(0).float().tolist())  # fp32, as files store it

    @property
    def normalised(self) -> tuple[float, ...]:
        """Return the same from mean log-probabilities per token, so that long names are not at a disadvantage."""
        return tuple((self.logps / self.lengths).softmax(0).float().tolist())


@dataclass(frozen=True)
class Ending:
    """Token ids [R] at the end of a reply, end of sequence included; the first `given` of them are not scored."""

    ids: torch.Tensor
    given: int


class LabelScorer:
    """Score given replies to prompts under the current weights."""

    def __init__(self, vlm: VLM, budget: int = BUDGET) -> None:
        """
        Args:
            vlm: Policy to score with.
            budget: Keys per row, see `rows`.
        """
        self.vlm, self.budget = vlm, budget
        self.scorer = PolicyScorer(vlm, temperature=1.0, chunk=head_rows(vlm.model)).to(vlm.device)
        self.memory: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[str]], begun: Sequence[str] | None = None
    ) -> list[LabelScores]:
        """Score replies to every prompt.

        Args:
            prompts: Encoded prompts. Length: N.
            responses: N lists of C texts.
            begun: N texts that the replies continue; they are not scored themselves.
        """
        model = self.vlm.model
        was_training = model.training
        model.eval()
        # Tokenise. What all replies of a prompt begin with becomes part of the prompt, so that it is computed once.
        contexts, endings = [], []
        for prompt, texts, start in zip(prompts, responses, begun or [""] * len(prompts), strict=True):
            shared, replies = self._endings(start, texts)
            contexts.append(followed_by(prompt, shared) if len(shared) else prompt)
            endings.append(replies)
        # Score row by row. A row holds parts of one or several prompts' replies, as `rows` cuts them.
        lengths = [[len(ending.ids) for ending in replies] for replies in endings]
        parts: list[list[torch.Tensor]] = [[] for _ in prompts]
        for row in rows([len(context.ids) for context in contexts], lengths, self.budget):
            scored = [endings[number][start:stop] for number, start, stop in row]
            groups = [
                PromptGroup(contexts[number], tuple(ending.ids for ending in own))
                for (number, *_), own in zip(row, scored, strict=True)
            ]
            packed = pack_shared(groups, self.vlm.family, self.vlm.device)
            logps = self.scorer(packed, entropy=False)[0].double().cpu()  # [T]
            # Sum the log-probabilities of each reply's tokens, without those that were given (in fp64, for rounding).
            counts = torch.cat([torch.arange(len(ending.ids)) >= ending.given for own in scored for ending in own])
            sums = torch.zeros(packed.completions, dtype=torch.double)  # [S]
            sums = sums.index_add(0, packed.owner.cpu(), logps * counts)
            for (number, *_), part in zip(row, sums.split([len(own) for own in scored]), strict=True):
                parts[number].append(part)
        model.train(was_training)
        # Join the parts of every prompt.
        tokens = [torch.tensor([len(ending.ids) - ending.given for ending in replies]) for replies in endings]
        return [LabelScores(torch.cat(part), own) for part, own in zip(parts, tokens, strict=True)]

    def _endings(self, begun: str, responses: Sequence[str]) -> tuple[torch.Tensor, list[Ending]]:
        """Return the token ids [R] that all replies share before their responses, and the rest of each reply."""
        if not begun:
            return torch.empty(0, dtype=torch.long), [Ending(self._tokens(text), 0) for text in responses]
        wholes = self._tokenised([begun + response for response in responses])
        # `begun` and response are tokenised together, as the model would write them. A token that ends inside the
        # response belongs to it, even if it begins before.
        begun = self.vlm.lead + begun
        given = [sum(end <= len(begun) for _, end in whole["offsets"]) for whole in wholes]
        shared = min(given)
        # The tokenisation of `begun` may depend on what follows: shorten the shared part until it is the same for all
        # replies.
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
        """Return ids and offsets of replies, with what the chat template writes before them."""
        tokenizer = self.vlm.processor.tokenizer
        found = tokenizer(
            [self.vlm.lead + text for text in texts], add_special_tokens=False, return_offsets_mapping=True
        )
        return [
            {"ids": ids, "offsets": offsets}
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]


def rows(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], budget: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Assign replies to forwards: yield lists of (prompt, first reply, end).

    A reply costs as many keys as the row is wide: the longest prompt with its longest reply. A reply that
    alone exceeds the budget gets a row of its own.

    Args:
        prompts: Lengths of the prompts.
        responses: Lengths of the replies to each prompt.
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
