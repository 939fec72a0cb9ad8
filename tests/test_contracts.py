"""What the parts owe each other: fresh completions, the two forms of a prompt, whole rewards, comparable numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.config.composition import validate
from common.config.schema import GRPOConfig
from common.data import task
from common.data.loading import Loader
from common.models import files
from common.models.encoder import PromptEncoder
from common.rewards import STATEFUL, Reward, StatefulReward, build_rewards
from common.rollout.base import Completion, Decoding, check_fresh, sampling_mode
from common.rollout.hf import HFRollout
from common.run import doctor
from common.training.base import Epochs
from common.training.grpo.trainer import Sampling
from common.types import UserError
from common.vlm import learner
from common.vlm.learner import VLMLearner
from tests.conftest import NEWER
from tests.rewards import shorter
from tests.test_doctor import COST

DECODING = Decoding(1.0, 0, 1.0, 4)
CONFIG = GRPOConfig("grpo", 1e-3, epochs=1.0, group_size=2, beta=0.0, epsilon=0.2, prompts_per_update=2)


# ---- completions of the weights of now


class Forgetful(HFRollout):
    """It never takes over the weights."""

    def refresh(self, version):
        pass


@pytest.mark.parametrize(("backend", "version"), [(HFRollout, 3), (Forgetful, 0), (Forgetful, 3)])
def test_stale_completions_stop_the_training(load_vlm, digits_task, think, backend, version):
    vlm = load_vlm()
    prompts = think.train_prompts(digits_task)[:2]
    samples = Sampling(
        PromptEncoder(vlm, Loader(digits_task.images, 32), 512),
        backend(vlm),
        Epochs(lambda epoch: prompts, prompts),
        {"short": Reward(1.0, shorter)},
        DECODING,
        CONFIG,
        seed=1,
    )
    with sampling_mode(samples.rollout, version):
        if backend is Forgetful and version:
            with pytest.raises(RuntimeError, match="after 0 updates.*seen 3.*refresh"):
                samples(0, version)
        else:
            completions = samples(0, version).completions
            assert {c.version for group in completions for c in group} == {version}


def test_one_stale_completion_among_fresh_ones_is_found():
    fresh = Completion(torch.tensor([1]), torch.tensor([0.0]), "", False, version=5)
    check_fresh([[fresh, fresh], [fresh]], 5)
    for other in (4, 6):
        with pytest.raises(RuntimeError, match=f"after {other} updates"):
            check_fresh([[fresh], [fresh, replace(fresh, version=other)]], 5)


# ---- the two forms of a prompt


@pytest.mark.parametrize("family", ["qwen2_vl", *NEWER, "gemma3"])
def test_unexpanded_ids_expand_to_the_encoded_ones(load_vlm, digits_task, think, no_think, family):
    """transformers' processor, given the text of the unexpanded ids and the picture, writes the encoded ids."""
    vlm = load_vlm(family=family)
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)
    first, last = think.train_prompts(digits_task)[0], replace(no_think.train_prompts(digits_task)[7], image_last=True)
    for prompt in (first, replace(first, system="Say little."), last):
        ids, (picture,), (encoded,) = encoder.unexpanded(prompt), encoder.pictures(prompt), encoder([prompt])
        text = vlm.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        made = vlm.processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)
        assert made["input_ids"][0].tolist() == encoded.ids.tolist()
        assert len(ids) < len(encoded.ids), "one placeholder stands for all tokens of the image"
        written = {
            "gemma3": "<start_of_image>",
            "smolvlm": "<image>",
            "internvl": "<IMG_CONTEXT>",
            "gemma4": "<|image|>",
        }.get(family, "<|image_pad|>")
        assert int((ids == vlm.processor.tokenizer.convert_tokens_to_ids(written)).sum()) == 1
        assert prompt.system is None or prompt.system in text, "no template drops it"


# ---- rewards with all members


class Whole:
    """A reward that reaches outside."""

    may_be_missing = needs_base = False

    def __call__(self, samples):
        return [0.0 for _ in samples]

    def prepare(self): ...

    def bind(self, generate, identity): ...

    def metrics(self):
        return {}


def test_a_reward_with_all_members_is_stateful():
    built = build_rewards({"mine": {"weight": 1.0, "fn": f"{__name__}.Whole"}})
    assert isinstance(built["mine"].function, StatefulReward)


@pytest.mark.parametrize("member", STATEFUL)
def test_a_reward_that_lacks_a_member_is_told_which(monkeypatch, member):
    monkeypatch.delattr(Whole, member)
    with pytest.raises(UserError, match=f"rewards.mine.fn: Whole has .*, but lacks {member};"):
        build_rewards({"mine": {"weight": 1.0, "fn": f"{__name__}.Whole"}})


# ---- log-probabilities of another distribution


class Truncated(HFRollout):
    """Its log-probabilities are of what top_k and top_p left."""

    logprobs_untruncated = False


class TruncatedObject(HFRollout):
    """It says so of its objects alone."""

    def __init__(self, vlm):
        super().__init__(vlm)
        self.logprobs_untruncated = False


RESTRICTED = [["rollout.top_k=5"], ["rollout.top_p=0.9"]]
CORRECTED = "trainer.importance_correction=token_mask"


@pytest.mark.parametrize("restricted", RESTRICTED, ids=["top_k", "top_p"])
def test_correction_by_other_numbers_is_refused_before_the_weights_are_loaded(
    compose, monkeypatch, restricted, tmp_path
):
    def loads(config):
        raise AssertionError("too late")

    monkeypatch.setattr(files, "weights_folder", loads)
    config = validate(compose(f"rollout.backend={__name__}.Truncated", CORRECTED, *restricted))
    data = task.build(config)
    with pytest.raises(UserError, match="trainer.importance_correction=token_mask.*rollout.top_k=0 rollout.top_p=1.0"):
        VLMLearner(config, data, torch.device("cpu"), tmp_path, SimpleNamespace(state=None))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "changes",
    [[CORRECTED, "rollout.top_k=0", "rollout.top_p=1.0"], RESTRICTED[0], ["trainer=none", "rollout.top_k=5"]],
    ids=["nothing restricted", "not corrected", "not trained"],
)
def test_other_numbers_are_fine_where_nobody_divides_by_them(compose, changes):
    learner.check_logprobs(validate(compose(*changes)), Truncated)


def test_an_object_may_say_so_too(compose, load_vlm):
    config = validate(compose(CORRECTED, "rollout.top_k=5"))
    learner.check_logprobs(config, HFRollout)
    learner.check_logprobs(config, TruncatedObject)  # the class does not know
    with pytest.raises(UserError, match="logprobs_untruncated=False"):
        learner.check_logprobs(config, TruncatedObject(load_vlm()))


def test_the_doctor_does_not_compare_other_numbers(load_vlm, digits_task, think):
    vlm = load_vlm()
    findings = doctor.examine(
        vlm=vlm,
        encoder=PromptEncoder(vlm, Loader(digits_task.images, 32), 512),
        rollout=Truncated(vlm),
        prompts=think.train_prompts(digits_task)[:8],
        rewards={"short": Reward(1.0, shorter)},
        decoding=replace(DECODING, top_k=50),
        config=CONFIG,
        image_size=32,
        updates=10,
        ranks=1,
        cost=COST,
        seed=1,
    )
    (finding,) = [finding for finding in findings if finding.check == "sampler against trainer"]
    assert finding.verdict == "warning" and "not compared" in finding.seen and "rollout.top_k=0" in finding.fix
