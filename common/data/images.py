"""Decode images to upright RGB or raise `BadImage` with the reason; resize them; find them by key."""

from __future__ import annotations

import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
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
VERSION = 2  # version of our decoding and resizing: increase it when pixels change
WHITE = "white"  # background of transparent parts, as viewers and browsers show them
LANCZOS = Image.Resampling.LANCZOS
Turn = Image.Transpose
UPRIGHT = {  # EXIF 2.32, section 4.6.4: the transposition that undoes each orientation
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
# MAX_PIXELS replaces PIL's warning about large images, since large photographs are wanted. PIL's warnings about damaged
# metadata do not concern the pixels; damaged pixels are errors. Both are set for the whole process: the context
# managers for such settings are not thread-safe.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
PROGRAMS = ("EPS", "WMF")  # formats that are programs: PIL would hand them to Ghostscript or to the system
register_heif_opener()  # HEIC; it rotates images by their own header and resets the EXIF orientation


def decode(source: Path | bytes, background: str = WHITE) -> Image.Image:
    """Decode the first frame of an image to RGB, rotated by its EXIF orientation, without its metadata.

    Args:
        source: A file or its content.
        background: Colour behind transparent parts, as PIL's ImageColor spells it.

    Returns:
        An image whose `info[TREATED]` lists what was done to it, if anything was (see `to_rgb`).

    Raises:
        BadImage: It is missing, damaged, cut off, larger than MAX_PIXELS, no image, or wholly transparent.
    """
    try:
        with _opened(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} is more than {MAX_PIXELS // 10**6} megapixels")
            # PIL keeps only the upper bytes of 16-bit colours, so the file is opened again for the lower ones
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


def size_of(source: Path | bytes) -> tuple[int, int]:
    """Return the width and height of an image rotated by its EXIF orientation; only its header is read.

    Raises:
        BadImage: The header cannot be read.
    """
    try:
        with _opened(source) as image:
            return (image.height, image.width) if _orientation(image) in SIDEWAYS else image.size
    except Exception as error:  # as in `decode`
        raise BadImage(_reason(error)) from error


def _opened(source: Path | bytes) -> ImageFile:
    """Open an image of any format that can be decoded. The content decides, whatever the file is called."""
    Image.init()
    kinds = [kind for kind in Image.OPEN if kind not in PROGRAMS]
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=kinds)


def taken(path: Path) -> tuple[str, datetime] | None:
    """Return which camera took a photo, and when, by its EXIF; None if the file does not say. Only a header is read."""
    try:
        with _opened(path) as image:
            exif = image.getexif()
            details = exif.get_ifd(ExifTags.IFD.Exif)
            names = (
                exif.get(ExifTags.Base.Make),
                exif.get(ExifTags.Base.Model),
                details.get(ExifTags.Base.BodySerialNumber),
            )
            time = str(details.get(ExifTags.Base.DateTimeOriginal)).strip(" \0")
            return " ".join(str(name).strip(" \0") for name in names if name), datetime.strptime(
                time, "%Y:%m:%d %H:%M:%S"
            )
    except Exception:  # no picture, no time, or damaged metadata, for which PIL raises many kinds
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata, for which PIL raises many kinds: the pixels are good, and taken as stored
        return 1


def _reason(error: Exception) -> str:
    """Return a few words on why an image cannot be used.

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
    """Resize to a square with Lanczos.

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
    """Return the stamp of an image: the hash of its content, with the background unless it is white.

    >>> on("white", "5f1e"), on("black", "5f1e")
    ('5f1e', '5f1e on black')
    """
    return digest if background == WHITE else f"{digest} on {background}"


@dataclass(frozen=True)
class FileImages:
    """Images that are files, in one folder per dataset. Keys are `<dataset>/<path inside the dataset's folder>`.

    Args: folders: Folder of each dataset.
    background: Colour behind transparent parts.
    contents: Cache of file hashes.
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
        """Return path and size of a file; raise BadImage if it is missing or empty."""
        try:
            path = self._path(image)
            status = path.stat()
        except (OSError, ValueError) as error:  # ValueError: the path has a NUL or a lone surrogate
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
    """Images of several datasets; the first part of a key selects the dataset."""

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
    """Combine the images of several sources.

    Args:
        images: The keys of every source and its images.

    Raises:
        UserError: Two different sources have keys of the same dataset.
    """
    parts: dict[str, Images] = {}
    for keys, part in images:
        for dataset in sorted({key.partition("/")[0] for key in keys}):
            # a FileImages may know more folders than its keys use; only equal ones may share a dataset's name
            own = replace(part, folders={dataset: part.folders[dataset]}) if isinstance(part, FileImages) else part
            if parts.setdefault(dataset, own) != own:
                raise UserError(f"two datasets are called '{dataset}', so their images have the same keys: rename one")
    return CombinedImages(parts)


# Conversion of any mode to RGB: transparent parts show a background, 16-bit levels become 8-bit.

TREATED = "treated"  # key of an image's `info`: what was done to it beyond `convert`, a tuple of these:
TRANSPARENT, STRETCHED = KINDS = ("transparent", "stretched")
PART = 2**15  # 16-bit levels: an image with a smaller range is stretched
# PIL keeps the upper byte of 16-bit colours. These are its names for byte orders, each with the name that makes it
# keep the lower byte instead.
LOWER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}


def to_rgb(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Convert a loaded image to RGB without metadata; an orientation that stayed would be applied again on opening.

    Transparent parts show the background: dropping alpha, as PIL's `convert` does, shows the colours below, which are
    often black. 16-bit grey levels keep their upper 8 bits, where `convert` would turn everything above 255 white; if
    their range is below PART (a camera's 12 bits, a thermal image), they are stretched from the lowest to the highest.
    `info[TREATED]` lists which of both was done.

    Args:
        image: An image of any mode.
        background: A colour as PIL's ImageColor spells it.

    Raises:
        BadImage: Its levels have an unknown range, or all of it is transparent.
    """
    treated = list(image.info.get(TREATED, ()))
    if image.mode == "F":
        raise BadImage("floating-point grey levels of unknown range")
    if image.mode.startswith("I"):  # 16- and 32-bit grey levels
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
    """Convert 16-bit grey levels to 8 bits, with alpha if one level is transparent; tell if they were stretched."""
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
    """Stretch 16-bit levels to 8 bits, by the range of those shown; None if that range is PART or more."""
    import numpy as np

    lowest, highest = (int(shown.min()), int(shown.max())) if shown.size else (0, 0)
    if not 0 < highest - lowest < PART:
        return None
    return np.rint((levels.clip(lowest, highest) - lowest) * (255 / (highest - lowest))).astype(np.uint8)


def _with_alpha(image: Image.Image) -> Image.Image:
    """Convert to RGBA. PIL reads 16-bit colours as 8 bits, but leaves the transparent one at 16 bits."""
    hidden = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(hidden, tuple) and max(hidden) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in hidden)
    return image.convert("RGBA")


def has_deep_colours(image: ImageFile) -> bool:
    """Tell whether an image, opened and not yet loaded, has 16-bit colours, of which PIL keeps the upper bytes."""
    mode, _, order = _layout(image)[0].partition(";")
    return mode in ("RGB", "RGBA") and order in LOWER


def take_lower_bytes(image: ImageFile) -> None:
    """Make an image with 16-bit colours give the lower bytes when it is loaded."""
    name, *rest = _layout(image)
    mode, _, order = name.partition(";")
    arguments = (f"{mode};{LOWER[order]}", *rest)
    image.tile = [tile._replace(args=arguments if rest else arguments[0]) for tile in image.tile]


def _layout(image: ImageFile) -> tuple[str, ...]:
    """Return PIL's name for how it will unpack the pixels, and the other arguments of the decoder."""
    arguments = image.tile[0][3] if image.tile else None
    name, *rest = arguments if isinstance(arguments, tuple) and arguments else (arguments,)
    return str(name), *rest


def stretched_colours(upper: Image.Image, lower: Image.Image) -> Image.Image | None:
    """Stretch 16-bit colours of a range below PART, as for grey levels; None if the range is larger.

    Args:
        upper: The image as PIL reads it, RGB or RGBA.
        lower: The same image with the lower bytes.
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
