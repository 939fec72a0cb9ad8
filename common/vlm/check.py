"""Checks of a vision-language run before the model is loaded: devices, files, prompt lengths. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.util import find_spec

from common.config.schema import NO_FAMILY, Config, DataConfig, GRPOConfig
from common.data.task import TaskData
from common.models import meter
from common.models.families import family
from common.models.files import find
from common.plugins import locate
from common.runtime.progress import say
from common.types import CATEGORY, Prompt, Task, UserError
from common.vlm.prompting import TaskPrompts, ask, of_config

ADAPTERS_MOVE = 5e-6  # lowest learning rate at which a paper here trains adapters (ALERT)
INSTEAD = (  # advice for photos, where the tiny model is of no use
    "on a laptop take experiment=photos, on a GPU another model, such as model=qwen2_vl_2b"
)


def check_model(config: Config, task: Task, prompts: Collection[Sequence[Prompt]]) -> None:
    """Check devices, model files, class names and prompt lengths; print warnings.

    Args:
        config: Configuration of the run.
        task: Task with the class names.
        prompts: Prompts of every split.

    Raises:
        UserError: Names the key, the file or the image at fault.
    """
    if config.calibration == "folds":
        raise UserError(
            f"calibration=folds fits a few-shot learner five times more, and method={config.method['name']} trains a"
            " language model: leave it out, and keep photos for it with validation=held_out"
        )
    check_bits(config)
    measure = check_weights(config)
    check_words(config, measure, task)
    check_lengths(config, prompts, measure)
    for line in (unknown_classes(config, task), still_adapters(config)):
        if line:
            say(f"warning: {line}")


def check_words(config: Config, measure: meter.PromptMeter, task: Task) -> None:
    """Check that no class name and no question contains a special token or the mark of an embedding.

    Raises:
        UserError: Names the class or the key.
    """
    # every text that a user can put into a prompt, by how an error message names it
    said = {f"data.{key}={text}": text for key, text in _questions(config.data)}
    for name, target in config.setting.targets.items():
        if name in task.evaluation:
            said |= {f"setting.targets.{name}.{key}={text}": text for key, text in _questions(target)}
    for split in (task.train, *task.evaluation.values()):
        said |= {f"class '{name}'": name for name in split.names}
        said |= {f"'{word}', a word for '{name}'": word for name, words in split.aliases.items() for word in words}
    for what, text in said.items():
        if token := measure.special_token(text):
            raise UserError(
                f"{what}: '{token}' is a special token of model={config.model.name}, which would not read it as text;"
                " write it differently"
            )
        if CATEGORY in text:
            raise UserError(f"{what}: '{CATEGORY}' marks the place of an embedding; write it differently")


def _questions(data: DataConfig) -> tuple[tuple[str, str], ...]:
    return ("question", data.question), ("open_question", data.open_question)


def check_groups(config: Config, prompts: Sequence[Prompt]) -> None:
    """Check that groups can be sampled about as many images as their prompts name, and compared as asked.

    Raises:
        UserError: A group cannot be divided among the images, its samples would be corrected by what belongs to other
            images, or there is no reward of `trainer.zero_variance_by`.
    """
    trainer = config.trainer
    if not isinstance(trainer, GRPOConfig):
        return
    if (by := trainer.zero_variance_by) is not None and by not in config.rewards:
        raise UserError(
            f"trainer.zero_variance_by={by} is no reward of this run; take one of {', '.join(config.rewards)}, or null"
            " for the sum of all"
        )
    parts = 1 + max((len(prompt.sampled_with) for prompt in prompts), default=0)
    if parts == 1:
        return
    method = f"method={config.method['name']}"
    if trainer.group_size % parts:
        raise UserError(
            f"trainer.group_size={trainer.group_size}: a group of {method} is sampled about several images, in equal"
            f" parts; choose a multiple of {parts}"
        )
    if trainer.importance_correction != "none":
        raise UserError(
            f"trainer.importance_correction={trainer.importance_correction}: in {method} some completions are sampled"
            " about other images than they are trained about, so no ratio of trainer to sampler says anything;"
            " set it to none, with rollout.overlap=false"
        )


def check_lengths(config: Config, every_split: Collection[Sequence[Prompt]], measure: meter.PromptMeter) -> None:
    """Check that every prompt is within `model.max_prompt_tokens` and fits the context with its completion."""
    limit, completion = config.model.max_prompt_tokens, config.rollout.max_completion_tokens
    bounds = [limit] if limit is not None else []
    # prompt and completion share the context of the model
    if measure.context is not None:
        bounds.append(measure.context - completion)
    if not bounds:
        return
    for prompts in every_split:
        if (found := measure.over(prompts, config.model.image_size, min(bounds))) is None:
            continue
        length, prompt = found
        if limit is not None and length > limit:
            raise meter.too_long(length, limit, prompt)
        raise UserError(
            f"the prompt of image {prompt.image} has {length} tokens, and with"
            f" rollout.max_completion_tokens={completion} that is more than the {measure.context} that"
            f" model={config.model.name} can read: lower rollout.max_completion_tokens, or list fewer names"
            " (setting.list_share)"
        )


def unknown_classes(config: Config, task: Task) -> str | None:
    """Return a warning if the model's recipe was pre-trained on other classes than those of the data, else None.

    A recipe without `knows` was pre-trained on no particular classes.
    """
    if config.model.path is not None or config.model.recipe is None:
        return None
    known: frozenset[str] | None = getattr(import_module(config.model.recipe), "knows", None)
    splits = [task.train, *task.evaluation.values()]
    # every class name once, in the order of the splits
    names = dict.fromkeys(name for split in splits for name in split.names)
    if known is None or not (unknown := [name for name in names if name.lower() not in known]):
        return None
    return (
        f"model={config.model.name} was taught {len(known)} classes only ({', '.join(sorted(known)[:3])}, …); of"
        f" data={config.data.name} it cannot know {len(unknown)} of {len(names)}, first: '{unknown[0]}'. It will hardly"
        f" earn a reward there; {INSTEAD}"
    )


def still_adapters(config: Config) -> str | None:
    """Return a warning if adapters would be trained at a learning rate meant for full fine-tuning, else None."""
    r, rate = config.model.lora.r, config.trainer.learning_rate
    if config.trainer.name == "none" or r == 0 or rate >= ADAPTERS_MOVE:
        return None
    return (
        f"model.lora.r={r} with trainer.learning_rate={rate:g}: at a rate for whole weights adapters hardly move;"
        " experiment=lora has one of their own, or give trainer.learning_rate"
    )


def check_bits(config: Config) -> None:
    """Check that weights in 8 or 4 bits can be used: a GPU, bitsandbytes, and no ZeRO-3."""
    bits = config.model.bits
    if bits is None:
        return
    key = f"model.load_in_{bits}bit"
    if config.gpus == 0:
        raise UserError(f"{key}=true needs a GPU: set gpus=1 or more, or {key}=false")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{key}=true needs bitsandbytes: uv pip install bitsandbytes")
    if config.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError(f"{key}=true: ZeRO-3 cannot shard {bits}-bit weights; choose deepspeed=zero2")


def check_weights(config: Config) -> meter.PromptMeter:
    """Check files and image size of the model and return its prompt meter; weights are not downloaded yet.

    Raises:
        UserError: A file is missing or damaged, or the processor would enlarge the images.
    """
    model = config.model
    if model.path is None:
        assert model.recipe is not None
        return meter.of_a_recipe(model.recipe)
    folder = find(model.path, model.revision, weights=False)
    measure = meter.of_folder(folder, model.family)
    if model.image_size < measure.smallest:  # prompts would be longer than they are measured
        raise UserError(
            f"model.image_size={model.image_size}: the processor of model {folder} enlarges images below"
            f" {measure.smallest} pixels; set model.image_size={measure.smallest} or more"
        )
    return measure


def check_vlm(config: Config, data: TaskData) -> TaskPrompts:
    """Run all checks and return the prompts: the `Check` (common/learner.py) of a vision-language run.

    Raises:
        UserError: Names the key, the file or the image at fault.
    """
    if config.model.family == NO_FAMILY:
        raise UserError(f"model={config.model.name} is no language model, and method={config.method['name']} needs one")
    if config.rollout.check is not None:
        locate(config.rollout.check, "rollout.check")(config)
    prompts = ask(of_config(config), data.task)
    if prompts.prompting.embeddings(data.task) and not family(config.model.family).extends:
        raise UserError(
            f"method={config.method['name']} gives the model embeddings beside its vocabulary, for which"
            f" model.family={config.model.family} has no place: choose another model, such as model=gemma3_4b"
        )
    prompts.prompting.evaluates_by(data.task, config.rewards)
    prompts.prompting.sources(data.task)  # hashes the method's files, so a missing one is reported now
    check_groups(config, prompts.train)
    check_model(config, data.task, [prompts.train, *prompts.evaluation.values()])
    return prompts
