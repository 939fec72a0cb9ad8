"""Export a run as a folder for others: model, adapter or embeddings, prompt, model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from common.config import trust
from common.config.schema import NO_FAMILY, Config, LoraConfig, ModelConfig
from common.export import image_model
from common.export.card import write_card
from common.learner import learner_class
from common.models import vlm
from common.models.families import Family, family
from common.models.files import ADAPTERS, check_links, weights_folder
from common.models.meter import messages
from common.models.vlm import VLM
from common.predict.classifier import Classifier
from common.predict.trained_model import RECORDS, TrainedModel, config_of, data_of
from common.run.result import Result
from common.types import Item, Prompt, UserError
from common.vlm import prompting
from common.vlm.learner import VLMLearner
from common.vlm.prompting import Words

# Weights as plain files, which transformers and vLLM load and which answer as the run's own model does.


def merged(policy: VLM) -> VLM:
    """Return the model with its adapters merged into the weights."""
    model = policy.model
    return replace(policy, model=model.merge_and_unload()) if hasattr(model, "merge_and_unload") else policy


def save(policy: VLM, folder: Path, never: Collection[int], max_tokens: int) -> None:
    """Write a model and its processor.

    Args:
        policy: Model without adapters.
        folder: Folder to create.
        never: Token ids that the model must not generate.
        max_tokens: Maximum length of a reply.
    """
    generation = policy.model.generation_config
    generation.suppress_tokens = sorted(never)
    generation.max_new_tokens = max_tokens
    generation.do_sample = False
    generation.temperature = generation.top_k = generation.top_p = None
    vlm.complete(policy.model.config, policy)
    policy.model.save_pretrained(folder)
    as_on_the_hub(folder, policy.family)
    policy.processor.save_pretrained(folder)


def as_on_the_hub(folder: Path, kind: type[Family]) -> None:
    """Rename the weights in a folder to their names on the hub, the only ones vLLM knows (Gemma's vision tower)."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {kind.hub_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            changed, facts = set(tensors) != set(file.keys()), file.metadata()
        if changed:
            save_file(tensors, path, metadata=facts)
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {kind.hub_name(name): where for name, where in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


# The exported folder.

ASKING = "asking.json"


def export(
    run: Path, target: Path, kind: str | None = None, licence: str | None = None, trust_code: bool = False
) -> None:
    """Write what a run has trained into a new folder.

    Args:
        run: Folder of a finished run.
        target: Folder to create.
        kind: `model` (whole weights; adapters are merged, embeddings become words of the vocabulary), `adapter` (of a
            run with model.lora), `bank` (ALERT's category embeddings), `onnx` or `torchscript` (a few-shot learner
            with its encoder, from pixels to probabilities); None: `onnx` of a few-shot learner, else `model`.
        licence: Licence of the weights, as the hub spells it; None: that of the run's base model.
        trust_code: Allow the run's configuration to name code of other packages than this project; it is run.

    Raises:
        UserError: The run is not finished or has nothing of the kind, names foreign code, or the folder exists.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; give a new folder")
    trained = TrainedModel.of(run, trust_code)
    check_links(trained.model)
    result = Result.load(trained.records)
    config = config_of(trained)
    is_few_shot = config.model.family == NO_FAMILY
    kind = kind or ("onnx" if is_few_shot else "model")
    if is_few_shot is not (kind in image_model.FILES):
        kinds = ", ".join(image_model.FILES if is_few_shot else WRITERS)
        raise UserError(f"--as {kind}: method={result.method} can be written as {kinds}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as place:
        parts = Path(place) / "model"  # renamed at the end, so that an incomplete export is not taken for a model
        parts.mkdir()
        if kind in image_model.FILES:
            with closing(Classifier.load(run, trust_code=trust_code)) as classifier:
                asking = image_model.write(classifier, kind, parts)
        else:
            asking = WRITERS[kind](trained, config, parts)
        write_card(parts, kind, result, config_of(trained, began=True), asking, licence)
        if target.exists():
            target.rmdir()
        parts.rename(target)


def _model(trained: TrainedModel, config: Config, target: Path) -> dict[str, Any]:
    values = {key: value for key, value in vars(config.model).items() if key != "lora"}
    settings = ModelConfig(**{**values, "lora": LoraConfig(), "load_in_8bit": False, "load_in_4bit": False})
    learner = learner_class(config)
    assert issubclass(learner, VLMLearner), "it has a language model"
    # settings without LoRA: the run's adapters are loaded and merged, no new ones are added
    policy = merged(vlm.load(weights_folder(config), settings, torch.device("cpu")))
    words = learner.into_vocabulary(config, policy, trained.model)
    # neither image placeholders nor category words may be generated
    never = {*policy.banned, *(() if words is None else words.ids)}
    save(policy, target, never, config.rollout.max_completion_tokens)
    asking = how_to_ask(trained, config, words)
    (target / ASKING).write_text(json.dumps(asking, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    kept = learner.kept_files(config, trained.model)
    if kept is None:  # the method cannot answer without its training images, so `Classifier` cannot load the export
        return asking
    for name in kept:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained.model / name, target / name)
    _write_records(trained, target / RECORDS)
    return asking


def _adapter(trained: TrainedModel, config: Config, target: Path) -> dict[str, Any]:
    if not (trained.model / ADAPTERS[0]).is_file():
        raise UserError(f"{trained.folder} has trained no adapters (model.lora.r=0); give --as model")
    shutil.copytree(
        trained.model, target, ignore=shutil.ignore_patterns(trained.embeddings.name, "README.md"), dirs_exist_ok=True
    )
    return {}


def _bank(trained: TrainedModel, config: Config, target: Path) -> dict[str, Any]:
    if not trained.embeddings.is_dir():
        raise UserError(f"{trained.folder} has trained no category embeddings; give --as model")
    shutil.copytree(trained.embeddings, target, dirs_exist_ok=True)
    return {}


WRITERS = {"model": _model, "adapter": _adapter, "bank": _bank}


def how_to_ask(trained: TrainedModel, config: Config, words: Words | None) -> dict[str, Any]:
    """Return what users need beside the weights: the conversation, the class names, how images are resized."""
    if words is None:
        prompt = _example(trained, config)
        facts: dict[str, Any] = {"names": list(prompt.choices)}
    else:
        prompt = words.example
        facts = {"names": list(words.of_names), "words": words.of_names}
    image = {"size": config.model.image_size, "how": config.model.resize, "background": config.data.background}
    begun = {"reply_begins": prompt.begun} if prompt.begun else {}
    return {**facts, "image": image, "messages": messages(prompt, family(config.model.family)), **begun}


def _example(trained: TrainedModel, config: Config) -> Prompt:
    task = data_of(trained, config).task
    (split,) = task.evaluation
    one = replace(task.evaluation[split], items=(Item("photo.jpg", -1, ""),))
    return prompting.of_config(config).evaluation_prompts(replace(task, evaluation={split: one}), split)[0]


def _write_records(trained: TrainedModel, folder: Path) -> None:
    """Write the files that `Classifier` reads, without names of images and paths of this machine."""
    folder.mkdir()
    values = trust.read(trained.records / "config.yaml")
    # drop what could reveal paths or persons, and what answers do not depend on
    values |= {"rewards": {}, "cache_dir": "cache", "label": None, "run_name": "exported"}
    values |= {"few_shot": None, "clip": None, "visual": None}
    values["data"] = _anywhere(values["data"])
    values["setting"]["targets"] = {name: _anywhere(one) for name, one in values["setting"]["targets"].items()}
    values["model"]["path"] = named(values["model"]["path"])
    values["method"] = {key: _here(value) for key, value in values["method"].items()}
    values["tracking"] |= {"group": None, "tags": [], "project": values["tracking"]["name"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    manifest = json.loads((trained.records / "manifest.json").read_text(encoding="utf-8"))
    splits = {name: {"names": split["names"]} for name, split in manifest["splits"].items()}
    kept = {"splits": splits, "fingerprint": manifest["fingerprint"], "origins": manifest["origins"]}
    (folder / "manifest.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    metrics = json.loads((trained.records / "metrics.json").read_text(encoding="utf-8"))
    metrics["weights"]["path"] = named(metrics["weights"]["path"])
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _anywhere(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, "root": None, "folder": "", "aliases": None}


def _here(value: Any) -> Any:
    """Return the last part of an absolute path, also inside of a block; any other value is returned unchanged.

    >>> _here("/home/me/kinds.csv"), _here("kinds.csv"), _here("sampled"), _here(5), _here({"model": "/home/me/qwen"})
    ('kinds.csv', 'kinds.csv', 'sampled', 5, {'model': 'qwen'})
    """
    if isinstance(value, Mapping):
        return {key: _here(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def named(path: str | None) -> str | None:
    """Return the last part of a model's path; an id of the hub is returned unchanged.

    >>> named("/home/me/birds"), named("../birds"), named("~/birds"), named("owner/name"), named(None)
    ('birds', 'birds', 'birds', 'owner/name', None)
    """
    if path is None or (path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir()):
        return path
    return Path(path).name
