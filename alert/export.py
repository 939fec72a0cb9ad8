"""A trained ALERT as a plain model: its category embeddings become words of the vocabulary.

    python -m alert.export outputs/<run> <new folder>

transformers and vLLM load the folder like any other; categories.json says which word stands for a category, and how to
ask. Adapters are added to the weights.

Shapes: C categories, m tokens of an image, D width, V rows of the vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from alert.bank import file as bank_file
from alert.prompt import INSTRUCTIONS, meta_task
from common.config.schema import LoraConfig, ModelConfig
from common.models import vlm
from common.models.files import find
from common.models.slots import rows_of_vocabulary
from common.models.vlm import VLM
from common.rollout.vllm.weights import ROUND, hub_name
from common.runtime import utf8
from common.types import CATEGORY, UserError

WORDS = "categories.json"


def words(names: Sequence[str], tokens: int) -> list[str]:
    """What stands for each category in a text: as many words as an image has tokens.

    >>> words(["six", "nine"], 2)
    ['<category_0_0><category_0_1>', '<category_1_0><category_1_1>']
    """
    return ["".join(f"<category_{label}_{place}>" for place in range(tokens)) for label in range(len(names))]


def export(policy: VLM, entries: torch.Tensor, names: Sequence[str], instruction: str, folder: Path) -> None:
    """Write a model whose vocabulary ends in the categories.

    Args:
        policy: The trained model without slots; adapters are added to its weights for good.
        entries: The bank. Shape: [C, m, D].
        names: Of the categories. Length: C.
        instruction: Of the method.
        folder: Is made.
    """
    model, processor = policy.model, policy.processor
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    tokenizer, texts = processor.tokenizer, words(names, entries.shape[1])
    first = len(tokenizer)
    tokenizer.add_tokens([f"{word}>" for text in texts for word in text.split(">")[:-1]], special_tokens=True)
    assert len(tokenizer) == first + entries.shape[0] * entries.shape[1], "a word of the categories was known already"
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROUND, mean_resizing=False)
    embedding = model.get_input_embeddings()
    # categories are read, never said: a projection of its own gives them the number of the padding, which is not said
    said = embedding.weight.detach().clone() if tied(model) else model.lm_head.weight.detach()
    said[first : len(tokenizer)] = said[policy.pad].clone()
    model.lm_head.weight = torch.nn.Parameter(said)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    with torch.no_grad():
        embedding.weight[first : len(tokenizer)] = rows_of_vocabulary(embedding, entries).to(embedding.weight)
    model.generation_config.suppress_tokens = [*policy.banned, *range(first, len(tokenizer))]
    model.generation_config.do_sample, model.generation_config.top_k, model.generation_config.top_p = False, None, None
    model.save_pretrained(folder)
    as_on_the_hub(folder)
    processor.save_pretrained(folder)
    asked = meta_task(names[:2], instruction)
    for text in texts[:2]:
        asked = asked.replace(CATEGORY, text, 1)
    facts = {
        "words": dict(zip(names, texts, strict=True)),
        "instruction": INSTRUCTIONS[instruction],
        "example": f"{asked} (the image follows)",
    }
    (folder / WORDS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tied(model: Any) -> bool:
    """Whether a model's output projection is its vocabulary."""
    return model.lm_head.weight is model.get_input_embeddings().weight


def as_on_the_hub(folder: Path) -> None:
    """Give the weights in a folder the names that they have on the hub; vLLM knows no others (Gemma's vision tower)."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {hub_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            changed, facts = set(tensors) != set(file.keys()), file.metadata()
        if changed:
            save_file(tensors, path, metadata=facts)
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {hub_name(name): where for name, where in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def of_run(run: Path, target: Path) -> None:
    """Export what a run of ALERT has trained.

    Args:
        run: Its folder.
        target: A new folder.

    Raises:
        UserError: It is no such run, has not ended, or the target exists.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists already; give a new folder")
    try:
        config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        model, method = config["model"], config["method"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{run} is no run folder ({error}); give outputs/<run>") from error
    bank = run / "model" / "embeddings"
    names = bank_file.facts(bank)["names"]
    settings = ModelConfig(
        **{
            **{key: value for key, value in model.items() if key != "gpus"},
            "lora": LoraConfig(),
            "path": str(run / "model"),
            "load_in_8bit": False,
        }
    )
    policy = vlm.load(find(str(run / "model"), None), settings, torch.device("cpu"))
    export(policy, bank_file.read(bank, names), names, method["instruction"], target)


def main(arguments: Sequence[str]) -> None:
    """Export one run."""
    if len(arguments) != 2:
        sys.exit("error: give a run and a new folder: python -m alert.export outputs/<run> <new folder>")
    try:
        of_run(Path(arguments[0]).expanduser(), Path(arguments[1]).expanduser())
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments[1]}; {WORDS} says how to ask it")


if __name__ == "__main__":
    utf8.ensure()
    main(sys.argv[1:])
