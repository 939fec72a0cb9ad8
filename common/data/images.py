"""Pictures of datasets: decoded to upright RGB, or a `BadImage` that says why not; resized; found by key."""

from __future__ import annotations

import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from pillow_heif import register_heif_opener

from common.data.contents import Contents
from common.data.listing import on_disk
from common.types import BadImage, Images, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_PIXELS = 150_000_000  # 430 MiB as RGB
REASON = 80  # characters of a decoder's message that are kept
VERSION = 2  # of our own decoding and resizing: count up when pixels change
WHITE = "white"  # behind what is transparent, as viewers and browsers show it
LANCZOS = Image.Resampling.LANCZOS
Turn = Image.Transpose
UPRIGHT = {  # EXIF 2.32, section 4.6.4: what undoes each orientation
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
# Large photographs are meant to be read, so MAX_PIXELS takes the place of PIL's warning. What PIL says of damaged
# metadata does not concern the pixels; damaged pixels are errors. Both are set for the process: the context managers
# that limit such settings are not safe with threads.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
PROGRAMS = ("EPS", "WMF")  # kinds that are programs: PIL would hand them to Ghostscript or to the system
register_heif_opener()  # HEIC; it turns pictures as their own header says and resets the EXIF orientation


def decode(source: Path | bytes, background: str = WHITE) -> Image.Image:
    """The first frame of a picture, RGB, turned as its EXIF orientation says, without its metadata.

    Args:
        source: A file or its content.
        background: Colour behind transparent parts, as PIL's ImageColor spells it.

    Returns:
        A picture whose `info` holds what was done to it under TREATED, if anything was (see `to_rgb`).

    Raises:
        BadImage: It is missing, damaged, cut off, larger than MAX_PIXELS, no picture, or nothing of it can be seen.
    """
    try:
        with _opened(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} is more than {MAX_PIXELS // 10**6} megapixels")
            deep, stretched = has_deep_colours(image), None
            image.load()
            if deep:
                with _opened(source) as lower:
                    take_lower_bytes(lower)
                    stretched = stretched_colours(image, lower)
            picture, turn = to_rgb(stretched or image, background), UPRIGHT.get(_orientation(image))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise nearly every kind on damaged files
        raise BadImage(_reason(error)) from error
    return picture if turn is None else picture.transpose(turn)


def _opened(source: Path | bytes) -> ImageFile:
    """A picture of any kind that a library decodes. Content decides, whatever the file is called."""
    Image.init()
    kinds = [kind for kind in Image.OPEN if kind not in PROGRAMS]
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=kinds)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata, for which PIL raises many kinds: the pixels are good, and lie as stored
        return 1


def _reason(error: Exception) -> str:
    """A few words on why a picture cannot be used.

    >>> [_reason(error) for error in (FileNotFoundError(2, "No such file", "a.jpg"), OSError("cut"), ValueError())]
    ['no such file', 'cut', 'ValueError']
    """
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that PIL can read"
    text = (error.strerror or "") if isinstance(error, OSError) and error.errno else str(error)
    text = " ".join(text.split())[:REASON] or type(error).__name__
    return text[0].lower() + text[1:] if isinstance(error, OSError) else text


def _squash(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), LANCZOS)


def _crop(picture: Image.Image, size: int) -> Image.Image:
    # lengths and offsets are rounded as in torchvision's Resize and CenterCrop
    shorter = min(picture.size)
    width, height = int(size * picture.width / shorter), int(size * picture.height / shorter)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{picture.width} x {picture.height} is too narrow to be cropped to a square")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), LANCZOS).crop((left, top, left + size, top + size))


def _pad(picture: Image.Image, size: int) -> Image.Image:
    # rounded as in PIL's ImageOps.pad, which fails where a side would become 0
    longer = max(picture.size)
    width, height = (max(1, round(side / longer * size)) for side in picture.size)
    square = Image.new("RGB", (size, size))
    square.paste(picture.resize((width, height), LANCZOS), (round((size - width) / 2), round((size - height) / 2)))
    return square


POLICIES: dict[str, Callable[[Image.Image, int], Image.Image]] = {"squash": _squash, "crop": _crop, "pad": _pad}


def resize(picture: Image.Image, size: int, policy: str) -> Image.Image:
    """A square of `size` pixels, by Lanczos.

    Args:
        picture: RGB.
        size: Side in pixels.
        policy: `squash` (both sides to `size`, as the CLS-RL authors' code), `crop` (shorter side to `size`, then the
            centre) or `pad` (longer side to `size`, centred on black).

    Raises:
        BadImage: It is too narrow to be cropped.
    """
    return POLICIES[policy](picture, size)


def on(background: str, digest: str) -> str:
    """The stamp of a picture with this hash of its content, seen on a background.

    >>> on("white", "5f1e"), on("black", "5f1e")
    ('5f1e', '5f1e on black')
    """
    return digest if background == WHITE else f"{digest} on {background}"


@dataclass(frozen=True)
class FileImages:
    """Pictures that lie in folders, one for each dataset. Keys are `<dataset>/<path inside the dataset's folder>`.

    Args:
        folders: By dataset.
        background: Colour behind transparent parts.
        contents: Where the hashes of the files are kept.
    """

    folders: dict[str, Path]
    background: str = WHITE
    contents: Contents = field(default_factory=Contents, compare=False, repr=False)

    def open(self, image: str) -> Image.Image:
        return decode(self._path(image), self.background)

    def stamp(self, image: str) -> str:
        path, _ = self._file(image)
        try:
            return on(self.background, self.contents.of(path))
        except OSError as error:
            raise BadImage(_reason(error)) from error

    def size(self, image: str) -> int:
        return self._file(image)[1]

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with self._path(image).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except (OSError, ValueError) as error:
            raise BadImage(_reason(error)) from error

    def _file(self, image: str) -> tuple[Path, int]:
        """Path and size of a file with content."""
        try:
            path = self._path(image)
            status = path.stat()
        except (OSError, ValueError) as error:  # a value error: the path has a NUL or half a letter
            raise BadImage(_reason(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        if status.st_size == 0:
            raise BadImage("an empty file")
        return path, status.st_size

    def _path(self, image: str) -> Path:
        dataset, _, relative = image.partition("/")
        return on_disk(self.folders[dataset].absolute() / relative)


@dataclass(frozen=True)
class CombinedImages:
    """Pictures of several datasets, by the dataset that their keys begin with."""

    parts: dict[str, Images]

    def open(self, image: str) -> Image.Image:
        return self._part(image).open(image)

    def stamp(self, image: str) -> str:
        return self._part(image).stamp(image)

    def size(self, image: str) -> int:
        return self._part(image).size(image)

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        return self._part(image).content(image, start, length)

    def _part(self, image: str) -> Images:
        return self.parts[image.partition("/")[0]]


def combine(images: Sequence[tuple[Iterable[str], Images]]) -> CombinedImages:
    """The pictures of several sources as one.

    Args:
        images: Of every source, the keys and the pictures behind them.

    Raises:
        UserError: Two different sources have keys of the same dataset.
    """
    parts: dict[str, Images] = {}
    for keys, part in images:
        for dataset in sorted({key.partition("/")[0] for key in keys}):
            own = replace(part, folders={dataset: part.folders[dataset]}) if isinstance(part, FileImages) else part
            if parts.setdefault(dataset, own) != own:
                raise UserError(f"two datasets are called '{dataset}', so their images have the same keys: rename one")
    return CombinedImages(parts)


# Pictures of any mode as RGB: transparent parts show a background, levels of 16 bits become 8.

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
