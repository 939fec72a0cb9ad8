"""A checkpoint as files: finding it, checking it, hashing it, measuring prompts with it. No torch needed.

These checks run before every job, so that a missing file or an over-long prompt costs a second and not a training run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.models.families import FAMILIES
from common.plugins import locate
from common.types import CATEGORY, Prompt, UserError

NEEDED = ("config.json", "tokenizer.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CHUNK = 1024  # conversations that are encoded together: a token takes some hundred bytes meanwhile
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # as PEFT writes them


def find(path: str, revision: str | None, weights: bool = True, key: str = "model.path") -> Path:
    """A local folder as it is; anything else is a hub id, fetched into the Hugging Face cache.

    Args:
        path: Folder, or `owner/name` on the hub.
        revision: Commit or branch on the hub.
        weights: False fetches everything but the weights, enough for all checks of a prompt.
        key: Of the configuration, for errors.

    Raises:
        UserError: The folder is missing or damaged, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return folder.resolve()  # results and adapters name it, and must not depend on where the run was started
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{key}={path} is not a folder; give a checkpoint folder or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    names = ["*.json", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=names))
    except Exception as error:
        raise UserError(
            f"{key}={path} is neither a local folder nor reachable on the hub ({type(error).__name__}); download"
            f" it where there is a network (hf download {path}; if it is gated, hf auth login first) and pass"
            f" {key}=<folder>"
        ) from error


def on_hub(path: str | None, folder: Path) -> tuple[str, str] | None:
    """Id and commit of a checkpoint on the hub; None of a local or built one.

    Args:
        path: As it was given to `find`; None: it was built.
        folder: What `find` returned; of the hub, `snapshots/<commit>` in its cache.
    """
    if path is None or Path(path).expanduser().is_dir() or folder.parent.name != "snapshots":
        return None
    return path, folder.name


def check_folder(folder: Path) -> None:
    """Check that the files of a checkpoint, or of adapters, are there and whole.

    Raises:
        UserError: Names the file at fault.
    """
    adapters = (folder / ADAPTERS[0]).is_file()
    for name in ADAPTERS[:1] if adapters else NEEDED:
        if not (folder / name).is_file():
            raise UserError(f"checkpoint {folder} has no {name}; it must be a folder written by save_pretrained")
        try:
            json.loads((folder / name).read_text())
        except ValueError as error:
            raise UserError(f"checkpoint {folder}: {name} is damaged ({error}); copy or build it again") from error
    shards = [folder / ADAPTERS[1]] if adapters else weight_files(folder)
    if not shards:
        raise UserError(f"checkpoint {folder} has none of {', '.join(WEIGHTS)}")
    for shard in shards:
        _check_safetensors(shard)


def lineage(folder: Path, weights: bool = True) -> list[Path]:
    """The whole checkpoint that a folder builds on, then the folders of adapters in the order of their training.

    A run with adapters writes only these; where their base lies, stands in their adapter_config.json.

    Args:
        folder: From `find`. A whole checkpoint is its own lineage.
        weights: False: a base on the hub is fetched without its weights.

    Raises:
        UserError: A base is missing or damaged.
    """
    path = folder / ADAPTERS[0]
    if not path.is_file():
        return [folder]
    settings = json.loads(path.read_text())
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str):
        raise UserError(f"{path} does not say on which checkpoint the adapters belong (base_model_name_or_path)")
    try:
        return [*lineage(find(base, revision, weights), weights), folder]
    except UserError as error:
        raise UserError(
            f"checkpoint {folder} holds adapters for {base}, which cannot be used ({error}); put that checkpoint there"
            f" or correct base_model_name_or_path in {path.name}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; empty if there are none."""
    index = folder / WEIGHTS[1]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"checkpoint {folder}: {index.name} is damaged; copy or build it again") from error
        return [folder / name for name in sorted(names)]
    single = folder / WEIGHTS[0]
    return [single] if single.is_file() else []


def _check_safetensors(path: Path) -> None:
    """The header of a safetensors file says how long the file must be."""
    if not path.is_file():
        raise UserError(f"checkpoint shard {path} is missing")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size) if size < 100_000_000 else b"")
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise UserError(
                f"checkpoint file {path} is damaged: no safetensors header; copy or build it again"
            ) from error
    expected = 8 + size + max(ends, default=1)
    if path.stat().st_size != expected:
        raise UserError(
            f"checkpoint file {path} is damaged: {path.stat().st_size} bytes instead of {expected};"
            " copy or build it again"
        )


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over the weights and the tokenizer, adapters and their base alike; part of every result."""
    base, *adapters = lineage(folder)
    total = hashlib.sha256()
    for path in [*weight_files(base), base / "tokenizer.json", *(each / ADAPTERS[1] for each in adapters)]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    for each in adapters:  # the same matrices count differently with another scale; where the base lies does not matter
        settings = json.loads((each / ADAPTERS[0]).read_text()) | {"base_model_name_or_path": None, "revision": None}
        total.update(json.dumps(settings, sort_keys=True).encode())
    return total.hexdigest()


class PromptMeter:
    """Counts the tokens of prompts as the processor will make them, from the files alone."""

    def __init__(
        self,
        family: str,
        config: dict[str, Any],
        tokenizer: Any,
        template: str,
        begin: str | None = None,
        pad: str = "",
    ) -> None:
        """
        Args:
            family: Key of FAMILIES.
            config: The checkpoint's config.json.
            tokenizer: A `tokenizers.Tokenizer`.
            template: Chat template.
            begin: The token that templates write as `bos_token`, if the checkpoint has one.
            pad: The padding token; it marks the places of category embeddings.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.family, self.config, self.tokenizer = FAMILIES[family], config, tokenizer
        # the settings of transformers' apply_chat_template
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "bos_token": begin or ""}
        self.template, self.pad = environment.from_string(template), pad

    def tokens(self, prompts: Iterable[Prompt], image_size: int) -> list[int]:
        """Length of each prompt in tokens, its image and its category embeddings included.

        A conversation that many images share, as most methods' do, is measured once.
        """
        prompts = list(prompts)
        distinct = list({_conversation(prompt): prompt for prompt in prompts}.values())
        lengths: dict[tuple[str | None, str, bool], int] = {}
        for start in range(0, len(distinct), CHUNK):
            part = distinct[start : start + CHUNK]
            rendered = (self.template.render(messages=messages(p), add_generation_prompt=True) for p in part)
            texts = [self.family.image_text(text).replace(CATEGORY, self.pad) for text in rendered]
            found = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            lengths |= {_conversation(p): len(each.ids) for p, each in zip(part, found, strict=True)}
        extra = self.family.image_tokens(self.config, image_size) - 1  # the template writes one placeholder
        # a category has as many embeddings as an image has tokens
        return [lengths[_conversation(p)] + extra * (1 + len(p.categories)) for p in prompts]


def _refuse(message: str) -> None:
    raise UserError(f"the checkpoint's chat template refuses this prompt: {message}")


def meter_for_folder(folder: Path, family: str) -> PromptMeter:
    """The prompt meter of a checkpoint folder; of adapters, that of their base."""
    from tokenizers import Tokenizer

    folder = lineage(folder, weights=False)[0]

    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != family or "vision_config" not in config:
        raise UserError(f"checkpoint {folder} is of type {config.get('model_type')}, but model.family={family}")
    template = folder / "chat_template.jinja"
    text = template.read_text() if template.is_file() else _template_from_json(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"checkpoint {folder}: tokenizer.json is damaged ({error}); copy or build it again") from error
    begin, pad = (_special_token(folder, name) for name in ("bos_token", "pad_token"))
    return PromptMeter(family, config, tokenizer, text, begin, pad or "")


def _special_token(folder: Path, name: str) -> str | None:
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()).get(name) if path.is_file() else None
    return found["content"] if isinstance(found, dict) else found


def _template_from_json(folder: Path) -> str:
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and isinstance(text := json.loads(path.read_text()).get("chat_template"), str):
            return text
    raise UserError(f"checkpoint {folder} has no chat template (chat_template.jinja)")


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The conversation of one prompt: an optional system message, then image and question."""
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    user = {"role": "user", "content": content[::-1] if prompt.image_last else content}
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    return [*system, user]


def _conversation(prompt: Prompt) -> tuple[str | None, str, bool]:
    """What `messages` reads of a prompt."""
    return prompt.system, prompt.text, prompt.image_last


def too_long(length: int, limit: int, prompt: Prompt) -> UserError:
    """The error for a prompt over the limit."""
    return UserError(
        f"the prompt of image {prompt.image} has {length} tokens, but model.max_prompt_tokens={limit}; prompts are"
        f" never cut: raise the limit or list fewer names"
    )


def build(recipe: str, cache_dir: str) -> Path:
    """Run the `build` function of a recipe module, or return its cached result."""
    folder = Path(locate(f"{recipe}.build", "model.recipe")(Path(cache_dir).resolve()))
    check_folder(folder)
    return folder


def meter_for_recipe(recipe: str) -> PromptMeter:
    """The prompt meter of a model that may not be built yet: its recipe's `meter` function."""
    meter = locate(f"{recipe}.meter", "model.recipe")()
    assert isinstance(meter, PromptMeter)
    return meter
