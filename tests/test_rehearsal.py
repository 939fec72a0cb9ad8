"""The rehearsal at narrow widths with the real tokenizers: what is right passes, and every check can fail."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.rehearse import __main__ as rehearsal
from benchmarks.rehearse import checks, composed, varied
from benchmarks.rehearse.lines import Line, timed, within
from benchmarks.setup import Case
from common.data import task
from common.forward import merged_attention
from common.forward.label_scores import LabelScorer
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_shared
from common.models.adapters import without_adapters
from common.models.encoder import PromptEncoder
from common.models.families import Qwen2VL
from common.rollout.hf import HFRollout
from common.types import Prompt, Sample, UserError
from tests import pretend_device
from tests.conftest import REPOSITORY, initialized

pytestmark = pytest.mark.slow  # forwards of models with the real vocabularies
CPU = torch.device("cpu")
MODELS = {"qwen2_vl": ("qwen2_vl_2b", "clsrl", 84), "gemma3": ("gemma3_4b", "alert", 896)}


@pytest.fixture(scope="module")
def learner(real_vocabulary, tmp_path_factory):
    """`learner(family)`: of a narrow model with the real tokenizer, in bf16, built as for a run."""
    from common.config.composition import validate
    from common.learner import learner_class
    from common.run.checkpoint import Checkpoints
    from common.runtime.group import init_process_group

    learners = {}

    def make(family):
        if family not in learners:
            name, method, size = MODELS[family]
            folder = tmp_path_factory.mktemp(family)
            photos = rehearsal.photos(folder / "photos", 64)
            words = [f"model={name}", f"method={method}", f"model.path={real_vocabulary(family)}", "gpus=0"]
            words += ["data=folder", f"data.folder={photos}", "shots=2", "validation=none", f"model.image_size={size}"]
            words += ["model.load_in_8bit=false", "model.lora.r=4", "doctor=false", "trainer.updates=1"]
            words += [
                f"cache_dir={folder / 'cache'}",
                "trainer.prompts_per_update=1",
                "rollout.max_completion_tokens=4",
            ]
            words += ["+rewards.varied={weight: 1.0, fn: benchmarks.rehearse.varied}"]
            with initialized() as compose:
                config = validate(compose(*words))
            device, at = init_process_group(0), Checkpoints(folder / "checkpoints", 1)
            learners[family] = learner_class(config)(config, task.build(config), device, folder, at)
        return learners[family]

    return make


def test_a_check_needs_no_run_before_it(tmp_path):
    """The tiny model in a folder that is not there: its learner writes down the hashes of its prompts."""
    words = [
        "data=digits",
        "shots=1",
        "method=nothinking",
        "tracking=none",
        "gpus=0",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    lines = checks.checked(composed(words), tmp_path / "none", ["prompts"])
    assert lines and {line.verdict for line in lines} == {"ok"}, lines


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Few tokens, and few stock forwards."""
    for name, value in {"TOKENS": 4, "COMPARED": 1, "KERNELS": ("eager",)}.items():
        monkeypatch.setattr(checks, name, value)


def verdicts(lines):
    return {line.check: line.verdict for line in lines}


@pytest.mark.parametrize("family", ["qwen2_vl", pytest.param("gemma3", marks=pytest.mark.faults)])
def test_a_right_model_passes_every_check(learner, family):
    model = learner(family)
    lines = [
        line for check in (checks.loading, checks.prompts, checks.forwards, checks.labels) for line in check(model)
    ]
    assert {line.verdict for line in lines} == {"ok"}, lines
    found = {line.check: line for line in lines}
    assert found["weights"].figures["equal"] > 30 and found["prompts"].figures["prompts"] == 4
    assert found["sampled group"].figures["rounding"] > 1e-3 > 1e-4 > found["sampler, exact"].figures["value"]


def swapped(monkeypatch, model):
    original = Qwen2VL.positions
    monkeypatch.setattr(Qwen2VL, "positions", staticmethod(lambda *given: original(*given)[[0, 2, 1]]))


def darker(monkeypatch, model):
    original = Qwen2VL.images
    monkeypatch.setattr(Qwen2VL, "images", staticmethod(lambda batch: [(x * 0.9, g) for x, g in original(batch)]))


def another_question(monkeypatch, model):
    render = model.encoder._render
    monkeypatch.setattr(
        model.encoder, "_render", lambda prompt: render(replace(prompt, text=prompt.text.replace("photo", "image")))
    )


def apart(monkeypatch, model):
    """The reasoning and the answer tokenised one by one."""
    original = LabelScorer._endings

    def endings(self, begun, responses):
        shared, found = original(self, "", responses)
        return (torch.tensor(self._tokenised([begun])[0]["ids"]) if begun else shared), found

    monkeypatch.setattr(LabelScorer, "_endings", endings)


def moved(monkeypatch, model):
    def wrong(groups, family, device):
        packed = pack_shared(groups, family, device)
        positions = packed.inputs["position_ids"].clone()
        positions[..., len(groups[0].prompt.ids) :] += 1
        return replace(packed, inputs={**packed.inputs, "position_ids": positions})

    monkeypatch.setattr(checks, "pack_shared", wrong)


class Late(HFRollout):
    """It counts the positions of completions from one too many."""

    def _forward(self, ids, mask, positions, cache, extra):
        return super()._forward(ids, mask, positions + (ids.shape[1] == 1), cache, extra)


def late(monkeypatch, model):
    monkeypatch.setattr(model, "rollout", Late(model.policy))


def edited(monkeypatch, model):
    weight = next(p for name, p in model.policy.model.named_parameters() if "visual.blocks.0.mlp.fc1" in name)
    flipped = weight.detach().clone()
    flipped.view(-1)[0] *= -1
    monkeypatch.setattr(weight, "data", flipped)


@pytest.mark.parametrize(
    ("fault", "check", "line"),
    [
        (swapped, checks.prompts, "prompts"),
        (darker, checks.prompts, "prompts"),
        (another_question, checks.prompts, "prompts"),
        (moved, checks.forwards, "forward against transformers"),
        pytest.param(late, checks.forwards, "sampler, exact", marks=pytest.mark.faults),
        pytest.param(apart, checks.labels, "label scores", marks=pytest.mark.faults),
        (edited, checks.loading, "weights"),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_what_is_wrong_fails(learner, monkeypatch, fault, check, line):
    model = learner("qwen2_vl")
    model.encoder.set_images(model.encoder.load_images)
    fault(monkeypatch, model)
    found = verdicts(check(model))
    model.encoder.set_images(model.encoder.load_images)
    assert found[line] == "failed", found


class Copied(HFRollout):
    """A sampler with weights of its own, which it takes over when it is told."""

    has_weight_copy = True

    def __init__(self, policy):
        super().__init__(replace(policy, model=copy.deepcopy(policy.model)))
        self.source = policy.model

    def refresh(self, version):
        super().refresh(version)
        self.vlm.model.load_state_dict(self.source.state_dict())


class Deaf(Copied):
    def refresh(self, version):
        HFRollout.refresh(self, version)


@pytest.mark.parametrize(
    ("rollout", "verdict"), [pytest.param(Copied, "ok", marks=pytest.mark.faults), (Deaf, "failed")]
)
def test_weights_that_do_not_arrive_are_noticed(learner, rollout, verdict):
    model = learner("qwen2_vl")
    kept = [p.detach().clone() for _, p in checks.learned(model.policy)]
    found = verdicts(checks.push(model, rollout(model.policy)))
    assert found == {"sampler of its own": "ok", "weights pushed": verdict}
    assert all(torch.equal(p, value) for (_, p), value in zip(checks.learned(model.policy), kept, strict=True))


@pytest.mark.faults
@pytest.mark.parametrize(("reward", "verdict"), [(varied, "ok"), (lambda samples: [0.0] * len(samples), "failed")])
def test_an_update_without_a_gradient_fails(learner, monkeypatch, reward, verdict):
    model = copy.copy(learner("qwen2_vl"))
    model.policy = replace(model.policy, model=copy.deepcopy(model.policy.model))
    model.rollout, model.trainer = HFRollout(model.policy), None
    model.rewards = {"only": replace(next(iter(model.rewards.values())), function=reward, weight=1.0)}
    found = verdicts(checks.update(model))
    model.trainer.close()
    assert found == {"one update": verdict, "frozen weights": "ok"}


def test_a_difference_that_is_no_number_fails_and_an_error_is_a_line():
    assert [within("a", "by", x, 1e-4, "key").verdict for x in (1e-4, 2e-4, float("nan"))] == ["ok", "failed", "failed"]

    def broken():
        yield Line("first", "ok", "")
        raise ValueError("of\na shape")

    (line,) = timed(broken, "second", CPU)
    assert (line.check, line.verdict, line.seen) == ("second", "failed", "ValueError: of a shape") and line.peak > 0.1


def test_completions_earn_differently():
    samples = [Sample(Prompt("x", "", ""), text) for text in ("a", "b", "")]
    assert varied(samples) == [0.0, pytest.approx(1 / 97), 0.0]


def test_runs_are_judged_by_what_they_wrote(tmp_path):
    def verdict(**row):
        write = (tmp_path / "metrics.jsonl").write_text
        write(json.dumps({"step": 0, "eval": 1}) + "\n" + json.dumps({"loss": 0.0, "grad_norm": 1.0, **row}))
        return rehearsal.trained("run", tmp_path).verdict

    assert verdict() == "ok" and verdict(grad_norm=0.0) == verdict(loss=float("nan")) == "failed"
    assert rehearsal.trained("run", tmp_path / "none").verdict == "failed"


def test_ranks_that_begin_otherwise_are_noticed(tmp_path):
    def verdict(brier=0.5, reward=0.1, grad_norm=2.0):
        for name, values in {"one": (0.5, 0.1, 2.0), "two": (brier, reward, grad_norm)}.items():
            (tmp_path / name).mkdir(exist_ok=True)
            both = {"step": 0, "eval/test/brier": values[0]}, {"step": 1, "reward": values[1], "grad_norm": values[2]}
            (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, both)))
        return rehearsal.beside(Line("ranks", "ok", ""), tmp_path / "two", tmp_path / "one").verdict

    assert verdict() == verdict(grad_norm=2.05) == verdict(reward=0.2, grad_norm=3.0) == "ok"
    assert verdict(brier=0.6) == verdict(grad_norm=3.0) == verdict(grad_norm=float("nan")) == "off"


def test_a_process_is_judged_by_how_it_ends(tmp_path):
    plan = rehearsal.Rehearsal(None, [], tmp_path, 0)
    says = "import sys, time; print('error: model.path=y is not a folder'); time.sleep({}); sys.exit({})".format
    (line,) = plan.go("run", ["-c", says(0, 1)], lambda: [Line("run", "ok", "")])
    assert line.verdict == "failed" and line.seen == "exit code 1: error: model.path=y is not a folder"
    (line,) = plan.go("run", ["-c", says(0.3, 1)], lambda: [Line("run", "ok", "")], code=1)
    assert line.verdict == "ok" and line.seconds > 0.3 and line.peak > 0.005
    (line,) = plan.go("run", ["-c", says(60, 0)], lambda: [Line("run", "ok", "")], stop=lambda: True, code=-15)
    assert line.verdict == "ok" and line.seconds < 30


def test_weights_that_stand_still_are_noticed(real_vocabulary, tmp_path):
    from safetensors.torch import load_file, save_file

    base = real_vocabulary("qwen2_vl")
    weights = load_file(sorted(base.glob("*.safetensors"))[0])
    save_file(weights, tmp_path / "model.safetensors")
    assert rehearsal.moved(base, tmp_path).verdict == "failed"
    next(iter(weights.values())).add_(1)
    save_file(weights, tmp_path / "model.safetensors")
    assert rehearsal.moved(base, tmp_path).figures == {"changed": 1, "of": len(weights)}
    save_file({"x.lora_B.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert rehearsal.moved(base, tmp_path).verdict == "failed"


def test_a_folder_of_others_is_not_taken(monkeypatch, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        rehearsal.main([f"out={tmp_path}", "model=qwen2_vl_2b", "method=clsrl"])
    assert (tmp_path / "mine.txt").read_text() == "keep"
    for words, said in ((["steps=all"], "steps=all: choose"), (["method=clsrl"], "tiny_qwen2_vl: a rehearsal knows")):
        with pytest.raises(UserError, match=said):
            rehearsal.main([f"out={tmp_path / 'new'}", *words])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("off", 0), ("failed", 1)])
def test_it_ends_with_a_table_a_file_and_an_exit_code(monkeypatch, tmp_path, capsys, verdict, code):
    def prepared(own, given):
        assert own == {"out": str(tmp_path), "steps": "one"} and given == ["model=x"]
        return rehearsal.Rehearsal(None, [], tmp_path, 0)

    monkeypatch.setattr(rehearsal, "prepare", prepared)
    monkeypatch.setattr(
        rehearsal, "STEPS", {"one": lambda plan: [Line("one", verdict, "seen it", "some.key", {"x": 1})]}
    )
    assert rehearsal.main([f"out={tmp_path}", "steps=one", "model=x"]) == code
    said = capsys.readouterr().out
    assert "seen it" in said and ("change: some.key" in said) == (verdict != "ok")
    written = json.loads((tmp_path / "rehearsal.json").read_text())
    assert written["lines"][0]["figures"] == {"x": 1} and "torch" in written["versions"]


@pytest.mark.faults
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.timeout(1200)
def test_a_whole_rehearsal_of_a_narrow_model(real_vocabulary, tmp_path, monkeypatch, family):
    monkeypatch.chdir(REPOSITORY)
    name, method, size = MODELS[family]
    words = [f"out={tmp_path / 'out'}", "depth=real", f"model.path={real_vocabulary(family)}", f"model={name}"]
    words += ["model.dtype=float32"] if family == "qwen2_vl" else []  # in which ranks draw the same completions
    assert rehearsal.main([*words, f"method={method}", f"model.image_size={size}", "model.lora.r=4"]) == 0
    lines = json.loads((tmp_path / "out" / "rehearsal.json").read_text())["lines"]
    assert {line["verdict"] for line in lines} == {"ok"}, [line for line in lines if line["verdict"] != "ok"]
    ranks = next(line for line in lines if line["check"] == "ZeRO-3, 2 ranks")
    assert family != "qwen2_vl" or (len(ranks["figures"]["gaps"]) == 2 and max(ranks["figures"]["gaps"]) < 1e-3)
    assert {"resumed", "weights moved", "predict by the export", "ZeRO-3, 2 ranks"} <= {line["check"] for line in lines}
    assert [Path(path).name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


@pytest.mark.faults
@pytest.mark.parametrize("family", MODELS)
def test_nothing_stays_on_the_cpu(learner, monkeypatch, family):
    """The checks, and forward and backward of a training, on a pretend device that refuses to be mixed with the CPU."""
    model = copy.copy(learner(family))
    monkeypatch.setattr(merged_attention, "kernel", lambda block: merged_attention.PLAIN)  # no kernel of a GPU is here
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, pretend_device.made(getattr(torch, name)))
    model.policy = replace(model.policy, model=copy.deepcopy(model.policy.model))
    if model.policy.extra_embeddings is not None:
        model.policy = replace(
            model.policy, extra_embeddings=without_adapters(model.policy.model).get_input_embeddings()
        )
    model.encoder = PromptEncoder(model.policy, model.encoder.load_images, None)
    model.rollout = HFRollout(model.policy)
    pretend_device.move(model.policy.model)
    with pretend_device.There():
        lines = [line for check in (checks.prompts, checks.forwards, checks.labels) for line in check(model)]
        assert {line.verdict for line in lines} == {"ok"}, [line for line in lines if line.verdict != "ok"]
        (encoded,) = model.encoder(model.prompts.train[:1])
        scorer = PolicyScorer(model.policy, 1.0, 4).to(model.policy.device)
        packed = pack_shared(
            [PromptGroup(encoded, (torch.tensor([5, 6]),) * 2)], model.policy.family, model.policy.device
        )
        scorer(packed)[0].sum().backward()
        gradients = [p.grad for _, p in checks.learned(model.policy)]
        assert any(isinstance(gradient, pretend_device.Pretend) for gradient in gradients)
        with pytest.raises(RuntimeError, match="both devices"):
            scorer(pack_shared([PromptGroup(encoded, (torch.tensor([5, 6]),) * 2)], model.policy.family, CPU))


@pytest.mark.faults
def test_a_group_is_timed_in_turn_with_trl(learner, monkeypatch):
    monkeypatch.setattr(checks, "TRL_CASES", (Case(200, 4, 2),))
    (line,) = checks.against_trl(learner("qwen2_vl"))
    assert line.check == "TRL, P200_R4_G2" and len(line.figures["trl"]) == len(line.figures["ours"]) == 3
