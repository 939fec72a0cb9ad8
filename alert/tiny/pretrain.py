"""Pre-train the tiny Gemma 3 from scratch: captions of rendered images, then ALERT's episodes with guided attention."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from alert.prompt import meta_task
from alert.tiny.episodes import draw, reply
from alert.tiny.layout import NONE, Row, Rows, forward, lay_out, reply_loss, visible
from common.models.extra_embeddings import expand_placeholders
from common.models.families import Gemma3
from common.models.meter import messages
from common.models.tiny.gemma3 import END, IMAGE, IMAGE_TOKENS
from common.models.tiny.pictures import Pictures
from common.models.tiny.qwen2_vl import IMAGE_SIZE
from common.models.tiny.wordings import CLASSES, KINDS
from common.runtime.progress import progress
from common.types import CATEGORY, Prompt

# Guidance: auxiliary losses that teach a model of three layers to compare. By next-token prediction alone it did not
# learn that within minutes.
#
# Comparing takes three steps, each useless without the others: (1) a category's embeddings copy the name before them;
# (2) the input image attends to the embeddings that resemble it and copies their name; (3) the reply copies the name
# from the image. Each layer is supervised on one step: where one of its heads attends, and, for the first two, which
# name its output encodes, read with the model's own output projection ("deep supervision", Lee et al. 2015, arXiv
# 1409.5185). Our choice; pre-training only.
#
# Shapes: B rows, L tokens of the longest row, D width, V vocabulary.


NAME_BEFORE = 2  # "six ▁ <category>": a name's last token is two positions before its first embedding
HEADS = (1, 0, 2)  # supervised head of each layer; the choice is arbitrary
SMALLEST = 1e-6  # lower bound of attention in the logarithm


@torch.no_grad()
def prefer_alike(model: Any) -> None:
    """Initialise the second layer with equal key and query weights, so that similar tokens attend to each other."""
    attention = model.model.language_model.layers[1].self_attn
    size = attention.head_dim
    attention.k_proj.weight.copy_(attention.q_proj.weight[HEADS[1] * size : (HEADS[1] + 1) * size])


def guidance(model: Any, rows: Rows, seen: torch.Tensor, output: Any, first: int, width: int) -> torch.Tensor:
    """Return the sum of the five auxiliary losses, in nats.

    Args:
        model: A `Gemma3ForConditionalGeneration` of three layers, eager attention.
        rows: Episodes with categories.
        seen: Attention mask of the second layer. Shape: [B, L, L], bool.
        output: Result of `layout.forward`.
        first: Id of the first category's first embedding.
        width: Number of embeddings of a category.
    """
    wanted = positions(rows, seen, first, width)
    losses = [look(layer[:, head], where) for layer, head, where in zip(output.attentions, HEADS, wanted, strict=True)]
    _, second, third, _ = output.hidden_states  # the inputs of the layers, and the output
    row, place = (rows.ids >= first).nonzero(as_tuple=True)
    # the name token before the first embedding of each category token's entry
    own = rows.ids[row, place - (rows.ids[row, place] - first) % width - NAME_BEFORE]
    losses.append(hold(model, second[row, place], own))
    found = wanted[1].any(-1)
    losses.append(hold(model, third[found], rows.names[found]))
    return torch.stack(losses).sum()


def positions(rows: Rows, seen: torch.Tensor, first: int, width: int) -> list[torch.Tensor]:
    """Return where the tokens of each layer should attend; nowhere for unsupervised tokens. Three [B, L, L], bool."""
    category = ((rows.ids - first) // width).where(rows.ids >= first, NONE)
    begins = (rows.ids >= first) & ((rows.ids - first) % width == 0)
    name_of = torch.roll(category.where(begins, NONE), -NAME_BEFORE, dims=1)
    to_name = (category >= 0)[:, :, None] & (category[:, :, None] == name_of[:, None])
    to_alike = rows.images[:, :, None] & (rows.categories[:, :, None] == category[:, None]) & seen
    says_name = torch.roll(rows.targets & (rows.ids == rows.names), -1, dims=1)
    own = rows.parts[:, :, None] == rows.parts[:, None]
    return [to_name, to_alike, says_name[:, :, None] & rows.images[:, None] & own]


def look(attention: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean negative logarithm of the attention on the wanted positions.

    Args:
        attention: Attention of one head. Shape: [B, L, L].
        wanted: Wanted positions; a token without any does not count. Shape: [B, L, L], bool.

    >>> round(float(look(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[[False, False], [True, False]]]))), 4)
    0.6931
    """
    share = (attention * wanted).sum(-1)[wanted.any(-1)]
    return -share.clamp(min=SMALLEST).log().mean()


def hold(model: Any, hidden: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of names read from outputs of an inner layer. Shape: [tokens, D], [tokens] -> []."""
    return F.cross_entropy(model.lm_head(model.model.language_model.norm(hidden)), names)


# Training. Stage 1 teaches the vision tower to read. Stage 2 teaches the meta-task prompt: 2 to 8 digits or garments
# with names and embeddings, then an input image of one of them. A category's embedding is made as ALERT initialises it
# (section 3.2): the projection of the vision tower's mean output over a few images. In part of the episodes names are
# random, so that only a comparison with the embeddings gives the answer. Everything here is our choice.
#
# Shapes: N images, E categories, m tokens of an image, D width.

CAPTION_STEPS, CAPTION_ROWS = 600, 64
EPISODE_STEPS, EPISODE_ROWS, IMAGES_PER_ROW = 2600, 4, 6
REFERENCES = (2, 2, 3, 3, 4, 4, 5, 6, 7, 8)  # numbers of listed categories, drawn anew in every step
SUPPORT = (1, 2, 4, 8)  # numbers of images over which a category's embedding is averaged
CAPTION_SHARE = 0.1  # share of caption steps in stage 2, against forgetting
LEARNING_RATE, WARMUP_STEPS, DECAY_SHARE = 2e-3, 50, 0.4
TRUE_NAMES = 0.4  # share of the steps of stage 2 in which categories have their own names
BLENDED, BLEND = 0.4, (0.3, 0.6)  # share of input images that are mixed with an unlisted category, and its weight
GUIDANCE = 0.5  # weight of the auxiliary losses
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
    model.set_attn_implementation({"text_config": "eager"})  # the implementation that returns attentions
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
    """Draws batches of rendered images with texts, and computes their loss."""

    def __init__(self, model: Any, processor: Any, seed: int) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.images, self.rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.pictures = Pictures(IMAGE_SIZE, self.images)
        self.first = int(model.get_input_embeddings().num_embeddings)

    def captions(self) -> torch.Tensor:
        """Return the loss of naming single images: the only text is the name."""
        shown = [self.rng.choice(CLASSES) for _ in range(CAPTION_ROWS)]
        beginning, image = self.prompt("", ())
        rows = [Row(beginning, image, [self.ids(name)], [0], [self.name(name)]) for name in shown]
        return self.loss(rows, self.render(shown), None)

    def meta_tasks(self) -> torch.Tensor:
        """Return the loss of choosing among reference categories; all rows list equally many and share one bank."""
        support, count = self.rng.choice(SUPPORT), self.rng.choice(REFERENCES)
        true_names, kind = self.rng.random() < TRUE_NAMES, self.rng.choice(KINDS)
        outputs = self.tower(self.render([name for name in kind for _ in range(support)]))
        bank = self.model.model.multi_modal_projector(outputs.unflatten(0, (len(kind), support)).mean(1))  # [E, m, D]
        rows = [self.episode(kind, count, true_names) for _ in range(EPISODE_ROWS)]
        unlisted = [self.rng.choice(self.unlisted(row, len(kind))) for row in rows for _ in row.categories]
        asked = [category for row in rows for category in row.categories]
        return self.loss(rows, self.blend([kind[number] for number in asked], [kind[n] for n in unlisted]), bank)

    def episode(self, kind: Sequence[str], count: int, true_names: bool) -> Row:
        """Build a prompt with `count` reference categories, and replies to some images of them."""
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
        """Return the categories of the bank that a row's prompt does not list."""
        listed = {(token - self.first) // IMAGE_TOKENS for token in row.beginning if token >= self.first}
        return [number for number in range(categories) if number not in listed]

    def loss(self, rows: Sequence[Row], images: torch.Tensor, bank: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of rows with their input images [N, 1, S, S]; with guidance where there is a bank."""
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
        """Return the id of a name inside a text."""
        return int(self.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][-1])

    def ids(self, text: str) -> list[int]:
        """Return the ids of a reply, its end of turn included."""
        return list(self.tokenizer(text + END, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str, categories: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt up to its input image, and from there on."""
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
        """Render new images of classes. Shape: [N, 1, S, S], in [0, 1]."""
        return self.pictures(torch.tensor([CLASSES.index(name) for name in names]))

    def blend(self, names: Sequence[str], unlisted: Sequence[str]) -> torch.Tensor:
        """Render images of classes, some blended with an unlisted class, which only the list of names rules out.

        Shape: [N, 1, S, S], in [0, 1].
        """
        low, high = BLEND
        weight = low + (high - low) * torch.rand(len(names), 1, 1, 1, generator=self.images)
        weight = weight * (torch.rand(weight.shape, generator=self.images) < BLENDED)
        return (1 - weight) * self.render(names) + weight * self.render(unlisted)

    def tower(self, images: torch.Tensor) -> torch.Tensor:
        """Return the vision tower's outputs. Shape: [N, 1, S, S] -> [N, patches, width of the tower]."""
        return self.model.model.vision_tower(pixel_values=pixels(images)).last_hidden_state


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Scale images [N, 1, S, S] in [0, 1] like `Gemma3ImageProcessor`. Shape: [N, 3, S, S], in [-1, 1]."""
    return 2 * images.expand(-1, 3, -1, -1) - 1
