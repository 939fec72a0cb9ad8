"""Pre-training of the tiny Gemma 3 from scratch: captions of rendered pictures, then ALERT's episodes with guidance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from alert.prompt import meta_task
from alert.tiny.episodes import draw, reply
from alert.tiny.layout import NONE, Row, Rows, forward, lay_out, reply_loss, visible
from common.models.families import Gemma3
from common.models.meter import messages
from common.models.slots import expand_placeholders
from common.models.tiny.gemma3 import END, IMAGE, IMAGE_TOKENS
from common.models.tiny.pictures import Pictures
from common.models.tiny.qwen2_vl import IMAGE_SIZE
from common.models.tiny.wordings import CLASSES, KINDS
from common.runtime.progress import progress
from common.types import CATEGORY, Prompt

# How a model of three layers is taught to compare. By next-token prediction alone it did not learn that in minutes.
#
# Comparing takes three steps, each of which is useless without the others: (1) a category's embeddings take up the
# name before them; (2) the input image finds the embeddings that resemble it and takes up their name; (3) the reply
# takes the name from the image. Here each layer is told its step: where one head of it has to look, and, for the
# first two, which name its output has to hold, read with the model's own output projection ("deep supervision", Lee
# et al. 2015, arXiv 1409.5185). Our choice; pre-training only.
#
# Shapes: B rows, L tokens of the longest row, D width, V vocabulary.


NAME_BEFORE = 2  # "six ▁ <category>": a name's last token stands two before its first embedding
HEADS = (1, 0, 2)  # the head of each layer that is told where to look: any would do
SMALLEST = 1e-6  # share of attention below which the logarithm stays


@torch.no_grad()
def prefer_alike(model: Any) -> None:
    """Begin the second layer with equal keys and queries, so that alike tokens attend to each other from the start."""
    attention = model.model.language_model.layers[1].self_attn
    size = attention.head_dim
    attention.k_proj.weight.copy_(attention.q_proj.weight[HEADS[1] * size : (HEADS[1] + 1) * size])


def guidance(model: Any, rows: Rows, seen: torch.Tensor, output: Any, first: int, width: int) -> torch.Tensor:
    """Sum of the five losses, in nats.

    Args:
        model: A `Gemma3ForConditionalGeneration` of three layers, eager attention.
        rows: Episodes with categories.
        seen: Who sees whom in the second layer. Shape: [B, L, L], bool.
        output: What `tiny_layout.forward` returned.
        first: Id of the first category's first embedding.
        width: Embeddings of a category.
    """
    wanted = positions(rows, seen, first, width)
    losses = [look(layer[:, head], where) for layer, head, where in zip(output.attentions, HEADS, wanted, strict=True)]
    _, second, third, _ = output.hidden_states  # the inputs of the layers, and the output
    row, place = (rows.ids >= first).nonzero(as_tuple=True)
    own = rows.ids[row, place - (rows.ids[row, place] - first) % width - NAME_BEFORE]
    losses.append(hold(model, second[row, place], own))
    found = wanted[1].any(-1)
    losses.append(hold(model, third[found], rows.names[found]))
    return torch.stack(losses).sum()


def positions(rows: Rows, seen: torch.Tensor, first: int, width: int) -> list[torch.Tensor]:
    """Where the tokens of each layer have to look; nowhere where a layer is told nothing. Three of [B, L, L], bool."""
    category = ((rows.ids - first) // width).where(rows.ids >= first, NONE)
    begins = (rows.ids >= first) & ((rows.ids - first) % width == 0)
    name_of = torch.roll(category.where(begins, NONE), -NAME_BEFORE, dims=1)
    to_name = (category >= 0)[:, :, None] & (category[:, :, None] == name_of[:, None])
    to_alike = rows.images[:, :, None] & (rows.categories[:, :, None] == category[:, None]) & seen
    says_name = torch.roll(rows.targets & (rows.ids == rows.names), -1, dims=1)
    own = rows.parts[:, :, None] == rows.parts[:, None]
    return [to_name, to_alike, says_name[:, :, None] & rows.images[:, None] & own]


def look(attention: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean negative logarithm of the attention that goes where it is wanted.

    Args:
        attention: Of one head. Shape: [B, L, L].
        wanted: Shape: [B, L, L], bool; a token that wants nothing does not count.

    >>> round(float(look(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[[False, False], [True, False]]]))), 4)
    0.6931
    """
    share = (attention * wanted).sum(-1)[wanted.any(-1)]
    return -share.clamp(min=SMALLEST).log().mean()


def hold(model: Any, hidden: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of names, read from outputs of an inner layer. Shape: [tokens, D], [tokens] -> []."""
    return F.cross_entropy(model.lm_head(model.model.language_model.norm(hidden)), names)


# Pre-training of the tiny Gemma 3 from scratch: captions of rendered pictures, then ALERT's episodes.
#
# Stage 1 teaches the vision tower to read. Stage 2 teaches the meta-task prompt: 2 to 8 digits or garments with names
# and embeddings, then an input image of one of them. A category's embedding is made as ALERT initialises it (section
# 3.2): the projection of the vision tower's mean output over a few images. In part of the episodes any word is any
# category's name, so that only comparing with the embeddings tells which. Everything here is our choice.
#
# Shapes: N images, E categories, m tokens of an image, D width.

CAPTION_STEPS, CAPTION_ROWS = 600, 64
EPISODE_STEPS, EPISODE_ROWS, IMAGES_PER_ROW = 2600, 4, 6
REFERENCES = (2, 2, 3, 3, 4, 4, 5, 6, 7, 8)  # how many categories a prompt lists, drawn anew in every step
SUPPORT = (1, 2, 4, 8)  # images that a category's embedding is the mean of
CAPTION_SHARE = 0.1  # of the steps of stage 2, so that reading is not forgotten
LEARNING_RATE, WARMUP_STEPS, DECAY_SHARE = 2e-3, 50, 0.4
TRUE_NAMES = 0.4  # share of the steps of stage 2 in which categories are called by their names
BLENDED, BLEND = 0.4, (0.3, 0.6)  # share of input images that are mixed with an unlisted category, and its weight
GUIDANCE = 0.5  # weight beside the loss of the replies
SLOPPY = 0.3  # share of replies that ignore the requested tags


def pretrain(model: Any, processor: Any, seed: int = 0) -> Any:
    """Train `model` in place on rendered digits and garments and return it in evaluation mode."""
    total = CAPTION_STEPS + EPISODE_STEPS
    for _ in progress(losses(model, processor, seed), "pre-training the tiny model", total):
        pass
    return model.eval()


def losses(model: Any, processor: Any, seed: int) -> Iterator[float]:
    """Make one update at a time and yield its loss (nats per reply token): AdamW, warm-up, plateau, linear decay."""
    episodes = Episodes(model, processor, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    total = CAPTION_STEPS + EPISODE_STEPS
    model.set_attn_implementation({"text_config": "eager"})  # which returns the attentions
    prefer_alike(model)
    model.train()
    for step in range(total):
        rate = min(1.0, (step + 1) / WARMUP_STEPS, 0.02 + (total - step) / (DECAY_SHARE * total))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        captions = step < CAPTION_STEPS or episodes.rng.random() < CAPTION_SHARE
        loss = episodes.captions() if captions else episodes.meta_tasks()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


class Episodes:
    """Draws batches of rendered pictures with texts, and computes their loss."""

    def __init__(self, model: Any, processor: Any, seed: int) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.images, self.rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.pictures = Pictures(IMAGE_SIZE, self.images)
        self.first = int(model.get_input_embeddings().num_embeddings)

    def captions(self) -> torch.Tensor:
        """Loss of naming single pictures: no text but the name."""
        shown = [self.rng.choice(CLASSES) for _ in range(CAPTION_ROWS)]
        beginning, image = self.prompt("", ())
        rows = [Row(beginning, image, [self.ids(name)], [0], [self.name(name)]) for name in shown]
        return self.loss(rows, self.render(shown), None)

    def meta_tasks(self) -> torch.Tensor:
        """Loss of choosing among reference categories; all rows have as many and share one bank."""
        support, count = self.rng.choice(SUPPORT), self.rng.choice(REFERENCES)
        true_names, kind = self.rng.random() < TRUE_NAMES, self.rng.choice(KINDS)
        outputs = self.tower(self.render([name for name in kind for _ in range(support)]))
        bank = self.model.model.multi_modal_projector(outputs.unflatten(0, (len(kind), support)).mean(1))  # [E, m, D]
        rows = [self.episode(kind, count, true_names) for _ in range(EPISODE_ROWS)]
        unlisted = [self.rng.choice(self.unlisted(row, len(kind))) for row in rows for _ in row.categories]
        asked = [category for row in rows for category in row.categories]
        return self.loss(rows, self.blend([kind[number] for number in asked], [kind[n] for n in unlisted]), bank)

    def episode(self, kind: Sequence[str], count: int, true_names: bool) -> Row:
        """A prompt with `count` reference categories, and replies to some images of them."""
        listed = draw(kind, count, true_names, self.rng)
        shown = [self.rng.choice(listed) for _ in range(IMAGES_PER_ROW)]
        replies = [reply(one, [other for other in listed if other != one], SLOPPY, self.rng) for one in shown]
        text = meta_task([reference.name for reference in listed], "short")
        beginning, image = self.prompt(text, [kind.index(reference.shown) for reference in listed])
        return Row(
            beginning,
            image,
            [self.ids(text) for text in replies],
            [kind.index(one.shown) for one in shown],
            [self.name(one.name) for one in shown],
        )

    def unlisted(self, row: Row, categories: int) -> list[int]:
        """Those of the bank's categories that a row's prompt does not list."""
        listed = {(token - self.first) // IMAGE_TOKENS for token in row.beginning if token >= self.first}
        return [number for number in range(categories) if number not in listed]

    def loss(self, rows: Sequence[Row], images: torch.Tensor, bank: torch.Tensor | None) -> torch.Tensor:
        """Loss of rows with their input images [N, 1, S, S]; with guidance where there is a bank."""
        model, first = self.model, self.first
        laid_out = lay_out(rows, model.config.image_token_id, self.tokenizer.pad_token_id)
        seen = visible(laid_out, model.config.text_config.sliding_window)
        features = model.model.multi_modal_projector(self.tower(images))
        output = forward(model, laid_out, seen, bank, features, first)
        loss = reply_loss(model, laid_out, output.last_hidden_state)
        if bank is None:
            return loss
        return loss + GUIDANCE * guidance(model, laid_out, seen["sliding_attention"], output, first, IMAGE_TOKENS)

    def name(self, name: str) -> int:
        """Id of a name inside a text."""
        return int(self.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][-1])

    def ids(self, text: str) -> list[int]:
        """Ids of a reply, its end of turn included."""
        return list(self.tokenizer(text + END, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str, categories: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of a prompt up to its input image, and from there on."""
        chat = self.processor.apply_chat_template(
            messages(Prompt("", text, "", image_last=True)), tokenize=False, add_generation_prompt=True
        )
        whole = Gemma3.image_text(chat).replace(IMAGE["image_token"], IMAGE["image_token"] * IMAGE_TOKENS)
        marked = whole.replace(CATEGORY, self.tokenizer.pad_token)
        ids = torch.tensor(self.tokenizer(marked, add_special_tokens=False)["input_ids"])
        ids = expand_placeholders(ids, self.tokenizer.pad_token_id, categories, self.first, IMAGE_TOKENS)
        start = int((ids == self.model.config.boi_token_index).nonzero()[0, 0])
        return ids[:start].tolist(), ids[start:].tolist()

    def render(self, names: Sequence[str]) -> torch.Tensor:
        """Fresh images of classes. Shape: [N, 1, S, S], in [0, 1]."""
        return self.pictures(torch.tensor([CLASSES.index(name) for name in names]))

    def blend(self, names: Sequence[str], unlisted: Sequence[str]) -> torch.Tensor:
        """Images of classes, some mixed with one that the prompt does not list: without its list nobody could tell.

        Shape: [N, 1, S, S], in [0, 1].
        """
        low, high = BLEND
        weight = low + (high - low) * torch.rand(len(names), 1, 1, 1, generator=self.images)
        weight = weight * (torch.rand(weight.shape, generator=self.images) < BLENDED)
        return (1 - weight) * self.render(names) + weight * self.render(unlisted)

    def tower(self, images: torch.Tensor) -> torch.Tensor:
        """The vision tower's outputs. Shape: [N, 1, S, S] -> [N, patches, width of the tower]."""
        return self.model.model.vision_tower(pixel_values=pixels(images)).last_hidden_state


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Images [N, 1, S, S] in [0, 1] as `Gemma3ImageProcessor` makes them. Shape: [N, 3, S, S], in [-1, 1]."""
    return 2 * images.expand(-1, 3, -1, -1) - 1
