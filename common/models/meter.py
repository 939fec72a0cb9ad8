"""Measure prompts in tokens from the files of a model alone, without torch and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.models.families import Family
from common.models.families import family as family_of
from common.models.files import lineage, of_recipe
from common.types import CATEGORY, Prompt, UserError

CHUNK = 1024  # conversations encoded together; bounds the memory of encodings, some hundred bytes per token


class PromptMeter:
    """Token counts of prompts, equal to the lengths that the processor will produce."""

    def __init__(
        self,
        family: str,
        config: dict[str, Any],
        tokenizer: Any,
        template: str,
        begin: str | None = None,
        pad: str = "",
        smallest: int = 0,
    ) -> None:
        """
        Args:
            family: Name of the model family, see `families.family`.
            config: Content of the model's config.json.
            tokenizer: A `tokenizers.Tokenizer`.
            template: Chat template.
            begin: Token that templates write as `bos_token`, if the model has one.
            pad: Padding token; it marks the places of category embeddings.
            smallest: Side of the smallest image that is not enlarged, see `Family.smallest`.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.family: type[Family] = family_of(family)
        self.config, self.tokenizer = config, tokenizer
        # same settings as in transformers' apply_chat_template, so that whitespace is the same
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "bos_token": begin or ""}
        with _template():
            self.template = environment.from_string(template)
        self.pad, self.smallest = pad, smallest
        self._special: tuple[str, ...] | None = None

    def tokens(self, prompts: Iterable[Prompt], image_size: int) -> list[int]:
        """Return the length of each prompt in tokens, image and category embeddings included.

        In most methods many images share a conversation; it is measured once.
        """
        prompts = list(prompts)
        distinct = list({_conversation(prompt): prompt for prompt in prompts}.values())
        lengths: dict[tuple[str | None, str, bool, str], int] = {}
        for start in range(0, len(distinct), CHUNK):
            part = distinct[start : start + CHUNK]
            with _template():
                rendered = [
                    self.template.render(messages=messages(p, self.family), add_generation_prompt=True) + p.begun
                    for p in part
                ]
            texts = [self.family.image_text(text).replace(CATEGORY, self.pad) for text in rendered]
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            lengths |= {_conversation(p): len(each.ids) for p, each in zip(part, encodings, strict=True)}
        extra = self.family.image_tokens(self.config, image_size) - 1  # the template writes one placeholder
        # a category has as many embeddings as an image has tokens
        return [lengths[_conversation(p)] + extra * (1 + len(p.categories)) for p in prompts]

    def special_token(self, text: str) -> str | None:
        """Return the first special token in a text, such as `<|im_end|>`; None if there is none.

        The tokenizer would encode it as the end of a turn, an image or padding instead of as text.
        """
        if self._special is None:
            added = self.tokenizer.get_added_tokens_decoder().values()
            self._special = tuple(token.content for token in added if token.special)
        return min((token for token in self._special if token in text), key=text.find, default=None)

    @property
    def context(self) -> int | None:
        """Return the context length, prompt and completion together; None if config.json does not give it."""
        values = {**self.config, **self.config.get("text_config", {})}
        return values.get("max_position_embeddings")

    def over(self, prompts: Sequence[Prompt], image_size: int, limit: int) -> tuple[int, Prompt] | None:
        """Return length and prompt of the longest one if it is over the limit, else None.

        A text has at most as many tokens as bytes, so only texts that could be too long are tokenized.
        """
        # one prompt per system message, image position and begun reply: its length bounds what is added to any text
        kinds = list({(prompt.system, prompt.image_last, prompt.begun): prompt for prompt in prompts}.values())
        around = max(self.tokens(kinds, image_size), default=0)
        category = self.family.image_tokens(self.config, image_size)
        most = [around + len(p.text.encode()) + category * len(p.categories) for p in prompts]
        long = [prompt for prompt, tokens in zip(prompts, most, strict=True) if tokens > limit]
        found = zip(self.tokens(long, image_size), long, strict=True)
        longest = max(found, key=lambda each: each[0], default=None)
        return longest if longest is not None and longest[0] > limit else None


@contextmanager
def _template() -> Iterator[None]:
    """Turn errors of a chat template (a mistake, or something that the sandbox forbids) into a UserError."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise UserError(f"the model's chat template cannot be used: {error}") from error


def _refuse(message: str) -> None:
    raise UserError(f"the model's chat template refuses this prompt: {message}")


def of_folder(folder: Path, family: str) -> PromptMeter:
    """Return the prompt meter of a model folder; for a folder of adapters, that of their base."""
    from tokenizers import Tokenizer

    folder = lineage(folder, weights=False)[0]

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != family_of(family).model_type or "vision_config" not in config:
        raise UserError(f"model {folder} is of type {config.get('model_type')}, but model.family={family}")
    family_of(family).check(config)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else _template_from_json(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"model {folder}: tokenizer.json is damaged ({error}); copy or build it again") from error
    begin, pad = (_special_token(folder, name) for name in ("bos_token", "pad_token"))
    smallest = family_of(family).smallest(_processor(folder))
    return PromptMeter(family, config, tokenizer, text, begin, pad or "", smallest)


def _processor(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's image processor; empty if it has none."""
    # newer versions of transformers save all processors in the second file
    for name, inner in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if found := content if inner is None else content.get(inner):
                return dict(found)
    return {}


def of_a_recipe(recipe: str) -> PromptMeter:
    """Return the prompt meter of a recipe, whose model need not be built yet."""
    meter = of_recipe(recipe, "meter")()
    assert isinstance(meter, PromptMeter)
    return meter


def _special_token(folder: Path, name: str) -> str | None:
    path = folder / "tokenizer_config.json"
    token = json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    return token["content"] if isinstance(token, dict) else token


def _template_from_json(folder: Path) -> str:
    # older versions of transformers saved the template in one of these
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and isinstance(
            text := json.loads(path.read_text(encoding="utf-8")).get("chat_template"), str
        ):
            return text
    raise UserError(f"model {folder} has no chat template (chat_template.jinja)")


def messages(prompt: Prompt, family: type[Family] = Family) -> list[dict[str, Any]]:
    """Return the conversation of one prompt: an optional system message, then image and question.

    `family`: that of the model whose chat template renders it.
    """
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    user = {"role": "user", "content": content[::-1] if prompt.image_last else content}
    system = [] if prompt.system is None else [{"role": "system", "content": family.content(prompt.system)}]
    return [*system, user]


def _conversation(prompt: Prompt) -> tuple[str | None, str, bool, str]:
    """Return the parts of a prompt that become text."""
    return prompt.system, prompt.text, prompt.image_last, prompt.begun


def room(longest: int, completion: int, context: int | None) -> int:
    """Return the tokens that an engine reserves for a prompt: a power of two, so that somewhat longer ones fit, too.

    Args:
        longest: Length of the longest known prompt, in tokens.
        completion: Length of the longest completion, in tokens.
        context: Context length, see `PromptMeter.context`.

    >>> room(700, 64, None), room(1178, 1024, 32768), room(1178, 64, 2048)
    (1024, 2048, 1984)
    """
    size = max(1024, 1 << (longest - 1).bit_length())
    return size if context is None else max(longest, min(size, context - completion))


def too_long(length: int, limit: int, prompt: Prompt) -> UserError:
    """Return the error for a prompt over the limit."""
    return UserError(
        f"the prompt of image {prompt.image} has {length} tokens, but model.max_prompt_tokens={limit}; prompts are"
        f" never cut: raise the limit or list fewer names"
    )
