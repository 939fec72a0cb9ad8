"""What can be refused before a vision-language model is loaded, and before its method makes anything. No torch."""

from __future__ import annotations

from common.config.schema import NO_FAMILY, Config
from common.data.task import TaskData
from common.models import checks
from common.plugins import locate
from common.types import UserError
from common.vlm import prompting
from common.vlm.prompting import TaskPrompts


def check(config: Config, data: TaskData) -> TaskPrompts:
    """See `Check` in common/learner.py.

    Raises:
        UserError: Names the key, the file or the image at fault.
    """
    if config.model.family == NO_FAMILY:
        raise UserError(f"model={config.model.name} is no language model, and method={config.method['name']} needs one")
    if config.rollout.check is not None:
        locate(config.rollout.check, "rollout.check")(config)
    asked = prompting.ask(prompting.of_config(config), data.task)
    asked.prompting.sources(data.task)  # files that are missing are named before anything is loaded
    checks.check(config, data.task, [asked.train, *asked.evaluation.values()])
    return asked
