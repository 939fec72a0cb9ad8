"""Pictures of any mode as RGB: transparent parts show a background, levels of 16 bits become 8."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from PIL import Image

from common.types import BadImage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.ImageFile import ImageFile

WHITE = "white"  # behind what is transparent, as viewers and browsers show it
TREATED = "treated"  # key of a picture's `info`: what was done to it beyond `convert`, a tuple of these:
TRANSPARENT, STRETCHED = KINDS = ("transparent", "stretched")
PART = 2**15  # levels of 16 bits: a picture within fewer uses a part of its range
# PIL keeps the upper byte of 16-bit colours. These are its names for the order of the bytes, each with the name under
# which it would keep the lower one.
LOWER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}


def to_rgb(image: Image.Image, background: str = WHITE) -> Image.Image:
    """A loaded picture as RGB without metadata; an orientation that stayed would be applied again when it is opened.

    Transparent parts show the background. Dropping alpha, as PIL's `convert` does, would show what lies under them, and
    that is often black as a whole. 16-bit grey levels keep their upper 8 bits, where `convert` would make everything
    above 255 white; those of a picture within PART levels (a camera's 12 bits, a thermal image) are stretched from its
    lowest to its highest. `info` says under TREATED which of both was done.

    Args:
        image: Of any mode.
        background: A colour as PIL's ImageColor spells it.

    Raises:
        BadImage: Its levels have an unknown range, or all of it is transparent.
    """
    treated = list(image.info.get(TREATED, ()))
    if image.mode == "F":
        raise BadImage("floating-point grey levels of unknown range")
    if image.mode.startswith("I"):
        image, stretched = _eight_bits(image)
        treated += [STRETCHED] * stretched
    if image.has_transparency_data:
        layer = _with_alpha(image)
        lowest, highest = layer.getchannel("A").getextrema()
        if highest == 0:
            raise BadImage("nothing of it can be seen: all of it is transparent")
        if lowest != 255:
            layer = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
            treated.append(TRANSPARENT)
        picture = layer.convert("RGB")
    else:
        picture = image.convert("RGB")
    picture.info = {TREATED: tuple(treated)} if treated else {}
    return picture


def _eight_bits(image: Image.Image) -> tuple[Image.Image, bool]:
    """16-bit grey levels as 8 bits, with alpha if one level is transparent; and whether they were stretched."""
    import numpy as np

    levels, hidden = np.asarray(image.convert("I")), image.info.get("transparency")
    if levels.min() < 0 or levels.max() >= 2**16:
        raise BadImage("grey levels beyond 16 bits")
    grey = _stretched(levels, levels if hidden is None else levels[levels != hidden])
    picture = Image.fromarray((levels >> 8).astype(np.uint8) if grey is None else grey)
    if hidden is not None:
        picture.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    return picture, grey is not None


def _stretched(levels: NDArray[Any], shown: NDArray[Any]) -> NDArray[Any] | None:
    """16-bit levels as 8 bits, from the lowest to the highest of those shown; None if these take PART or more."""
    import numpy as np

    lowest, highest = (int(shown.min()), int(shown.max())) if shown.size else (0, 0)
    if not 0 < highest - lowest < PART:
        return None
    return np.rint((levels.clip(lowest, highest) - lowest) * (255 / (highest - lowest))).astype(np.uint8)


def _with_alpha(image: Image.Image) -> Image.Image:
    """As RGBA. PIL reads 16-bit colours as 8 bits, but not the one of them that is transparent."""
    hidden = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(hidden, tuple) and max(hidden) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in hidden)
    return image.convert("RGBA")


def has_deep_colours(image: ImageFile) -> bool:
    """Whether a picture that is opened and not loaded has colours of 16 bits, of which PIL keeps the upper bytes."""
    mode, _, order = _layout(image)[0].partition(";")
    return mode in ("RGB", "RGBA") and order in LOWER


def take_lower_bytes(image: ImageFile) -> None:
    """Make such a picture give the lower bytes when it is loaded."""
    name, *rest = _layout(image)
    mode, _, order = name.partition(";")
    arguments = (f"{mode};{LOWER[order]}", *rest)
    image.tile = [tile._replace(args=arguments if rest else arguments[0]) for tile in image.tile]


def _layout(image: ImageFile) -> tuple[str, ...]:
    """How PIL will unpack the pixels, by its own name, and what else the decoder of the file needs."""
    arguments = image.tile[0][3] if image.tile else None
    name, *rest = arguments if isinstance(arguments, tuple) and arguments else (arguments,)
    return str(name), *rest


def stretched_colours(upper: Image.Image, lower: Image.Image) -> Image.Image | None:
    """A picture of 16-bit colours within PART levels, stretched as grey levels are; None if it takes more of them.

    Args:
        upper: As PIL reads it, RGB or RGBA.
        lower: The same with the lower bytes.
    """
    import numpy as np

    high, low = np.asarray(upper), np.asarray(lower)
    levels = (high[..., :3].astype(np.int32) << 8) + low[..., :3]
    shown = levels[high[..., 3] > 0] if high.shape[2] == 4 else levels
    colours = _stretched(levels, shown)
    if colours is None:
        return None
    picture = Image.fromarray(colours)
    if high.shape[2] == 4:
        picture.putalpha(upper.getchannel("A"))
    picture.info[TREATED] = (STRETCHED,)
    return picture
