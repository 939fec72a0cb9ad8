"""A trained ALERT as a plain model: transformers and vLLM, knowing nothing of us, give the same replies."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from alert import export
from alert.bank import file as bank_file
from alert.prompt import meta_task
from common.config.schema import LoraConfig
from common.data.loading import Loader
from common.models.encoder import Encoder
from common.models.slots import attach
from common.rollout.base import Decoding, requests
from common.rollout.hf import HFRollout
from common.types import CATEGORY, Prompt, UserError

NAMES = ("zero", "one", "two")
GREEDY = Decoding(0.0, 0, 1.0, 16)
LORA = LoraConfig(r=4, alpha=8, targets=r".*language_model.*\.(q_proj|down_proj)")


@pytest.fixture(params=["qwen2_vl", "gemma3"])
def exported(request, load_vlm, digits_task, tmp_path):
    """The folder, pictures, prompts, and what the trained model itself replies, by how its images attend."""
    entries = torch.randn(3, 4, 96, generator=torch.Generator().manual_seed(5)) * 0.3

    def trained(**changes):
        torch.manual_seed(3)
        vlm = load_vlm(family=request.param, lora=LORA, **changes)
        with torch.no_grad():
            vlm.model.get_input_embeddings().weight[list(vlm.banned)] = 0.0  # as a trained model, it never says these
            for name, weight in vlm.model.named_parameters():
                if "lora_B" in name:
                    weight += torch.randn(weight.shape) * 0.3
        return vlm

    prompts, pictures = [], Loader(digits_task.images, 32)
    for number, item in enumerate(digits_task.train.items[:40:8]):
        shown = (number % 3, (number + 1) % 3)
        text = meta_task([NAMES[i] for i in shown], "short")
        prompts.append(Prompt(item.image, text, item.name, NAMES, categories=shown, image_last=True))
    replies = {}
    for attention in ("family", "causal"):
        vlm = trained(image_attention=attention)
        vlm = replace(vlm, slots=attach(vlm.model, entries, True))
        encoder = Encoder(vlm, pictures, 512)
        asked = requests(encoder, prompts, [""] * len(prompts))
        replies[attention] = [group[0].text for group in HFRollout(vlm).generate(asked, 1, GREEDY)]
    export.export(trained(), entries, NAMES, "short", tmp_path / "plain")
    return tmp_path / "plain", [pictures([p.image])[0] for p in prompts], prompts, replies


def conversation(folder, prompt, image):
    """As a user would write it: the words of categories.json in the text, the picture behind it."""
    words, text = json.loads((folder / export.WORDS).read_text())["words"], prompt.text
    for label in prompt.categories:
        text = text.replace(CATEGORY, words[NAMES[label]], 1)
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


def test_transformers_gives_the_same_replies(exported):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, pictures, prompts, replies = exported
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    found = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        turns = conversation(folder, prompt, {"type": "image", "image": picture})
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=GREEDY.max_tokens)[0, inputs["input_ids"].shape[1] :]
        ends = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id)).nonzero()
        found.append(processor.tokenizer.decode(ids[: int(ends[0])] if len(ends) else ids))
    assert found == replies["family"]
    assert len(set(found)) > 1, "the replies do not depend on the question"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs make setup-vllm")
def test_vllm_gives_the_same_replies(exported):
    from common.rollout.vllm.engine import GIB, kept_group, undisturbed

    folder, pictures, prompts, replies = exported
    with undisturbed():
        from vllm import LLM, SamplingParams

        llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=GIB)
    turns = [
        conversation(folder, prompt, {"type": "image_pil", "image_pil": picture})
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    chosen = SamplingParams(temperature=0.0, max_tokens=GREEDY.max_tokens)
    found = []
    for output in llm.chat(turns, chosen, use_tqdm=False):
        (reply,) = output.outputs  # its text leaves half characters out, which a random model is full of
        ids = reply.token_ids[:-1] if reply.finish_reason == "stop" else reply.token_ids
        found.append(llm.get_tokenizer().decode(ids))
    with kept_group():
        llm.llm_engine.engine_core.shutdown()
    gemma = "gemma" in json.loads((folder / "config.json").read_text())["model_type"]
    assert found == replies["causal" if gemma else "family"]  # vLLM's CPU attention lets no image see both ways


def test_what_is_no_run_of_alert_is_named(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        export.of_run(tmp_path, tmp_path / "new")
    (tmp_path / "config.yaml").write_text("model: {}\nmethod: {}\n")
    with pytest.raises(UserError, match="is no bank that a run has exported"):
        export.of_run(tmp_path, tmp_path / "new")
    bank_file.export(tmp_path / "model" / "embeddings", torch.zeros(3, 4, 96), NAMES, "gemma3")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        export.of_run(tmp_path, tmp_path / "new")
