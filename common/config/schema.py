"""Types of the configuration: one dataclass per group of conf/.

YAML files hold the values, these classes the types, so Hydra refuses misspelt keys and wrong types. Rules about single
groups are in `__post_init__`, rules across groups in common/config/composition.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from common.types import UserError

CONF = Path(__file__).parent.parent.parent / "conf"  # at this place both in the checkout and in the wheel


def one_of(key: str, value: object, allowed: tuple[str | bool, ...]) -> None:
    """Raise a UserError if a value is not among `allowed`."""
    if value not in allowed:
        names = [str(choice).lower() if isinstance(choice, bool) else choice for choice in allowed]
        raise UserError(f"{key}={value}: choose one of {', '.join(names)}")


def positive(key: str, value: float) -> None:
    """Raise a UserError if a value is zero or below."""
    if not value > 0:
        raise UserError(f"{key}={value} must be above 0")


# Groups `learner`, `clip` and `visual`.


@dataclass
class LearnerConfig:
    """The kind of learner that is trained and tested (common/learner.py).

    build: its class.
    check: function that checks its configuration.
    needs_shots: it uses the few-shot images even without a `trainer`, so its classes are those of these images.
    """

    name: str = MISSING
    build: str = MISSING
    check: str = MISSING
    needs_shots: bool = True


@dataclass
class EncoderConfig:
    """A frozen image encoder whose features few-shot learners are fitted on.

    load: function that loads it, null: none.
    options: arguments of that function.
    dtype: number format of computation and stored features.
    views: number of random views of a training image, after which training repeats them, and number of further ones
        for cache keys; null: a new view in every epoch.
    crop: smallest and largest share of the image that a view covers; null: the learner's default.
    flip: probability that a view is mirrored.
    """

    name: str = MISSING
    load: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    batch: int = 64
    views: int | None = 10
    crop: list[float] | None = None
    flip: float = 0.5

    def __post_init__(self) -> None:
        one_of("clip.dtype, visual.dtype", self.dtype, ("float32", "float16"))
        positive("clip.batch, visual.batch", self.batch)
        if self.views is not None:
            positive("clip.views, visual.views", self.views)
        if self.crop is not None and (len(self.crop) != 2 or not 0 < self.crop[0] <= self.crop[1] <= 1):
            raise UserError(f"clip.crop, visual.crop={self.crop} must be two shares of a picture, such as [0.5,1]")
        if not 0 <= self.flip <= 1:
            raise UserError(f"clip.flip, visual.flip={self.flip} must be a probability")


@dataclass
class ClipConfig(EncoderConfig):
    """A CLIP model, which also encodes text.

    templates: prompt templates with {} for a class name.
    prompts: JSON file with sentences for every class, instead of templates.
    """

    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    prompts: str | None = None


# Groups `data`, `setting` and `protocol`.

# see `Sampling` in common/data/sampling.py
SAMPLERS = ("coop", "clsrl")
VALIDATIONS = ("few", "full", "none", "held_out")
TEST_ROWS = ("test", "val_and_test")


@dataclass
class DataConfig:
    """A dataset: its location, its reader, and the questions about its images.

    reader: `_target_` and keyword arguments of the function that finds images and labels.
    hub: the same for `source=hub`, if an id on the hub is known.
    root: folder of all datasets.
    folder: folder of this one, inside root or absolute.
    cache_gb: disk space for decoded images.
    aliases: JSON file from class names to synonyms.
    published: expected sizes of the splits.
    duplicates: what to do about duplicate images (`warn`, `refuse`, `ignore`).
    near_duplicates: also look for near-duplicates; null: if there are at most 20,000 images.
    background: colour behind transparent parts, as a name (black) or in hexadecimal ('#80a0ff').
    own_photos: the few-shot images need not equal those of other people's runs, so unusable images are replaced,
        and the folder may also be inside the working directory.
    licence: licence of the images, for model cards.
    """

    name: str = MISSING
    folder: str = MISSING
    reader: dict[str, Any] = field(default_factory=dict)
    question: str = MISSING
    open_question: str = "What type of object is in the photo?"
    root: str | None = "${oc.env:DATA,null}"
    source: str = "local"
    hub: dict[str, Any] = field(default_factory=dict)
    allow_fallback_split: bool = False
    skip_bad: bool = False
    cache_gb: float = 10.0
    aliases: str | None = None
    published: dict[str, int] = field(default_factory=dict)
    duplicates: str = "warn"
    near_duplicates: bool | None = False
    background: str = "white"
    own_photos: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        one_of("data.source", self.source, ("local", "hub"))
        one_of("data.duplicates", self.duplicates, ("warn", "refuse", "ignore"))
        if self.near_duplicates and self.duplicates == "ignore":
            raise UserError("data.near_duplicates=true needs data.duplicates=warn or refuse, not ignore")
        if self.background != "white":
            _check_colour("data.background", self.background)
        if self.cache_gb < 0:
            raise UserError(f"data.cache_gb={self.cache_gb} must be 0 (no cache) or a size in GiB")
        if self.source == "hub" and not self.hub:
            raise UserError(
                f"data={self.name}: no hub id with this dataset's images and names is known; docs/datasets.md"
            )


def _check_colour(key: str, value: str) -> None:
    from PIL import ImageColor

    try:
        opaque = len(ImageColor.getrgb(value)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise UserError(f"{key}={value} is no colour: give a name such as white, black or grey, or one like '#80a0ff'")


@dataclass
class SettingConfig:
    """Which classes and datasets the model is tested on, relative to the training data.

    build: function that assembles the splits.
    list_share: share of the class names that a question lists; 0: open question.
    targets: further datasets to test on.
    test_on: names of the targets to use, null: all of them.
    test_per_class: number of test images of each class, the same ones for all seeds except images that a seed
        trains on; null: all images.
    """

    name: str = MISSING
    build: str = MISSING
    list_share: float = 0.4
    targets: dict[str, DataConfig] = field(default_factory=dict)
    test_on: list[str] | None = None
    test_per_class: int | None = None

    def __post_init__(self) -> None:
        if self.test_per_class is not None:
            positive("setting.test_per_class", self.test_per_class)
        if not 0 <= self.list_share <= 1:
            raise UserError(f"setting.list_share={self.list_share} must be between 0 (open question) and 1")


@dataclass
class ProtocolConfig:
    """Choices in which the code of the CLS-RL authors and a sound evaluation differ, as separate switches.

    articles: accept an answer that begins with a, an or the; only in the strict match of evaluations, never in
        rewards.
    """

    name: str = MISSING
    accuracy_match: str = MISSING
    format_match: str = MISSING
    evaluation_prompt: str = MISSING
    sampler: str = MISSING
    test_rows: str = MISSING
    sft_loss: str = MISSING
    sft_system_prompt: str = MISSING
    sft_question: str = MISSING
    sft_image: str = MISSING
    sft_target: str = MISSING
    articles: bool = False

    def __post_init__(self) -> None:
        for key in ("accuracy_match", "format_match"):
            one_of(f"protocol.{key}", getattr(self, key), ("strict", "official"))
        one_of("protocol.evaluation_prompt", self.evaluation_prompt, ("train", "official"))
        one_of("protocol.sampler", self.sampler, SAMPLERS)
        one_of("protocol.test_rows", self.test_rows, TEST_ROWS)
        one_of("protocol.sft_loss", self.sft_loss, ("answer", "everything"))
        one_of("protocol.sft_system_prompt", self.sft_system_prompt, ("default", "think"))
        one_of("protocol.sft_question", self.sft_question, ("instructed", "bare"))
        one_of("protocol.sft_image", self.sft_image, ("first", "last"))
        one_of("protocol.sft_target", self.sft_target, ("label", "tagged"))


# The other groups, and the whole configuration.

# short names of model families; `model.family` may also be a dotted path (see common/models/families.py)
NO_FAMILY = "none"  # for learners without a language model
FAMILIES = {
    "qwen2_vl": "common.models.families.Qwen2VL",
    "qwen2_5_vl": "common.models.families.Qwen25VL",
    "qwen3_vl": "common.models.families.Qwen3VL",
    "gemma3": "common.models.families.Gemma3",
    "smolvlm": "common.models.families.SmolVLM",
    "internvl": "common.models.families.InternVL",
    "gemma4": "common.models.families.Gemma4",
}
# choices of common/training/grpo/; sources in its docstrings
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
LEVELS = ("token", "sequence")
SCALINGS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REPLACED = ("resample", "refill")  # zero-variance groups are sampled again, for the same prompt or for another


@dataclass
class LoraConfig:
    """Low-rank adapters of rank `r` (0: fine-tune all weights) on modules whose full name matches `targets`.

    targets: regular expression; null: no modules.
    projector: what is also trained of the projector between vision tower and language model: `none`, `lora`
        (adapters on its matrices) or `full` (all its weights; with r=0 nothing else).
    """

    r: int = 0
    alpha: int = 32
    targets: str | None = r".*(language|text)_model.*\.(q|k|v|o|gate|up|down)_proj"
    projector: str = "none"

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(f"model.lora.r={self.r} must be 0 (fine-tune all weights) or a rank above 0")
        one_of("model.lora.projector", self.projector, ("none", "lora", "full"))
        if self.projector == "lora" and self.r == 0:
            raise UserError("model.lora.projector=lora needs a rank: set model.lora.r, or model.lora.projector=full")
        if self.targets is None and self.r > 0 and self.projector != "lora":
            raise UserError(f"model.lora.targets=null leaves nothing for model.lora.r={self.r}: set model.lora.r=0")

    @property
    def wraps(self) -> bool:
        """Return whether PEFT wraps the model, so that its own weights stay frozen."""
        return self.r > 0 or self.projector == "full"


@dataclass
class ModelConfig:
    """A model: a folder (whole model or adapters) or hub id (`path`), or built by the module `recipe`.

    resize: how an image becomes image_size x image_size: `squash`, `crop` (resize the shorter side, then centre
        crop) or `pad`.
    max_prompt_tokens: longer prompts are refused; null: only those beyond the context length.
    image_attention: `family` (that of the architecture) or `causal`.
    attention: how completions attend to their prompt, with the same result: `copy` (each has a copy of its keys),
        `merge` (no copies), or by size (`auto`).
    freeze_vision: freeze vision tower and projector, except for what `lora.projector` trains.
    feature_cache_gb: disk space for image features of a frozen tower, 0: no cache.
    load_in_8bit: LLM.int8() of bitsandbytes, for the base of adapters or without training.
    load_in_4bit: the same with NF4 and quantised scales, as in QLoRA (arXiv 2305.14314).
    licence: licence of the weights.
    """

    name: str = MISSING
    family: str = MISSING
    path: str | None = None
    revision: str | None = None
    recipe: str | None = None
    dtype: str = "bfloat16"
    image_size: int = MISSING
    resize: str = "squash"
    max_prompt_tokens: int | None = None
    gradient_checkpointing: bool = False
    image_attention: str = "family"
    attention: str = "auto"
    freeze_vision: bool = False
    feature_cache_gb: float = 0.0
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    licence: str | None = None

    def __post_init__(self) -> None:
        one_of("model.resize", self.resize, ("squash", "crop", "pad"))
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.image_attention", self.image_attention, ("family", "causal"))
        one_of("model.attention", self.attention, ("auto", "copy", "merge"))
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("model.load_in_8bit and model.load_in_4bit are both true: choose one of them")
        if self.feature_cache_gb > 0 and not self.freeze_vision:
            raise UserError("model.feature_cache_gb needs model.freeze_vision=true: features of a trained tower change")
        if self.feature_cache_gb > 0 and self.lora.projector != "none":
            raise UserError("model.feature_cache_gb must be 0: it keeps what model.lora.projector changes")
        if self.path is None and self.recipe is None and self.family != NO_FAMILY:
            raise UserError("model.path and model.recipe are null: set model.path=<folder or hub id>")

    @property
    def bits(self) -> int | None:
        """Return the bits per number of a base that is kept in 8 or 4 bits, else None."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None


ADAMW = "torch.optim.AdamW"
GRPO_LOSS = "common.training.grpo.loss.grpo_loss"
GRPO_ADVANTAGES = "common.training.grpo.loss.grpo_advantages"


@dataclass
class TrainerConfig:
    """Optimisation shared by GRPO and SFT; an update is one optimiser step over `prompts_per_update` prompts.

    embedding_learning_rate: learning rate of embeddings behind the vocabulary; null: that of the other weights.
    embeddings: keep these embeddings as parameters on every `device`, or on the `host`, from which a batch fetches
        the rows that it needs.
    patience: early stopping after so many evaluations without a better one; 0: off.
    optimizer: class with the signature of torch's optimizers; it gets `params`, `lr` and, if it takes them, `betas`
        and `weight_decay`.
    optimizer_options: further arguments of the optimizer.
    """

    name: str = MISSING
    learning_rate: float = 0.0
    embedding_learning_rate: float | None = None
    embeddings: str = "device"
    schedule: str = "linear"
    final_ratio: float = 0.0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    grad_clip: float = 1.0
    epochs: float = 0.0
    updates: int | None = None
    prompts_per_update: int = 16
    prompts_per_forward: int = 1
    evaluate_every: int = 0
    evaluate_limit: int | None = None
    patience: int = 0
    optimizer: str = ADAMW
    optimizer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("trainer.schedule", self.schedule, ("linear", "cosine", "constant"))
        one_of("trainer.embeddings", self.embeddings, ("device", "host"))
        if self.name == "none":
            return
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"trainer.betas={self.betas}: AdamW takes two from 0 to below 1")
        for key in ("warmup_ratio", "final_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"trainer.{key}={getattr(self, key)} must be between 0 and 1")
        for key in ("evaluate_every", "weight_decay", "grad_clip", "patience"):
            if getattr(self, key) < 0:
                raise UserError(f"trainer.{key}={getattr(self, key)} must not be negative (0: off)")
        if self.patience and not self.evaluate_every:
            raise UserError(f"trainer.patience={self.patience} waits for evaluations: set trainer.evaluate_every")
        if self.evaluate_limit is not None:
            positive("trainer.evaluate_limit", self.evaluate_limit)
        if self.embedding_learning_rate is not None:
            positive("trainer.embedding_learning_rate", self.embedding_learning_rate)
        for key in ("learning_rate", "prompts_per_update", "prompts_per_forward"):
            positive(f"trainer.{key}", getattr(self, key))
        if self.updates is None:
            positive("trainer.epochs", self.epochs)
        else:
            positive("trainer.updates", self.updates)


@dataclass
class GRPOConfig(TrainerConfig):
    """Group Relative Policy Optimization (arXiv 2402.03300).

    loss: function `(LossInputs, GRPOConfig, **loss_options) -> LossOutputs`.
    advantages: function `(parts [K, N, G], weights [K], GRPOConfig, **advantages_options) -> [N, G]` of the rewards
        of all completions of the update. Both are described in common/training/grpo/loss.py.
    steps_per_rollout: number of updates that a rollout batch is divided among, each on whole groups of its own.
    num_iterations: number of times that a rollout batch is gone through.
    zero_variance_by: name of the reward in which the completions of a group must differ for `zero_variance`; null: the
        weighted sum of all.
    """

    loss: str = GRPO_LOSS
    loss_options: dict[str, Any] = field(default_factory=dict)
    advantages: str = GRPO_ADVANTAGES
    advantages_options: dict[str, Any] = field(default_factory=dict)
    group_size: int = MISSING
    beta: float = MISSING
    epsilon: float = MISSING
    epsilon_high: float | None = None
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    scale_rewards: str = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    mask_truncated_completions: bool = False
    use_bias_correction_kl: bool = False
    steps_per_rollout: int = 1
    num_iterations: int = 1
    importance_correction: str = "none"
    importance_cap: float = 3.0
    importance_floor: float = 0.0
    zero_variance: str = "keep"
    zero_variance_by: str | None = None
    resample_rounds: int = 3
    impl: str = "auto"
    self_check: bool = True
    tokens_per_forward: int | None = None
    head_chunk: int = 128
    shuffle_rewards: bool = False

    @property
    def updates_per_rollout(self) -> int:
        """Number of updates on one rollout batch."""
        return self.steps_per_rollout * self.num_iterations

    @property
    def prompts_per_rollout(self) -> int:
        """Number of prompts of a rollout batch."""
        return self.steps_per_rollout * self.prompts_per_update

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("trainer.impl", self.impl, ("auto", "shared", "plain"))
        one_of("trainer.loss_type", self.loss_type, LOSS_TYPES)
        one_of("trainer.importance_sampling_level", self.importance_sampling_level, LEVELS)
        one_of("trainer.scale_rewards", self.scale_rewards, SCALINGS)
        one_of("trainer.multi_objective_aggregation", self.multi_objective_aggregation, AGGREGATIONS)
        one_of("trainer.zero_variance", self.zero_variance, ("keep", "skip", *REPLACED))
        one_of("trainer.importance_correction", self.importance_correction, CORRECTIONS)
        for key in ("head_chunk", "steps_per_rollout", "num_iterations", "importance_cap", "resample_rounds"):
            positive(f"trainer.{key}", getattr(self, key))
        if not 0 <= self.importance_floor < self.importance_cap:
            raise UserError(
                f"trainer.importance_floor={self.importance_floor} must be 0 or more, and below trainer.importance_cap"
            )
        if self.tokens_per_forward is not None:
            positive("trainer.tokens_per_forward", self.tokens_per_forward)
        if self.epsilon_high is not None:
            positive("trainer.epsilon_high", self.epsilon_high)
        if self.group_size < 2:
            raise UserError(
                f"trainer.group_size={self.group_size}: GRPO compares completions of one prompt, use at least 2"
            )
        if self.beta < 0 or self.epsilon <= 0:
            raise UserError(f"trainer.beta={self.beta} must be >= 0 and trainer.epsilon={self.epsilon} > 0")


@dataclass
class RolloutConfig:
    """How completions are sampled for training, and how many tokens evaluation may use.

    options: keyword arguments of the backend.
    check: function that checks, before weights are loaded, whether the backend supports the configuration; null:
        none.
    overlap: sample the next batch during an update, with weights that are one update old; a resumed run samples
        that batch again, so it differs from an uninterrupted run.
    """

    name: str = MISSING
    backend: str = MISSING
    check: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    max_completion_tokens: int = MISSING
    evaluation_batch: int = MISSING
    overlap: bool = False

    def __post_init__(self) -> None:
        positive("rollout.temperature", self.temperature)
        positive("rollout.max_completion_tokens", self.max_completion_tokens)
        positive("rollout.evaluation_batch", self.evaluation_batch)
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"rollout.top_k={self.top_k} must be >= 0 (0: off), rollout.top_p={self.top_p} in (0, 1]")


@dataclass
class TrackingConfig:
    """Logging to Weights & Biases. `mode: auto` is online with an API key and offline without one.

    completions_every: number of updates between two tables of sampled completions.
    completions_rows, predictions_rows: rows of such a table, and of the table of predictions at the end.
    thumbnails: number of images per split, and of training images, of which small copies are kept in the run folder
        for its report; 0: none.
    report: write report.html at the end of a run.
    tracker: class with the constructor of `WandbTracker` and the members of `Tracker` (common/run/tracking.py).
    """

    name: str = MISSING
    project: str = MISSING
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"
    completions_every: int = 10
    completions_rows: int = 8
    predictions_rows: int = 32
    thumbnails: int = 1000
    report: bool = True
    tracker: str = "common.run.tracking.WandbTracker"

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept.

    every: number of updates between two checkpoints; 0: only at the best evaluation, which always writes one, and
        at the end.
    """

    every: int = 50
    max_checkpoints: int = 2

    def __post_init__(self) -> None:
        positive("checkpoint.max_checkpoints", self.max_checkpoints)
        if self.every < 0:
            raise UserError(f"checkpoint.every={self.every} must be 0 (off) or a number of updates")


@dataclass
class Config:
    """Configuration of one run."""

    method: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = MISSING
    setting: SettingConfig = MISSING
    protocol: ProtocolConfig = MISSING
    learner: LearnerConfig = MISSING
    model: ModelConfig = MISSING
    rewards: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerConfig = MISSING
    clip: ClipConfig | None = None
    visual: EncoderConfig | None = None
    few_shot: dict[str, Any] | None = None
    selection: str = "val"
    calibration: str = "val"
    rollout: RolloutConfig = MISSING
    deepspeed: dict[str, Any] = field(default_factory=dict)
    tracking: TrackingConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    label_scoring: Any = True
    doctor: Any = "auto"
    evaluate: str = "last"
    manifest: bool = False
    dry: bool = False
    shots: Any = 16
    seed: int = 1
    sampler: str = MISSING
    validation: str = "few"
    test_share: float | None = None
    min_per_class: int = 1
    gpus: int = MISSING
    cache_dir: str = MISSING
    label: str | None = None
    run_name: str = MISSING
