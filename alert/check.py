"""What can be refused of an ALERT run before a model is loaded. No torch."""

from __future__ import annotations

from alert.categories import check_images
from common.config.schema import Config
from common.data.task import TaskData
from common.few_shot.check import check_fit
from common.types import UserError
from common.vlm import check as vlm_check
from common.vlm.prompting import TaskPrompts


def check(config: Config, data: TaskData) -> TaskPrompts:
    """See `Check` in common/learner.py.

    Raises:
        UserError: Names the key, the file, the class or the image at fault.
    """
    if config.method["draft"] == "few_shot" and config.few_shot is None:
        raise UserError("method.draft=few_shot: no few-shot learner is chosen; add one, such as few_shot=cafo")
    check_images(data.task)
    asked = vlm_check.check(config, data)
    if config.method["draft"] == "few_shot":
        check_fit(config, data.task)
    return asked
