"""Pictures of datasets: decoded to upright RGB, or a `BadImage` that says why not; resized; found by key."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from pillow_heif import register_heif_opener

from common.data.contents import Contents
from common.data.rgb import WHITE, has_deep_colours, stretched_colours, take_lower_bytes, to_rgb
from common.data.spelling import on_disk
from common.types import BadImage, Images, UserError

MAX_PIXELS = 150_000_000  # 430 MiB as RGB
REASON = 80  # characters of a decoder's message that are kept
VERSION = 2  # of our own decoding and resizing: count up when pixels change
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
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


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
