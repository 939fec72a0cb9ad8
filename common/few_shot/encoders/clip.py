"""Load CLIP and any other two-tower model of open_clip, from the hub or a local file. The tiny CLIP is in tiny.py.

OpenAI's models compute with the quick form of GELU: choose `RN50-quickgelu`. For plain `RN50` open_clip only warns.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.few_shot.encoders.encoder import CLIP_MEAN, CLIP_STD, Preprocessing
from common.types import UserError

TEXTS = 256  # texts in a forward


class TwoTowers:
    """An open_clip model with an image tower and a text tower: SigLIP, SigLIP 2, PE, EVA02.

    Features of single positions and token embeddings exist for CLIP's own architecture alone (`OpenClip`).
    """

    positions = 0

    def __init__(
        self, model: Any, tokenize: Callable[[list[str]], Tensor], look: Preprocessing, identity: str, source: str
    ) -> None:
        """
        Args:
            model: An open_clip model with `encode_image` and `encode_text`.
            tokenize: Texts to ids, cut to the context. Shape: [T, tokens].
            look: Size and normalisation of its pictures.
            identity: Name of model and weights, for caches.
            source: Origin of the weights, for messages.
        """
        self.model, self.tokenize, self.look = model.eval().requires_grad_(False), tokenize, look
        self.identity, self.source = identity, source
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.width = self.images(torch.zeros(1, 3, look.size, look.size)).shape[1]

    def images(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.encode_image(pixels.to(self.device, self.dtype)).float()

    def texts(self, texts: Sequence[str]) -> Tensor:
        parts = [list(texts[start : start + TEXTS]) for start in range(0, len(texts), TEXTS)]
        with torch.inference_mode():
            encoded = [self.model.encode_text(self.tokenize(part).to(self.device)).float() for part in parts]
        # Outside inference mode, so that the result is an ordinary tensor, which a computation with gradients may use.
        return torch.cat(encoded).clone()

    def maps(self, pixels: Tensor) -> Tensor:
        raise self._unlike_clip("the features of the positions of a picture")

    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise self._unlike_clip("the token embeddings of a text")

    def read(self, embedded: Tensor, ends: Tensor) -> Tensor:
        raise self._unlike_clip("the token embeddings of a text")

    def _unlike_clip(self, needed: str) -> UserError:
        return UserError(
            f"this few-shot learner needs {needed}, which {self.source} does not show; choose a clip of CLIP's own"
            " architecture, such as clip=vit_b16, or another learner"
        )


class OpenClip(TwoTowers):
    """A CLIP in its own architecture; see `TextEncoder`."""

    def __init__(
        self, model: Any, tokenize: Callable[[list[str]], Tensor], look: Preprocessing, identity: str, source: str
    ) -> None:
        super().__init__(model, tokenize, look, identity, source)
        self.positions = _positions(model.visual)

    def maps(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return _map(self.model.visual, pixels.to(self.device, self.dtype)).float()

    def embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenize(list(texts)).to(self.device)
        for text, row in zip(texts, ids, strict=True):
            if row[-1] != 0:  # padding is 0, so the text fills the whole context, perhaps truncated
                raise UserError(f"'{text}' has {len(row)} tokens or more, too long for the text tower of {self.source}")
        # The end token has the highest id, so argmax finds its position, as in CLIP's own code.
        return self.model.token_embedding(ids).float(), ids.argmax(dim=1)

    def read(self, embedded: Tensor, ends: Tensor) -> Tensor:
        model = self.model
        # open_clip's encode_text from its token embeddings on: learnt embeddings (CoOp) can be fed, and gradients flow.
        x = embedded.to(self.dtype) + model.positional_embedding[: embedded.shape[1]]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        # The output at the end token is the text's feature.
        return (x[torch.arange(len(x), device=x.device), ends] @ model.text_projection).float()


def _positions(visual: Any) -> int:
    # One entry of the positional embedding belongs to the global feature (class token or attention pool), the rest to
    # the map.
    if hasattr(visual, "attnpool"):
        return int(visual.attnpool.positional_embedding.shape[0]) - 1
    return int(visual.positional_embedding.shape[0]) - 1


def _map(visual: Any, pixels: Tensor) -> Tensor:
    """Return the last layer's output at each position, projected like the image's own feature. Shape: [B, P, D]."""
    # Vision transformer: all tokens but the class token, through the final norm and projection.
    if not hasattr(visual, "attnpool"):
        tokens = visual.transformer(visual._embeds(pixels))
        return visual.ln_post(tokens)[:, 1:] @ visual.proj
    # ResNet: run the convolutional stages, then keep what the attention pool gives at every position.
    for layer in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        pixels = layer(pixels)
    return attention_pool(visual.attnpool, pixels)[:, 1:]


def attention_pool(pool: Any, features: Tensor) -> Tensor:
    """Return all outputs of a CLIP ResNet's attention pool; open_clip keeps only the first, the image's feature.

    Shape: [B, width, height of the map, its width] -> [B, 1 + P, D].
    """
    x = features.flatten(2).permute(2, 0, 1)
    # The mean over the positions comes first: as a query it gives the global feature, the others give the map.
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None].to(x.dtype)
    pooled, _ = F.multi_head_attention_forward(
        query=x,
        key=x,
        value=x,
        embed_dim_to_check=x.shape[-1],
        num_heads=pool.num_heads,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
    )
    return pooled.transpose(0, 1)


def load(
    key: str,
    device: torch.device,
    cache_dir: Path,
    dtype: torch.dtype,
    model: str | None = None,
    pretrained: str | None = None,
    file: str | None = None,
) -> TwoTowers:
    """See `Load`.

    Args:
        key: Configuration key, for errors.
        device: Device of the model.
        cache_dir: Not used: the hub's own cache holds the weights.
        dtype: Number format of the model.
        model: Model name in open_clip, such as RN50-quickgelu.
        pretrained: Tag in open_clip, such as openai; downloaded from the hub once.
        file: Local weights file, instead of a tag.

    Raises:
        UserError: open_clip is not installed, has no such model, or the weights are unavailable or of another model.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{key}: open_clip is not installed; uv pip install 'open_clip_torch>=3.3,<3.4'") from error
    if model is None:
        raise UserError(f"{key}.options.model=<name of open_clip> is needed, such as ViT-B-16-SigLIP2")
    if file is None and pretrained is None:
        raise UserError(f"{key}.options needs pretrained=<tag> or file=<weights>: without them {model} knows nothing")
    if ":" in model:  # open_clip also takes addresses (such as hf-hub:), where foreign code could lie
        raise UserError(f"{key}.options.model={model} is no name of open_clip's own models, such as RN50-quickgelu")
    weights = pretrained if file is None else str(Path(file).expanduser().resolve())
    logger, level = logging.getLogger(), logging.getLogger().level
    try:
        logger.setLevel(logging.CRITICAL)  # the hub's client says at length that it tries again
        made: Any = open_clip.create_model(
            model,
            pretrained=weights,
            precision="fp32",
            require_pretrained=True,
            force_preprocess_cfg=None if file is None else _preprocessing(model, pretrained),
        )
    except Exception as error:  # of the hub's client, of torch, of safetensors: of many kinds
        raise UserError(_unusable(key, model, weights, file, error)) from error
    finally:
        logger.setLevel(level)
    if not (hasattr(made, "encode_image") and hasattr(made, "encode_text")):
        raise UserError(f"{key}.options.model={model} is a {type(made).__name__}; choose a model with two towers")
    try:
        tokenize = open_clip.get_tokenizer(model)
    except Exception as error:  # SigLIP's vocabulary lies on the hub
        raise UserError(_unusable(key, model, "tokenizer", None, error)) from error
    kind = OpenClip if isinstance(made, open_clip.CLIP) else TwoTowers
    made = made.to(device=device, dtype=dtype)
    identity = f"{model}-{parameters_hash(made)[:16]}"
    return kind(made, tokenize, look_of(made.visual), identity, f"open_clip {model}, {weights}")


def _preprocessing(model: str, pretrained: str | None) -> dict[str, Any]:
    """How pictures of a model are prepared, which a file of weights does not say: as for its tag, or its first one."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(model)
    tag = pretrained if pretrained in tags else next(iter(tags), None)
    known = {} if tag is None else get_pretrained_cfg(model, tag)
    return {name: known[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in known}


def look_of(visual: Any) -> Preprocessing:
    """How a tower's pictures are prepared, as its configuration says; CLIP's own way where it says nothing."""
    shown = getattr(visual, "preprocess_cfg", {})
    size = visual.image_size
    return Preprocessing(
        size[0] if isinstance(size, tuple) else size,
        tuple(shown.get("mean", CLIP_MEAN)),
        tuple(shown.get("std", CLIP_STD)),
        squash=shown.get("resize_mode") == "squash",
        interpolation=shown.get("interpolation", "bicubic"),
    )


def _unusable(key: str, model: str, weights: str | None, file: str | None, error: Exception) -> str:
    said = " ".join(str(error).split())[:160]
    if file is not None:
        return (
            f"{key}.options.file={weights} does not hold the weights of {model} ({said}); give the file of this model"
        )
    return (
        f"{key}: the weights '{weights}' of open_clip's {model} are neither in the cache of the hub (HF_HOME) nor to be"
        f" fetched ({said}); fetch them where there is a network, or give a file: {key}.options.file=<path>"
    )


def parameters_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers with their names."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
