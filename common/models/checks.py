"""What a vision-language model can be checked for in a second: devices, files, lengths of the prompts. No torch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from common.config.schema import Config
from common.data.task import Questions
from common.models import files, meter
from common.runtime.progress import say
from common.types import UserError

INSTEAD = (  # of a tiny model, on photos
    "on a laptop take method=linear_probe clip=none visual=lite0, on a GPU another model, such as model=qwen2_vl_2b"
)


def check(config: Config, questions: Questions) -> None:
    """See `Check` in common/learner.py.

    Raises:
        UserError: Names the key, the file or the image at fault.
    """
    check_8bit(config)
    measure = check_weights(config)
    for prompts in (questions.train, *questions.evaluation.values()):
        if not prompts:
            continue
        lengths = measure.tokens(prompts, config.model.image_size)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > config.model.max_prompt_tokens:
            raise meter.too_long(lengths[longest], config.model.max_prompt_tokens, prompts[longest])
    if line := unknown_classes(config, questions):
        say(f"warning: {line}")


def unknown_classes(config: Config, questions: Questions) -> str | None:
    """What to say if the model is of a recipe that was taught other classes than those of the data; else None.

    A recipe that does not say what it `knows` was taught no certain classes.
    """
    if config.model.path is not None or config.model.recipe is None:
        return None
    known: frozenset[str] | None = getattr(import_module(config.model.recipe), "knows", None)
    splits = [questions.task.train, *questions.task.evaluation.values()]
    names = dict.fromkeys(name for split in splits for name in split.names)
    if known is None or not (unknown := [name for name in names if name.lower() not in known]):
        return None
    return (
        f"model={config.model.name} was taught {len(known)} classes only ({', '.join(sorted(known)[:3])}, …); of"
        f" data={config.data.name} it cannot know {len(unknown)} of {len(names)}, first: '{unknown[0]}'. It will hardly"
        f" earn a reward there; {INSTEAD}"
    )


def check_8bit(config: Config) -> None:
    """8-bit weights are bitsandbytes' and for GPUs alone."""
    if not config.model.load_in_8bit:
        return
    if config.gpus == 0:
        raise UserError("model.load_in_8bit=true needs a GPU: set gpus=1 or more, or model.load_in_8bit=false")
    if find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_8bit=true needs bitsandbytes: uv pip install bitsandbytes")
    if config.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError("model.load_in_8bit=true: ZeRO-3 cannot shard 8-bit weights; choose deepspeed=zero2")


def check_weights(config: Config) -> meter.PromptMeter:
    """Check the files of the model and return its prompt meter; weights on the hub are not fetched yet."""
    model = config.model
    if model.path is None:
        assert model.recipe is not None
        return meter.of_a_recipe(model.recipe)
    return meter.of_folder(files.find(model.path, model.revision, weights=False), model.family)
