"""A folder of adapters as a checkpoint: it answers as the run that wrote it, and can be trained further."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config.schema import LoraConfig
from common.data.loading import Loader
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, images, pack_plain, pack_shared
from common.models import files, meter, vlm
from common.models.adapters import without_adapters
from common.models.encoder import PromptEncoder
from common.models.families import Qwen2VL
from common.rollout.vllm.weights import named
from common.run.result import Result
from common.types import UserError
from common.vlm import check
from common.vlm.learner import VLMLearner
from tests.conftest import SQUARE
from tests.test_shared_prefix import LORA, groups

CPU = torch.device("cpu")


def scores(policy, task, no_think):
    """Log-probabilities of some completions to three prompts."""
    encoder = PromptEncoder(policy, Loader(task.images, 32), 512)
    batch = groups(policy, no_think.train_prompts(task)[:3], encoder, [2, 2, 2], [3, 5], image=True)
    scorer = PolicyScorer(policy, temperature=1.0, chunk=64)
    with torch.no_grad():
        return scorer(pack_plain(batch, policy.family, policy.pad, policy.device))[0]


def trained(policy, seed):
    """Adapters that have moved, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


@pytest.fixture
def written(load_vlm, tmp_path):
    """A folder of adapters and the model that wrote it."""
    policy = trained(load_vlm(lora=LORA), seed=1)
    policy.model.save_pretrained(tmp_path / "first")
    return tmp_path / "first", policy


@pytest.mark.slow
def test_adapters_answer_as_the_model_that_wrote_them(written, load_vlm, model_config, digits_task, no_think):
    folder, policy = written
    expected = scores(policy, digits_task, no_think)
    kept = vlm.load(folder, model_config(lora=LORA), CPU, train=False)
    assert torch.equal(scores(kept, digits_task, no_think), expected), "to the bit"
    assert float((scores(load_vlm(), digits_task, no_think) - expected).abs().max()) > 0.1, "they matter"
    merged = vlm.load(folder, model_config(), CPU)
    assert float((scores(merged, digits_task, no_think) - expected).abs().max()) <= 1e-5
    assert not hasattr(merged.model, "disable_adapter")
    assert all(parameter.requires_grad for parameter in merged.model.parameters())


def test_rounded_weights_answer_to_the_bit_too(load_vlm, model_config, digits_task, no_think, tmp_path):
    policy = trained(load_vlm(lora=LORA, dtype="bfloat16"), seed=1)
    policy.model.save_pretrained(tmp_path)
    kept = vlm.load(tmp_path, model_config(dtype="bfloat16"), CPU, train=False)
    assert torch.equal(scores(kept, digits_task, no_think), scores(policy, digits_task, no_think))


def test_adapters_on_adapters(written, model_config, digits_task, no_think, untrained_folder):
    first, _ = written
    policy = vlm.load(first, model_config(lora=LORA), CPU)
    with policy.model.disable_adapter():
        start = scores(vlm.load(first, model_config(), CPU), digits_task, no_think)
        assert torch.equal(scores(policy, digits_task, no_think), start), "the reference is the model it began from"
    second = first.with_name("second")
    trained(policy, seed=2).model.save_pretrained(second)
    assert files.lineage(second) == [untrained_folder, first, second]
    again = vlm.load(second, model_config(), CPU, train=False)
    assert torch.equal(scores(again, digits_task, no_think), scores(policy, digits_task, no_think))


def test_the_hash_covers_base_and_adapters(written, untrained_folder):
    folder, _ = written
    found = files.weights_hash(folder)
    assert found != files.weights_hash(untrained_folder)
    settings = json.loads((folder / "adapter_config.json").read_text())

    def changed(**values):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **values}))
        return files.weights_hash(folder)

    assert changed(lora_alpha=settings["lora_alpha"] * 2) != found
    base = folder.with_name("base")
    shutil.copytree(untrained_folder, base)
    assert changed(base_model_name_or_path=str(base)) == found, "the same base in another place"
    weights = load_file(base / "model.safetensors")
    save_file({**weights, min(weights): weights[min(weights)] + 1}, base / "model.safetensors")
    assert files.weights_hash(folder) != found
    shutil.copytree(untrained_folder, base, dirs_exist_ok=True)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert files.weights_hash(folder) != found


def test_prompts_are_measured_by_the_base(written, untrained_folder, no_think, digits_task):
    prompts = no_think.train_prompts(digits_task)[:3]
    expected = meter.of_folder(untrained_folder, "qwen2_vl").tokens(prompts, 32)
    assert meter.of_folder(files.find(str(written[0]), None), "qwen2_vl").tokens(prompts, 32) == expected


def test_unusable_adapters_are_one_line(written, model_config):
    folder, _ = written
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good, whole = json.loads(settings.read_text()), weights.read_bytes()
    with pytest.raises(UserError, match="holds adapters, which 8-bit weights cannot take in"):
        vlm.load(folder, model_config(load_in_8bit=True, lora=LORA), CPU)
    for base, message in ((None, "does not say on which model"), ("/gone", "cannot be used .model.path=/gone")):
        settings.write_text(json.dumps({**good, "base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            meter.of_folder(folder, "qwen2_vl")
    settings.write_text(json.dumps({**good, "target_modules": "nothing"}))
    with pytest.raises(UserError, match=r"the adapters in .* do not load: .*nothing"):
        vlm.load(folder, model_config(), CPU)
    settings.write_text(json.dumps(good))
    tensors = load_file(weights)
    name = min(tensors)
    rest = {key: value for key, value in tensors.items() if key != name}
    for content in (rest, {**tensors, "strange": tensors[name]}, {**tensors, name: tensors[name][:1]}):
        save_file({key: value.clone() for key, value in content.items()}, weights)
        with pytest.raises(UserError, match=f"the adapters in {folder} do not"):
            vlm.load(folder, model_config(), CPU)
    weights.write_bytes(whole)
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        files.find(str(folder), None)
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        files.find(str(folder), None)
    settings.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        files.find(str(folder), None)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, untrained_folder, tmp_path):
    """`owner/name` on a hub whose main branch is at COMMIT; what was fetched, and with weights or not."""
    snapshot, fetched = tmp_path / "models--owner--name" / "snapshots" / COMMIT, []

    def fetch(path, revision, allow_patterns):
        assert path == "owner/name" and revision in ("main", COMMIT)
        fetched.append((revision, "*.safetensors" in allow_patterns))
        shutil.copytree(untrained_folder, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    def unasked(*arguments, **values):
        raise AssertionError("PEFT asks the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", unasked)
    return fetched


def saved(policy, folder):
    """What a run writes of its model, and the settings of its adapters."""
    VLMLearner.save_weights(SimpleNamespace(policy=policy), folder)
    return json.loads((folder / "adapter_config.json").read_text())


def test_adapters_name_their_base_on_the_hub(hub, model_config, digits_task, no_think, tmp_path, untrained_folder):
    config = model_config(path="owner/name", revision="main", lora=LORA)
    policy = trained(vlm.load(files.find("owner/name", "main"), config, CPU), seed=1)
    folder = tmp_path / "run" / "model"
    settings = saved(policy, folder)
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/name", COMMIT)
    hub.clear()
    asked = SimpleNamespace(model=model_config(path=str(folder)))
    check.check_weights(asked)
    assert hub == [(COMMIT, False)], "not the weights, before the checks are done"
    assert files.weights_folder(asked) == folder and hub[1:] == [(COMMIT, True)]
    kept = vlm.load(folder, model_config(path=str(folder), lora=LORA), CPU, train=False)
    assert torch.equal(scores(kept, digits_task, no_think), scores(policy, digits_task, no_think))
    found = files.weights_hash(folder)
    local = {**settings, "base_model_name_or_path": str(untrained_folder), "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(local))
    assert files.weights_hash(folder) == found, "the same base in another place"


def test_adapters_name_their_local_base_by_its_folder(load_vlm, untrained_folder, tmp_path):
    settings = saved(load_vlm(lora=LORA), tmp_path / "model")
    assert (settings["base_model_name_or_path"], settings["revision"]) == (str(untrained_folder), None)


@pytest.mark.slow
def test_a_run_with_adapters_is_evaluated_from_its_folder(runner, untrained_folder, tmp_path):
    shared = [
        "method=nothinking",
        "model.recipe=null",
        "model.lora.r=4",
        "rollout.max_completion_tokens=8",
        "setting.test_per_class=5",
        "tracking=none",
        f"cache_dir={tmp_path}",
    ]
    training = [
        "trainer.updates=3",
        "trainer.learning_rate=1e-2",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
    ]
    assert runner(tmp_path / "run", [*shared, *training, f"model.path={untrained_folder}"]) == 0
    assert runner(tmp_path / "again", [*shared, "trainer=none", f"model.path={tmp_path / 'run' / 'model'}"]) == 0
    begun, before, after = (
        predictions(tmp_path / "run", "before"),
        *(predictions(tmp_path / name, phase) for name, phase in (("run", "after"), ("again", "before"))),
    )
    assert before == after and begun != before
    used = [Result.load(tmp_path / name).weights["sha256"] for name in ("run", "again")]
    assert used[0] == files.weights_hash(untrained_folder) != used[1]


def predictions(folder, phase):
    """Answers, and probabilities to the bit."""
    rows = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist()
    return [{k: v for k, v in row.items() if k != "phase"} for row in rows if row["phase"] == phase]


def test_an_engine_beside_is_pushed_the_weights_under_adapters_again(load_vlm):
    """They need no gradient themselves, but what stands on them has moved: base + B A alpha / r, under the hub's name."""
    policy, plain = trained(load_vlm(lora=LORA), seed=1), load_vlm()
    base = {Qwen2VL.hub_name(name): value.detach() for name, value in plain.model.named_parameters()}
    layers = {name: layer for name, layer in policy.model.named_modules() if hasattr(layer, "lora_A")}
    pushed, everything = dict(named(policy, trained=True)), dict(named(policy))
    # vLLM keeps queries, keys and values in one tensor: all of a block go together, biases too
    blocks = tuple(
        {Qwen2VL.hub_name(name.removeprefix("base_model.model.")).rpartition(".")[0] + "." for name in layers}
    )
    assert pushed.keys() == {name for name in base if name.startswith(blocks)} != set()
    assert everything.keys() == base.keys()
    for name, layer in layers.items():
        own = Qwen2VL.hub_name(name.removeprefix("base_model.model.")) + ".weight"
        moved = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * LORA.alpha / LORA.r
        torch.testing.assert_close(pushed[own], (base[own] + moved).detach(), atol=1e-6, rtol=1e-5)
        assert float((pushed[own] - base[own]).abs().max()) > 1e-3
        assert torch.equal(everything[own], pushed[own])
    under = {Qwen2VL.hub_name(name.removeprefix("base_model.model.")) + ".weight" for name in layers}
    assert all(torch.equal(everything[name], base[name]) for name in base.keys() - under)
    assert all(torch.equal(pushed[name], base[name]) for name in pushed.keys() - under)


def test_an_engine_beside_is_pushed_what_is_trained_whole(load_vlm):
    """Without adapters all weights; with a projector of its own, that one and what stands under the adapters."""
    whole = load_vlm()
    assert dict(named(whole, trained=True)).keys() == dict(named(whole)).keys()
    wrapped = load_vlm(lora=replace(LORA, projector="full"))
    pushed = dict(named(wrapped, trained=True))
    projector = {name for name, value in wrapped.model.named_parameters() if "modules_to_save" in name}
    assert projector and all(any(part in name for part in ("_proj.", "merger")) for name in pushed)
    assert sum("merger" in name for name in pushed) == len(projector)


@pytest.mark.sampled
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_vl", {"lora": LORA}),
        ("gemma3", {"lora": LORA}),
        ("qwen2_vl", {"lora": LORA, "freeze_vision": True}),
        ("gemma3", {"lora": LORA, "freeze_vision": True}),
        ("qwen2_5_vl", {"lora": LORA, "freeze_vision": True}),
        ("qwen3_vl", {"lora": LORA, "freeze_vision": True}),
        ("qwen2_vl", {"freeze_vision": True}),
        ("gemma3", {"freeze_vision": True}),
        ("qwen2_5_vl", {"freeze_vision": True}),
        ("qwen3_vl", {"freeze_vision": True}),
        *(
            pytest.param(family, {"freeze_vision": True, **changes}, marks=pytest.mark.faults)
            for family in SQUARE
            for changes in ({"lora": LORA}, {})
        ),
        ("qwen2_vl", {"lora": LoraConfig(r=4, projector="lora"), "freeze_vision": True}),
        ("gemma3", {"lora": LoraConfig(r=4, projector="lora"), "freeze_vision": True}),
        ("qwen2_vl", {"lora": LoraConfig(projector="full"), "freeze_vision": True}),
        ("gemma3", {"lora": LoraConfig(projector="full"), "freeze_vision": True}),
    ],
)
def test_no_gradient_runs_into_a_frozen_vision_tower(load_vlm, digits_task, no_think, family, changes, checkpointing):
    policy = load_vlm(family=family, gradient_checkpointing=checkpointing, **changes)
    policy.model.train()
    (prompt,) = PromptEncoder(policy, Loader(digits_task.images, 32), 512)(no_think.train_prompts(digits_task)[:1])
    found = without_adapters(policy.model).get_image_features(**images([prompt], policy.family, CPU))
    projected = found.pooler_output[0] if isinstance(found.pooler_output, tuple | list) else found.pooler_output
    assert not found.last_hidden_state.requires_grad
    assert projected.requires_grad == (changes.get("lora", LORA).projector != "none")
    scorer = PolicyScorer(policy, temperature=1.0, chunk=64).train()
    completion = torch.tensor([40, 41, 42])
    scorer(pack_shared([PromptGroup(prompt, (completion, completion[:2]))], policy.family, CPU))[0].sum().backward()
    reached = {name for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
