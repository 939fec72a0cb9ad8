"""What both papers share: configuration, data, models, training, evaluation, reports, and trained models at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.predict.classifier import Answer, Classifier

__version__ = "0.2.0"
__all__ = ["Answer", "Classifier"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch is imported for those who ask
        from common.predict import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'common' has no attribute {name!r}")
