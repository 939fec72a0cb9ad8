"""ReFine-RFT (Zhu et al. 2026, arXiv 2601.06993): several rewards, each normalised in its group; short thoughts earn.

The paper finds that long thoughts cost accuracy on fine-grained classes. Its rewards here: format, accuracy
(Visual-RFT's), and the length of the thoughts. Two with a weight of 0.1 are left out, a served model's grade and the
similarity of text embeddings: add functions of your own under `rewards`. The advantages are
`common.training.grpo.variants.mrn`. Empty tags earn as much as a right answer with longer thoughts.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.parsing import THOUGHT
from common.types import Sample


def short_thoughts(samples: Sequence[Sample], *, characters: int = 10) -> list[float]:
    """Return 1 when the thoughts have fewer characters than that, else 0; also 0 without thoughts.

    Args:
        samples: Completions to score. Length: N.
        characters: Characters between the tags from which on nothing is earned. The authors' code has 10, so empty
            thoughts are best.
    """
    found = [THOUGHT.search(s.completion) for s in samples]
    return [float(match is not None and len(match["think"]) < characters) for match in found]
