"""The contract of `Rollout`, kept by both backends: what is sampled is what the trainer scores.

Gemma's images attend causally here, in both: vLLM's CPU attention lets no image token see those after it.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoConfig

from clsrl.prompting import ClassListPrompt
from common.config.schema import FAMILIES, LoraConfig
from common.data.loading import Loader
from common.export import bundle
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain
from common.models import extra_embeddings, families, vlm
from common.models.encoder import EncodedPrompt, PromptEncoder
from common.rollout.base import Decoding, Request, requests, sampling_mode
from common.rollout.hf import HFRollout
from common.rollout.vllm.engine import describe
from common.types import CATEGORY, UserError

TOLERANCE = 1e-4  # nats, fp32
SIDE = 48  # pixels; every tiny processor makes 32 of them, and both must do so in the same way
SAMPLE = Decoding(temperature=0.9, top_k=50, top_p=1.0, max_tokens=16)
GREEDY = Decoding(temperature=0.0, top_k=0, top_p=1.0, max_tokens=16)
OPTIONS = {
    **{"prompt_tokens": 512, "completion_tokens": 32, "seed": 1, "image_size": 32, "timeout": 120.0},
    "cpu_kvcache_space": 0.125,  # an engine of each family is kept
}
EXTENDING = [name for name in FAMILIES if families.family(name).extends]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs make setup-vllm")


class Subject:
    """A policy with everything on it that a run may train, and a sampler that has its weights of now."""

    def __init__(self, backend, family, folders, config, task, targets=None, categories=False):
        images = "causal" if families.family(family).both_ways else "family"
        lora = LoraConfig(r=4, targets=targets) if targets else LoraConfig()
        settings = config(family=family, image_attention=images, lora=lora)
        self.vlm = vlm.load(folders[family], settings, torch.device("cpu"))
        if categories:
            width = self.vlm.model.config.get_text_config().hidden_size
            entries = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(5)) * 0.3
            self.vlm = replace(self.vlm, extra_embeddings=extra_embeddings.attach(self.vlm.model, entries, True))
        self.encoder = PromptEncoder(self.vlm, Loader(task.images, SIDE), 512)
        think = ClassListPrompt(instruction="think", seed=1).train_prompts(task)
        self.prompts = [think[0], replace(think[17], image_last=True), replace(think[33], system="Say little.")]
        if categories:
            text = f"One is {CATEGORY}, the other {CATEGORY}."
            self.prompts = [replace(p, text=f"{text} {p.text}", categories=(2, i)) for i, p in enumerate(self.prompts)]
        self.version = 0
        if backend == "hf":
            self.rollout = HFRollout(self.vlm)
        else:
            from common.rollout.vllm.backend import VLLMRollout

            self.rollout = VLLMRollout(self.vlm, **OPTIONS)

    def sample(self, size=4, decoding=SAMPLE, seeds="abc", synchronised=True):
        asked = requests(self.encoder, self.prompts, list(seeds))
        if not synchronised:
            return asked, self.rollout.generate(asked, size, decoding)
        with sampling_mode(self.rollout, self.version):
            return asked, self.rollout.generate(asked, size, decoding)

    @torch.no_grad()
    def scored(self, asked, found, temperature):
        """The trainer's plain forward over the same tokens."""
        scorer = PolicyScorer(self.vlm, temperature, chunk=1024).eval()
        groups = [PromptGroup(r.encoded, tuple(c.ids for c in group)) for r, group in zip(asked, found, strict=True)]
        return scorer(pack_plain(groups, self.vlm.family, self.vlm.pad, self.vlm.device))[0]

    def gap(self, **changes):
        asked, found = self.sample(**changes)
        temperature = changes.get("decoding", SAMPLE).temperature
        sampled = torch.cat([c.logps for group in found for c in group])
        return float((self.scored(asked, found, temperature) - sampled).abs().max())

    @torch.no_grad()
    def update(self, where=lambda name: True):
        """Move what is trained, as an update would."""
        generator = torch.Generator().manual_seed(self.version)
        for name, weight in self.vlm.model.named_parameters():
            if weight.requires_grad and where(name):
                weight += torch.randn(weight.shape, generator=generator) * 0.1 * weight.std().clamp(min=0.05)
        self.version += 1


@pytest.fixture(scope="module")
def make(untrained_folders, digits_task):
    """Engines are slow to start: one for each kind of subject."""
    from common.config.schema import ModelConfig

    made = {}

    def config(**changes):
        values = {"name": "untrained", "dtype": "float32", "image_size": 32, "max_prompt_tokens": 512, **changes}
        return ModelConfig(path=str(untrained_folders[changes["family"]]), **values)

    def subject(backend, family, **options):
        key = backend, family, *options.items()
        if key not in made:
            made[key] = Subject(backend, family, untrained_folders, config, digits_task, **options)
        return made[key]

    yield subject
    for each in made.values():
        each.rollout.close()


@pytest.fixture(
    params=[
        ("hf", "qwen2_vl"),
        ("hf", "gemma3"),
        *(pytest.param(("vllm", name), marks=[needs_vllm, pytest.mark.slow]) for name in FAMILIES),
    ],
    ids="-".join,
)
def subject(request, make):
    return make(*request.param)


def test_what_is_sampled_is_what_is_scored(subject):
    assert subject.gap() < TOLERANCE
    assert subject.gap(decoding=replace(SAMPLE, temperature=1.3, top_k=0, top_p=0.8)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hf", pytest.param("vllm", marks=needs_vllm)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_reaches_the_sampler_and_nothing_of_before_is_left(make, backend, family, record_property):
    """The same prompts before and after: neither a prefix nor an image may be remembered."""
    subject = make(backend, family)
    tower = set(subject.vlm.family.vision)
    gaps, unpushed = [subject.gap()], []
    for moved in (
        lambda name: True,
        lambda name: bool(tower & set(name.split("."))),
    ):  # then images are all that changes
        subject.update(moved)
        unpushed.append(subject.gap(synchronised=False))
        gaps.append(subject.gap())
    record_property("nats", {"before, after an update, after one of the tower": gaps, "unpushed": unpushed})
    if backend == "vllm":
        assert min(unpushed) > 1e-2
    assert max(gaps) < TOLERANCE
    assert {c.version for group in subject.sample()[1] for c in group} == {subject.version}


def test_greedy_replies_are_transformers_own(subject):
    """Each token is the most probable one of the trainer's forward over those before it."""
    asked, found = subject.sample(size=1, decoding=GREEDY)
    banned = torch.tensor(subject.vlm.banned)
    for request, (completion,) in zip(asked, found, strict=True):
        for length in (0, len(completion.ids) // 2, len(completion.ids) - 1):
            logits = next_logits(subject.vlm, request.encoded, completion.ids[:length])
            assert int(logits.index_fill(-1, banned, -torch.inf).argmax()) == int(completion.ids[length])


@torch.no_grad()
def next_logits(model, encoded, begun):
    """Of transformers' own forward over one row. Shape: [V]."""
    ids = torch.cat([encoded.ids, begun])
    inputs = {"input_ids": ids[None]}
    if encoded.pixel_values is not None:
        inputs |= model.family.pixel_inputs([encoded.pixel_values], [] if encoded.grid is None else [encoded.grid])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.model.config.image_token_id).long()[None]
    return model.model(**inputs).logits[0, -1].float()


def test_banned_ids_are_never_sampled(subject):
    """Their rows become twice those of the most probable ids, so that without the ban they would be sampled, too."""
    weight = subject.vlm.model.get_output_embeddings().weight
    kept, banned = weight.detach().clone(), torch.tensor(subject.vlm.banned)
    begun = torch.tensor([], dtype=torch.long)
    with torch.no_grad():
        first = next_logits(subject.vlm, subject.encoder(subject.prompts[:1])[0], begun)
        weight[banned] = 2 * kept[first.topk(len(banned)).indices]
        subject.version += 1
        asked, found = subject.sample(size=16)
        free = torch.stack([next_logits(subject.vlm, r.encoded, begun) for r in asked])
        assert float(free.softmax(-1)[:, banned].sum(-1).mean()) > 0.05, "the ban has nothing to do"
        weight.copy_(kept)
        subject.version += 1
    drawn = torch.cat([c.ids for group in found for c in group])
    assert not torch.isin(drawn, banned).any() and int(drawn.max()) < len(weight)


def test_only_the_most_probable_are_drawn_and_their_numbers_are_of_all(subject):
    asked, found = subject.sample(size=8, decoding=replace(SAMPLE, top_k=3))
    banned = torch.tensor(subject.vlm.banned)
    for request, group in zip(asked, found, strict=True):
        logits = next_logits(subject.vlm, request.encoded, torch.tensor([], dtype=torch.long)) / SAMPLE.temperature
        logps = logits.index_fill(-1, banned, -torch.inf).log_softmax(-1)
        best = logps.topk(3).indices
        for completion in group:
            assert completion.ids[0] in best
            assert float(completion.logps[0]) == pytest.approx(float(logps[completion.ids[0]]), abs=TOLERANCE)
    assert float(logps[best].exp().sum()) < 0.9, "what is left is most of the distribution anyway"


def test_first_tokens_follow_their_distribution(subject):
    free = Decoding(temperature=1.5, top_k=0, top_p=1.0, max_tokens=1)
    (request, *_), (group, *_) = subject.sample(size=600, decoding=free)
    logits = next_logits(subject.vlm, request.encoded, torch.tensor([], dtype=torch.long)) / free.temperature
    expected = logits.index_fill(-1, torch.tensor(subject.vlm.banned), -torch.inf).softmax(-1).double()
    counts = torch.bincount(torch.cat([c.ids for c in group]), minlength=len(expected)).double()
    order = expected.argsort(descending=True)
    bins = (expected[order].cumsum(0) * 10).long().clamp(max=9)  # tokens of a tenth of the mass together
    observed, mass = (torch.zeros(10).double().index_add(0, bins, each[order]) for each in (counts, expected))
    some = mass > 0.01
    assert int(some.sum()) >= 4
    assert chisquare(observed[some], mass[some] * observed[some].sum() / mass[some].sum()).pvalue > 1e-4


def test_completions_of_a_group_differ_and_seeds_matter(subject):
    """Ranks ask with other seeds: the same would teach them the same."""
    first, again = (subject.sample(size=6, seeds=seeds)[1] for seeds in ("aaa", "bbb"))
    for group in first:
        assert len({tuple(c.ids.tolist()) for c in group}) >= 4
    pairs = zip([c for g in first for c in g], [c for g in again for c in g], strict=True)
    assert sum(a.ids.tolist() == b.ids.tolist() for a, b in pairs) <= 2


def test_a_completion_ends_once(subject):
    _, found = subject.sample(size=64, decoding=replace(SAMPLE, max_tokens=24, top_k=0, temperature=3.0))
    completions = [c for group in found for c in group]
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        ended = [int(token) in subject.vlm.eos for token in completion.ids]
        assert ended == [False] * (len(ended) - 1) + [not completion.truncated]
        assert len(completion.logps) == len(completion.ids)
        kept = completion.ids[: len(ended) - (not completion.truncated)]
        said = subject.vlm.processor.tokenizer.decode(kept, skip_special_tokens=False)
        assert completion.text == said.removeprefix(subject.vlm.lead)


def test_a_prompt_without_a_picture(subject):
    ids = torch.tensor(subject.vlm.processor.tokenizer("What is this?", add_special_tokens=False)["input_ids"])
    encoded = EncodedPrompt(ids, subject.vlm.family.positions(ids, None, subject.vlm.model.config))
    asked = [Request(encoded, "text", lambda: ids, list)]
    with sampling_mode(subject.rollout, subject.version):
        found = subject.rollout.generate(asked, 4, SAMPLE)
    sampled = torch.cat([c.logps for c in found[0]])
    assert float((subject.scored(asked, found, SAMPLE.temperature) - sampled).abs().max()) < TOLERANCE


# ---- what else may be trained


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", EXTENDING)
def test_category_embeddings_are_tokens_of_the_engine(make, family):
    subject = make("vllm", family, categories=True)
    assert subject.gap() < TOLERANCE
    subject.update(lambda name: name.endswith("entries"))  # the rows alone
    assert subject.gap(synchronised=False) > 1e-2
    assert subject.gap() < TOLERANCE
    subject.update()  # the vocabulary, too
    assert subject.gap() < TOLERANCE
    _, found = subject.sample(size=16)
    drawn = torch.cat([c.ids for group in found for c in group])
    assert int(drawn.max()) < subject.vlm.extra_embeddings.first


@needs_vllm
@pytest.mark.slow
def test_adapters_on_a_part_of_what_an_engine_keeps_in_one_tensor(make):
    """Queries and values, whose biases and keys stay: what is not pushed would be lost."""
    subject = make("vllm", "qwen2_vl", targets=r".*language_model.*\.(q|v|up)_proj")
    with torch.no_grad():
        for name, weight in subject.vlm.model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)  # they are zero at first
    gaps = [subject.gap()]
    for _ in range(2):
        subject.update()
        assert subject.gap(synchronised=False) > 1e-2
        gaps.append(subject.gap())
    assert max(gaps) < TOLERANCE


@needs_vllm
@pytest.mark.slow
def test_unexpected_prompt_ids_are_an_error(make):
    subject = make("vllm", "qwen2_vl")
    asked, _ = subject.sample()
    wrong = replace(asked[0], unexpanded=lambda: asked[0].unexpanded()[1:])
    with sampling_mode(subject.rollout, subject.version), pytest.raises(RuntimeError, match="other prompt ids"):
        subject.rollout.generate([wrong], 2, SAMPLE)


@needs_vllm
@pytest.mark.slow
def test_images_that_see_both_ways_are_refused_where_the_engine_cannot(load_vlm):
    from common.rollout.vllm.backend import VLLMRollout

    with pytest.raises(UserError, match="model.image_attention=causal"):
        VLLMRollout(load_vlm(family="gemma3"), **OPTIONS)


@pytest.mark.slow
def test_the_largest_picture_is_that_of_the_run(load_vlm, compose, tmp_path):
    """Qwen2-VL's own processor allows 12.8 million pixels, for which an engine would reserve memory."""
    from PIL import Image
    from transformers import AutoProcessor, Qwen2VLImageProcessor

    own = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12_845_056, patch_size=14, merge_size=2)

    def tokens(*sizes):
        grids = own([Image.new("RGB", size) for size in sizes], return_tensors="pt")["image_grid_thw"]
        return (grids.prod(1) // 4).tolist()

    sizes = (384, 384), (3000, 3000), (3000, 1500)
    assert tokens(*sizes) == [196, 107 * 107, 107 * 54]
    families.family("qwen2_vl").bound(SimpleNamespace(image_processor=own), 384)
    assert tokens(*sizes) == [196, 196, 9 * 19]
    assert compose("rollout=vllm", "model=qwen2_vl_2b").rollout.options.image_size == 384

    for name in ("qwen2_vl", "gemma3"):
        vlm = load_vlm(family=name)
        before = dict(vlm.processor.image_processor.size)
        describe(vlm, tmp_path / name, 16)
        written = AutoProcessor.from_pretrained(tmp_path / name).image_processor.size
        assert dict(written) == (before | {"longest_edge": 16 * 16} if name == "qwen2_vl" else before)
        assert dict(vlm.processor.image_processor.size) == before, "the trainer's own stays as it is"


@pytest.mark.slow
def test_an_engine_is_told_what_transformers_keeps_elsewhere(load_vlm, tmp_path):
    """Whether the output projection is the input embedding, and Gemma 4's budget of image tokens."""

    def read(vlm, name):
        describe(vlm, tmp_path / name, 32)
        bundle.save(vlm, tmp_path / "exported" / name, (), 8)
        read, exported = (AutoConfig.from_pretrained(folder / name) for folder in (tmp_path, tmp_path / "exported"))
        assert read.text_config.tie_word_embeddings == exported.text_config.tie_word_embeddings
        assert read.vision_config.to_dict() == exported.vision_config.to_dict()
        return read

    smolvlm = load_vlm(family="smolvlm")
    assert not smolvlm.model.config.text_config.tie_word_embeddings, "transformers looks at the whole configuration"
    assert read(smolvlm, "tied").text_config.tie_word_embeddings
    smolvlm.model.lm_head.weight = torch.nn.Parameter(smolvlm.model.lm_head.weight.detach().clone())
    assert not read(smolvlm, "untied").text_config.tie_word_embeddings
    for side, budget in ((32, 70), (64, 280)):
        assert read(load_vlm(family="gemma4", image_size=side), str(side)).vision_config.default_output_length == budget


@needs_vllm
@pytest.mark.slow
def test_an_engine_reckons_with_the_largest_picture_of_the_run(make):
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    subject = make("vllm", "qwen2_vl")
    budget = MultiModalBudget(subject.rollout.engine.llm.llm_engine.vllm_config, MULTIMODAL_REGISTRY)
    config = subject.vlm.model.config.to_dict()
    assert budget.mm_max_toks_per_item == {"image": subject.vlm.family.image_tokens(config, 32)}
