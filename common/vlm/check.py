"""What can be refused before a vision-language model is loaded, and before its method makes anything. No torch."""

from __future__ import annotations

from common.config.schema import NO_FAMILY, Config
from common.data.task import Questions
from common.learner import Prepares
from common.models import checks
from common.plugins import locate
from common.types import UserError


def check(config: Config, questions: Questions) -> None:
    """See `Check` in common/learner.py.

    Raises:
        UserError: Names the key, the file or the image at fault.
    """
    if config.model.family == NO_FAMILY:
        raise UserError(f"model={config.model.name} is no language model, and method={config.method['name']} needs one")
    if config.rollout.check is not None:
        locate(config.rollout.check, "rollout.check")(config)
    checks.check(config, questions)
    if isinstance(questions.method, Prepares):
        questions.method.check(config, questions.task)
