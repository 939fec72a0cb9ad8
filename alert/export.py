"""Export ALERT's category embeddings as words of the vocabulary, so that a plain model reads them.

Shapes: C categories, m tokens of an image, D width, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alert.bank import file as bank_file
from alert.prompt import meta_task
from common.models.extra_embeddings import rows_of_vocabulary
from common.rollout.vllm.weights import ROUND
from common.types import CATEGORY, Prompt
from common.vlm.prompting import Words


def words(names: Sequence[str], tokens: int) -> list[str]:
    """Return the text of each category: as many new words as an image has tokens.

    >>> words(["six", "nine"], 2)
    ['<category_0_0><category_0_1>', '<category_1_0><category_1_1>']
    """
    return ["".join(f"<category_{label}_{place}>" for place in range(tokens)) for label in range(len(names))]


def into_vocabulary(model: Any, processor: Any, silent: int, bank: Path, instruction: str) -> Words:
    """Append the categories of a bank to the vocabulary of a model; implements `VLMLearner.into_vocabulary`.

    `bank`: its folder; `instruction`: of the method.
    """
    names = bank_file.facts(bank)["names"]
    entries = bank_file.read(bank, names)
    texts = words(names, entries.shape[1])
    new = add_rows(model, processor.tokenizer, texts, entries, silent)
    wording = meta_task(names[:2], instruction)
    for text in texts[:2]:
        wording = wording.replace(CATEGORY, text, 1)
    return Words(new, dict(zip(names, texts, strict=True)), Prompt("", wording, names[0], names[:2], image_last=True))


def add_rows(model: Any, tokenizer: Any, texts: Sequence[str], entries: torch.Tensor, silent: int) -> range:
    """Append words to the vocabulary whose embeddings are the entries of a bank.

    Args:
        model: Model to change, in place.
        tokenizer: Tokenizer to change, in place.
        texts: Texts from `words`. Length: C.
        entries: Category embeddings. Shape: [C, m, D].
        silent: Id of a token that is never generated.

    Returns:
        Ids of the words and of the rows that pad the vocabulary; none of them is ever generated.
    """
    first, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"{word}>" for text in texts for word in text.split(">")[:-1]], special_tokens=True)
    new = range(first, len(tokenizer))
    assert len(new) == entries.shape[0] * entries.shape[1], "a word of the categories was known already"
    silenced = new
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROUND, mean_resizing=False)
        silenced = range(first, model.get_input_embeddings().num_embeddings)  # padding rows are random
    embedding = model.get_input_embeddings()
    # Categories are only read, never generated. An output projection untied from the embeddings gives them the logit
    # of the silent token.
    said = embedding.weight.detach().clone() if tied(model) else model.lm_head.weight.detach()
    said[silenced.start : silenced.stop] = said[silent].clone()
    model.lm_head.weight = torch.nn.Parameter(said)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    with torch.no_grad():
        embedding.weight[new.start : new.stop] = rows_of_vocabulary(embedding, entries).to(embedding.weight)
    return silenced


def tied(model: Any) -> bool:
    """Return whether a model's output projection is its embedding matrix."""
    return model.lm_head.weight is model.get_input_embeddings().weight
