"""Pictures: decoding what datasets contain, resizing, the cache of decoded ones, and the check before a run."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from common.data import images, loading
from common.data.images import FileImages, combine, decode, resize
from common.data.loading import SUFFIX, Loader, bytes_per_picture, examine, report
from common.runtime.disk_cache import DiskCache
from common.types import BadImage, UserError

REPOSITORY = Path(__file__).parent.parent
LANCZOS = Image.Resampling.LANCZOS
RED, GREEN = (255, 0, 0), (0, 255, 0)


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def same(picture, expected):
    assert (picture.mode, picture.size) == ("RGB", expected.size)
    assert picture.tobytes() == expected.tobytes()


PLAIN = {  # what PIL's convert is enough for
    "jpeg": encoded(noise(30, 20), "JPEG"),
    "greyscale jpeg": encoded(noise(30, 20, 1), "JPEG"),
    "cmyk jpeg": encoded(noise(30, 20, 4).convert("RGB").convert("CMYK"), "JPEG"),
    "png": encoded(noise(30, 20), "PNG"),
    "1-bit png": encoded(noise(30, 20, 1).convert("1"), "PNG"),
    "png with alpha that hides nothing": encoded(noise(30, 20).convert("RGBA"), "PNG"),
    "greyscale png with alpha that hides nothing": encoded(noise(30, 20, 1).convert("LA"), "PNG"),
    "palette png": encoded(noise(30, 20).quantize(16), "PNG"),
    "gif": encoded(noise(30, 20).quantize(16), "GIF"),
    "webp": encoded(noise(30, 20), "WEBP", lossless=True),
    "bmp": encoded(noise(30, 20), "BMP"),
    "tiff": encoded(noise(30, 20), "TIFF", compression="tiff_lzw"),
    "one pixel": encoded(noise(1, 1), "PNG"),
}


@pytest.mark.parametrize("content", PLAIN.values(), ids=PLAIN)
def test_decoding_equals_pil(content, tmp_path):
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    same(decode(content), expected)
    (tmp_path / "picture").write_bytes(content)
    same(decode(tmp_path / "picture"), expected)


def palette(alpha):
    """A picture of 16 colours. alpha: of each of them, or the number of the one that is transparent."""
    picture = noise(20, 10).quantize(16)
    picture.info["transparency"] = alpha
    return picture


COLOURS = np.array(palette(0).getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(palette(0))]
INDEX, ALPHAS = np.asarray(palette(0)), np.arange(0, 256, 16)
RGBA, LA = np.asarray(noise(20, 10, 4)), np.asarray(noise(20, 10, 4).convert("LA"))
GREY = np.asarray(noise(20, 10, 1))
TRANSPARENT = {  # content, colours and alpha
    "png": (encoded(Image.fromarray(RGBA), "PNG"), RGBA[..., :3], RGBA[..., 3]),
    "webp": (encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), RGBA[..., :3], RGBA[..., 3]),
    "tiff": (encoded(Image.fromarray(RGBA), "TIFF"), RGBA[..., :3], RGBA[..., 3]),
    "greyscale": (encoded(Image.fromarray(LA), "PNG"), LA[..., :1].repeat(3, 2), LA[..., 1]),
    "palette with alpha": (encoded(palette(bytes(ALPHAS.tolist())), "PNG"), COLOURS, ALPHAS[INDEX]),
    "palette with a transparent colour": (encoded(palette(3), "PNG"), COLOURS, 255 * (INDEX != 3)),
    "gif": (encoded(palette(3), "GIF", transparency=3), COLOURS, 255 * (INDEX != 3)),
    "transparent colour": (
        encoded(Image.fromarray(RGBA[..., :3]), "PNG", transparency=tuple(map(int, RGBA[4, 7, :3]))),
        RGBA[..., :3],
        255 * (RGBA[..., :3] != RGBA[4, 7, :3]).any(2),
    ),
    "transparent grey": (
        encoded(Image.fromarray(GREY), "PNG", transparency=int(GREY[4, 7])),
        GREY[..., None].repeat(3, 2),
        255 * (GREY[4, 7] != GREY),
    ),
}


@pytest.mark.parametrize(("background", "behind"), [("white", 255), ("black", 0), ("#336699", (0x33, 0x66, 0x99))])
@pytest.mark.parametrize(("content", "colours", "alpha"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparent_parts_show_the_background(content, colours, alpha, background, behind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(content, background)
    share = alpha[..., None] / 255
    np.testing.assert_allclose(np.asarray(found), colours * share + behind * (1 - share), atol=1)
    assert found.info == {"treated": ("transparent",)} and decode(content).mode == "RGB"


def test_ink_on_transparent_is_seen_as_on_paper():
    """White ink and black ink alike were one black picture."""
    digit = np.zeros((8, 8), np.uint8)
    digit[2:6, 3:5] = 255
    black = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.fromarray(digit)))
    white = Image.merge("LA", (Image.new("L", (8, 8), 255), Image.fromarray(digit)))
    assert np.array_equal(np.asarray(decode(encoded(black, "PNG")))[..., 0], 255 - digit)
    assert np.array_equal(np.asarray(decode(encoded(white, "PNG"), "black"))[..., 0], digit)


def test_a_picture_of_which_nothing_can_be_seen_is_refused():
    picture = noise(20, 10, 4)
    picture.putalpha(0)
    with pytest.raises(BadImage, match="nothing of it can be seen: all of it is transparent"):
        decode(encoded(picture, "PNG"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    same(decode(content), frames[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_once(orientation, kind):
    picture = noise(8, 4).resize((48, 24), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    found = decode(content)
    same(found, expected)
    assert found.size == ((24, 48) if orientation > 4 else (48, 24))
    assert not found.info and not found.getexif()  # nobody turns it again


def test_the_corner_of_each_orientation():
    # EXIF 2.32, 4.6.4: where the stored first row and first column lie in the scene
    corners = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    for orientation, (x, y) in corners.items():
        picture = Image.new("RGB", (3, 2))
        picture.putpixel((0, 0), RED)
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decode(encoded(picture, "PNG", exif=exif))
        assert found.getpixel((x % found.width, y % found.height)) == RED


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_of_phones_are_read_upright(kind, orientation, tmp_path):
    """The red quarter of a picture lies where the orientation puts it: see the corners above."""
    picture = Image.new("RGB", (64, 32), (0, 0, 255))
    picture.paste(RED, (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"
    path.write_bytes(encoded(picture, kind, exif=exif.tobytes(), quality=95))
    found = np.asarray(decode(path)).astype(int)
    assert found.shape == ((64, 32, 3) if orientation > 4 else (32, 64, 3))
    rows, columns = np.nonzero(found[..., 0] > 128)
    at_right, below = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    halves = found.shape[0] // 2, found.shape[1] // 2
    assert (rows.min(), columns.min()) == (halves[0] * below, halves[1] * at_right)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_damaged_photo_of_a_phone_is_a_bad_image(kind):
    content = encoded(noise(64, 64), kind)
    with pytest.raises(BadImage):
        decode(content[: len(content) // 2])


CUT_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest resets the filter of common.data.images
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", CUT_EXIF, b"Exif\0\0"])
def test_damaged_metadata_does_not_matter(exif):
    content = encoded(noise(30, 20), "JPEG", exif=exif)
    same(decode(content), Image.open(io.BytesIO(content)).convert("RGB"))


def test_damaged_metadata_is_not_talked_about():
    code = "import sys; from common.data.images import decode; print(decode(sys.stdin.buffer.read()).size)"
    content = encoded(noise(30, 20), "JPEG", exif=CUT_EXIF)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, input=content, capture_output=True)
    assert (done.stdout.split(), done.stderr) == ([b"(30,", b"20)"], b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    levels = np.array([[0, 255, 256, 4095], [32768, 65279, 65280, 65535]], dtype=np.uint16)
    found = np.asarray(decode(encoded(Image.fromarray(levels), kind)))
    expected = [[0, 0, 1, 15], [128, 254, 255, 255]]
    assert found.tolist() == [[[level] * 3 for level in row] for row in expected]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([[0, 1365, 2730, 4095]], [0, 85, 170, 255]),  # a camera's 12 bits
        ([[20000, 20200, 20400, 21000]], [0, 51, 102, 255]),  # a thermal image
        ([[0, 51, 102, 255]], [0, 51, 102, 255]),  # 8 bits
        ([[7, 7, 7, 32774]], [0, 0, 0, 255]),
        ([[7, 7, 7, 32775]], [0, 0, 0, 128]),  # half of the range: as it is
        ([[40000, 40000]], [156, 156]),
    ],
    ids=["12 bits", "thermal", "8 bits", "less than half", "half", "flat"],
)
def test_16_bit_grey_within_a_part_of_the_range_is_stretched(kind, levels, expected):
    found = decode(encoded(Image.fromarray(np.array(levels, dtype=np.uint16)), kind))
    assert np.asarray(found)[0, :, 0].tolist() == expected
    assert found.info == ({} if expected[-1] < 255 else {"treated": ("stretched",)})


def test_a_transparent_level_of_16_bits_is_no_part_of_the_range():
    levels = Image.fromarray(np.array([[65535, 20000, 20500, 21000]], dtype=np.uint16))
    found = decode(encoded(levels, "PNG", transparency=65535), "#102030")
    assert np.asarray(found).tolist() == [[[0x10, 0x20, 0x30], [0] * 3, [128] * 3, [255] * 3]]
    assert found.info == {"treated": ("stretched", "transparent")}


def png16(levels):
    """PIL cannot write 16-bit colours."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff16(levels, order="<"):
    """One strip without compression, in either order of bytes."""
    (height, width, _), pixels = levels.shape, levels.astype(f"{order}u2").tobytes()
    tags = {256: width, 257: height, 258: 0, 259: 1, 262: 2, 273: 0, 277: 3, 278: height, 279: len(pixels)}
    tags[258] = 8 + 2 + 12 * len(tags) + 4  # where the bits of the three channels stand
    tags[273] = tags[258] + 6
    entries = [struct.pack(f"{order}HHII", tag, 4, 3 if tag == 258 else 1, value) for tag, value in tags.items()]
    entries[2] = struct.pack(f"{order}HHII", 258, 3, 3, tags[258])
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + b"".join(entries) + struct.pack(f"{order}IHHH", 0, 16, 16, 16) + pixels


@pytest.mark.parametrize("write", [png16, tiff16, lambda levels: tiff16(levels, ">")], ids=["png", "tiff", "big tiff"])
def test_16_bit_colours_within_a_part_of_the_range_are_stretched(write):
    """PIL reads their upper bytes alone: of a camera's 12 bits, 16 levels would be left."""
    levels = np.random.default_rng(0).integers(300, 4096, (5, 7, 3))
    found, lowest, highest = decode(write(levels)), levels.min(), levels.max()
    assert np.array_equal(np.asarray(found), np.rint((levels - lowest) / (highest - lowest) * 255))
    assert found.info == {"treated": ("stretched",)}
    levels[0, 0, 0] = highest + 2**15
    found = decode(write(levels))
    assert np.array_equal(np.asarray(found), levels >> 8) and not found.info


def test_what_is_transparent_is_no_part_of_the_range_of_16_bit_colours():
    levels = np.array([[[0, 0, 0, 0], [1000, 1500, 2000, 65535], [1000, 1250, 1500, 65535]]])
    found = decode(png16(levels))
    assert np.asarray(found).tolist() == [[[255] * 3, [0, 128, 255], [0, 64, 128]]]
    assert found.info == {"treated": ("stretched", "transparent")}


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (np.full((2, 2), 0.5, dtype=np.float32), "floating-point"),
        (np.full((2, 2), 70_000, dtype=np.int32), "beyond 16 bits"),
        (np.full((2, 2), -1, dtype=np.int32), "beyond 16 bits"),
    ],
    ids=["float", "32 bits", "negative"],
)
def test_grey_levels_of_unknown_range_are_refused(levels, reason):
    with pytest.raises(BadImage, match=reason):
        decode(encoded(Image.fromarray(levels), "TIFF"))


@pytest.mark.slow
def test_60_megapixels_are_read_in_silence():
    content = encoded(Image.new("L", (10_000, 6_000), 7), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(content)
    assert found.size == (10_000, 6_000)
    assert resize(found, 4, "squash").getcolors() == [(16, (7, 7, 7))]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "readable"), [(10_000, True), (15_001, False), (60_000, False)])
def test_the_limit_of_pixels_is_ours(width, readable):
    # 100 megapixels is where PIL would warn, 600 where it would raise an error of its own
    content = encoded(Image.new("1", (width, 10_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if readable:
            assert decode(content).size == (width, 10_000)
        else:
            with pytest.raises(BadImage, match=f"^{width} x 10000 is more than 150 megapixels$"):
                decode(content)


BAD = {
    "a text": (b"<html>404</html>", "not a picture"),
    "empty": (b"", "not a picture"),
    "jpeg cut in its header": (PLAIN["jpeg"][:100], "."),
    "jpeg cut in half": (PLAIN["jpeg"][: len(PLAIN["jpeg"]) // 2], "truncated"),
    "png cut in half": (PLAIN["png"][: len(PLAIN["png"]) // 2], "truncated"),
    "gif cut in half": (PLAIN["gif"][:300], "truncated"),
    "webp cut in half": (PLAIN["webp"][:500], "."),
    "tiff cut in half": (PLAIN["tiff"][: len(PLAIN["tiff"]) // 2], "."),
    "bmp cut in half": (PLAIN["bmp"][:500], "truncated"),
    "png with damaged pixels": (PLAIN["png"][:100] + bytes(400) + PLAIN["png"][500:], "."),
    "png of no size": (PLAIN["png"][:16] + bytes(8) + PLAIN["png"][24:], "."),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_decoded_says_why(content, reason, tmp_path):
    (tmp_path / "picture").write_bytes(content)
    for source in (content, tmp_path / "picture"):
        with pytest.raises(BadImage, match=reason) as caught:
            decode(source)
        assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
        assert 3 < len(str(caught.value)) <= 80


def test_whatever_a_decoder_raises_is_a_bad_image(monkeypatch):
    class Plugin(PngImagePlugin.PngImageFile):
        def load(self):
            raise ZeroDivisionError("a long\nmessage " + "x" * 200)

    monkeypatch.setattr(images.Image, "open", lambda _, formats: Plugin(io.BytesIO(PLAIN["png"])))
    with pytest.raises(BadImage, match="^a long message x{65}$"):
        decode(b"")


def test_lack_of_memory_is_no_fault_of_the_picture(monkeypatch):
    def fail(_, formats):
        raise MemoryError

    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"")


SIZES = [(500, 375), (375, 500), (64, 64), (1, 1), (7, 300), (301, 200), (33, 32), (39, 32), (32, 39), (2000, 3)]
NAMES = [f"{width}x{height}" for width, height in SIZES]


@pytest.mark.parametrize("size", SIZES, ids=NAMES)
def test_squash_is_the_authors_call(size):
    picture = noise(*size)
    same(resize(picture, 32, "squash"), picture.resize((32, 32), LANCZOS))


@pytest.mark.parametrize("size", SIZES, ids=NAMES)
def test_crop_equals_torchvision(size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    picture = noise(*size)
    expected = F.center_crop(F.resize(picture, 32, InterpolationMode.LANCZOS), [32, 32])
    same(resize(picture, 32, "crop"), expected)


@pytest.mark.parametrize("size", SIZES[:-1], ids=NAMES[:-1])
def test_pad_equals_pil(size):
    picture = noise(*size)
    same(resize(picture, 32, "pad"), ImageOps.pad(picture, (32, 32), LANCZOS, color=0))


def test_a_line_is_padded_and_not_cropped():
    line = Image.new("RGB", (20_000, 1), RED)  # 1/600 of a pixel high, which rounds to none
    found = np.asarray(resize(line, 32, "pad"))
    assert sorted(found[:, 5, 0].tolist()) == [0] * 31 + [255]
    with pytest.raises(BadImage, match="20000 x 1 is too narrow"):
        resize(line, 384, "crop")


def test_the_policies_differ():
    picture = Image.new("RGB", (60, 30), GREEN)
    picture.paste(RED, (0, 0, 15, 30))
    reds = {policy: np.asarray(resize(picture, 20, policy))[..., 0].mean() / 255 for policy in images.POLICIES}
    assert reds == pytest.approx({"squash": 1 / 4, "crop": 0, "pad": 1 / 8}, abs=0.01)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of different sizes, a.jpg to l.jpg."""
    folder = tmp_path / "pets" / "images"
    folder.mkdir(parents=True)
    for number, name in enumerate("abcdefghijkl"):
        noise(40 + number, 30, seed=number).save(folder / f"{name}.jpg")
    return folder


KEYS = [f"pets/images/{name}.jpg" for name in "abcdefghijkl"]


class Counted:
    """Pictures that count how often they are opened."""

    def __init__(self, folder):
        self.files, self.opened, self.lock = FileImages({"pets": folder.parent}), [], threading.Lock()

    def open(self, image):
        with self.lock:
            self.opened.append(image)
        return self.files.open(image)

    def stamp(self, image):
        return self.files.stamp(image)


@pytest.fixture
def make(folder, tmp_path):
    """A fresh loader, as another process would have it, with the pictures that count."""

    def loader(size=16, policy="squash", limit=2**20, workers=2):
        cache = None if limit is None else DiskCache(tmp_path / "cache", limit, loading.SUFFIX)
        return Loader(Counted(folder), size, policy, cache, workers)

    return loader


def expected(folder, key, size=16):
    return Image.open(folder.parent.parent / key).convert("RGB").resize((size, size), LANCZOS)


def test_file_images_find_files_by_dataset(folder, tmp_path):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "x.png").write_bytes(PLAIN["png"])
    found = FileImages({"pets": folder.parent, "flowers": tmp_path / "flowers"})
    same(found.open(KEYS[1]), Image.open(folder / "b.jpg"))
    same(found.open("flowers/x.png"), noise(30, 20))
    stored = (folder / "b.jpg").read_bytes()
    assert (found.size(KEYS[1]), found.content(KEYS[1]), found.content(KEYS[1], 3, 5)) == (
        len(stored),
        stored,
        stored[3:8],
    )
    for missing in (found.size, found.content):
        with pytest.raises(BadImage, match="no such file"):
            missing("pets/images/zz.jpg")
    assert found.stamp(KEYS[1]) == hashlib.sha256(stored).hexdigest()


def test_stamps_do_not_depend_on_the_place(folder, monkeypatch):
    before = FileImages({"pets": folder.parent}).stamp(KEYS[0])
    monkeypatch.chdir(folder.parent.parent)
    assert FileImages({"pets": Path("pets")}).stamp(KEYS[0]) == before
    shutil.copytree(folder, folder.parent / "elsewhere" / "images")
    assert FileImages({"pets": folder.parent / "elsewhere"}).stamp(KEYS[0]) == before


@pytest.mark.parametrize(
    ("key", "reason"),
    [("pets/images/zz.jpg", "no such file"), ("pets/images/empty.jpg", "an empty file"), ("pets/images", "not a file")],
)
def test_a_stamp_needs_a_file_with_content(folder, key, reason):
    (folder / "empty.jpg").touch()
    with pytest.raises(BadImage, match=reason):
        FileImages({"pets": folder.parent}).stamp(key)
    with pytest.raises(BadImage, match=reason):
        FileImages({"pets": folder.parent}).size(key)


def test_several_sources_become_one(folder, tmp_path):
    class Digits:
        def open(self, image):
            return Image.new("RGB", (8, 8), GREEN)

        def stamp(self, image):
            return f"digits {image}"

    both = combine([(KEYS, FileImages({"pets": folder.parent})), (["digits/0", "digits/1"], Digits())])
    same(both.open(KEYS[0]), Image.open(folder / "a.jpg"))
    assert both.open("digits/1").getpixel((0, 0)) == GREEN
    assert both.stamp("digits/1") == "digits digits/1" and len(both.stamp(KEYS[0])) == 64


def test_two_datasets_of_one_name_are_refused(folder, tmp_path):
    one, again, other = (FileImages({"pets": place}) for place in (folder.parent, folder.parent, tmp_path))
    assert combine([(KEYS, one), (KEYS, again)]).parts == {"pets": one}
    with pytest.raises(UserError, match="two datasets are called 'pets'.*rename one"):
        combine([(KEYS[:1], one), (["pets/else.jpg"], other)])


@pytest.mark.parametrize("limit", [None, 0, 2**20], ids=["no cache", "of no size", "cache"])
@pytest.mark.parametrize("workers", [1, 3])
def test_pictures_come_in_the_order_of_their_keys(make, folder, workers, limit):
    keys = [KEYS[number] for number in (3, 0, 11, 3, 7, 1)]
    loader = make(workers=workers, limit=limit)
    for _ in range(2):
        for found, key in zip(loader(keys), keys, strict=True):
            same(found, expected(folder, key))
    assert loader([]) == []


def test_a_second_run_opens_no_file(make, folder):
    make()(KEYS)
    again = make()
    for found, key in zip(again(KEYS), KEYS, strict=True):
        same(found, expected(folder, key))
    assert again.images.opened == []


@pytest.mark.parametrize("limit", [2**20, 0], ids=["cache", "cache of no size"])
def test_what_was_done_to_pictures_is_remembered(make, folder, limit):
    """By the cache, and by the notes of an earlier examination where the cache has no room."""
    levels = Image.fromarray(np.array([[0, 100, 4095]], dtype=np.uint16))
    (folder / "b.jpg").write_bytes(TRANSPARENT["png"][0])
    (folder / "c.jpg").write_bytes(encoded(levels, "PNG"))
    (folder / "d.jpg").write_bytes(encoded(levels, "PNG", transparency=100))
    expected = {KEYS[1]: ("transparent",), KEYS[2]: ("stretched",), KEYS[3]: ("stretched", "transparent")}
    for policy in images.POLICIES:
        for attempt in range(2):
            loader = make(limit=limit, policy=policy)
            found = examine(loader, KEYS)
            assert (set(found.treated), found.bad) == (set(expected), {})
            assert {key: set(kinds) for key, kinds in found.treated.items()} == {
                key: set(kinds) for key, kinds in expected.items()
            }
            assert len(loader.images.opened) == (0 if attempt else len(KEYS))
        for key, picture in zip(KEYS, make(limit=limit, policy=policy)(KEYS), strict=True):
            assert set(loading.treated(picture)) == set(expected.get(key, ()))
    assert loading.count_treated(expected, KEYS) == {"transparent": 2, "stretched": 2}
    assert loading.count_treated(expected, KEYS[:2]) == {"transparent": 1}


def test_another_background_is_another_entry(make, folder):
    (folder / "a.jpg").write_bytes(TRANSPARENT["png"][0])
    white, black = (make(), make())
    black.images.files = FileImages({"pets": folder.parent}, "black")
    for loader, background in ((white, "white"), (black, "black")):
        same(loader(KEYS[:1])[0], decode(TRANSPARENT["png"][0], background).resize((16, 16), LANCZOS))


@pytest.mark.parametrize("change", [{"size": 24}, {"policy": "crop"}], ids=str)
def test_another_size_or_policy_is_another_entry(make, change):
    make()(KEYS)
    other = make(**change)
    other(KEYS)
    assert sorted(other.images.opened) == KEYS
    again = make()
    again(KEYS)
    assert again.images.opened == []


def test_a_changed_file_is_decoded_anew(make, folder):
    make()(KEYS)
    noise(50, 50, seed=99).save(folder / "c.jpg")
    loader = make()
    same(loader(KEYS)[2], expected(folder, KEYS[2]))
    assert loader.images.opened == [KEYS[2]]


def replace_unnoticed(path, picture):
    """Another picture in a file of the same name, size and time of modification, as rsync and unzip leave it."""
    before, content = path.stat(), encoded(picture, "BMP")
    assert len(content) == before.st_size
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_another_picture_of_the_same_size_and_time_is_decoded_anew(make, folder):
    path = folder / "c.jpg"
    path.write_bytes(encoded(noise(20, 20, seed=1), "BMP"))
    make()(KEYS)
    replace_unnoticed(path, noise(20, 20, seed=2))
    loader = make()
    same(loader(KEYS)[2], noise(20, 20, seed=2).resize((16, 16), LANCZOS))
    assert loader.images.opened == [KEYS[2]]


def test_pictures_that_have_moved_are_still_known(make, folder):
    make()(KEYS)
    (folder / "a.jpg").rename(folder / "z.jpg")
    (folder / "b.jpg").rename(folder / "a.jpg")
    os.utime(folder / "c.jpg", (0, 0))
    loader = make()
    same(loader(KEYS[:1])[0], Image.open(folder / "a.jpg").resize((16, 16), LANCZOS))
    loader(KEYS[2:])
    assert loader.images.opened == []


@pytest.mark.parametrize(
    "damage",
    [lambda entry: entry[:-1], lambda entry: bytes(len(entry)), lambda entry: b"", lambda entry: b"\0" + entry[1:]],
    ids=["short", "zeros", "empty", "one byte"],
)
def test_a_damaged_entry_is_computed_anew(make, folder, tmp_path, damage):
    make()(KEYS[:1])
    (entry,) = (tmp_path / "cache").glob("*.rgb")
    before = entry.read_bytes()
    entry.write_bytes(damage(before))
    assert entry.read_bytes() != before
    loader = make()
    same(loader(KEYS[:1])[0], expected(folder, KEYS[0]))
    assert loader.images.opened == KEYS[:1]
    assert entry.read_bytes() == before


def test_the_cache_keeps_its_bound(make, tmp_path):
    entry = bytes_per_picture(16)
    loader = make(limit=5 * entry, workers=1)
    for key in KEYS:
        loader([key])
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 5 * entry
    loader([KEYS[-1]])
    assert len(loader.images.opened) == 12  # the last one was still there


def test_what_was_read_longest_ago_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 40, ".x")
    for number, key in enumerate("abcd"):
        cache.put(key, bytes(10))
        os.utime(tmp_path / f"{key}.x", (number, number))
    assert cache.get("a") == bytes(10)  # now the youngest
    cache.put("e", bytes(10))
    assert {key for key in "abcde" if cache.get(key)} == {"a", "d", "e"}  # down to 9/10 of the bound


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    abandoned, unfinished = tmp_path / "a.1.unfinished", tmp_path / "b.2.unfinished"
    for path in (abandoned, unfinished):
        path.touch()
    os.utime(abandoned, (0, 0))
    cache = DiskCache(tmp_path, 20, ".x")
    for key in "abcdef":
        cache.put(key, bytes(10))
    assert cache.used <= 20 and {"notes.txt", "b.2.unfinished"} < set(os.listdir(tmp_path))
    assert not abandoned.exists()


def test_a_full_disk_ends_storing_and_not_the_run(make, folder, tmp_path, monkeypatch, caplog):
    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    loader = make(workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for found, key in zip(loader(KEYS), KEYS, strict=True):
            same(found, expected(folder, key))
    assert [record.getMessage() for record in caplog.records] == [
        f"nothing more is stored in {tmp_path / 'cache'}: No space left on device (cache_dir)"
    ]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = DiskCache(tmp_path / "file" / "cache", 1, ".x")
    cache.put("a", b"1")
    assert cache.get("a") is None and cache.used == 0
    (record,) = caplog.records
    assert "file/cache: Not a directory (cache_dir)" in record.getMessage()


CHILD = """
import sys
from pathlib import Path
from common.data.images import FileImages
from common.data.loading import Loader, examine
from common.runtime.disk_cache import DiskCache
folder, cache = map(Path, sys.argv[1:3])
loader = Loader(FileImages({"pets": folder}), 16, "squash", DiskCache(cache, 5 * 773, ".rgb"), 2)
keys = [f"pets/images/{name}.jpg" for name in "abcdefghijkl"]
print("ready", flush=True)
sys.stdin.readline()
assert examine(loader, keys).bad == {}
for _ in range(30):
    for picture, key in zip(loader(keys), keys, strict=True):
        sys.stdout.write(picture.tobytes().hex() + "\\n")
"""


@pytest.mark.slow
def test_two_processes_share_a_cache(folder, tmp_path):
    """A cache with room for 5 of 12 pictures, which both read, fill and empty at once."""
    command = [sys.executable, "-c", CHILD, str(folder.parent), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, cwd=REPOSITORY, **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    rows = [expected(folder, key).tobytes().hex() for key in KEYS] * 30
    results = []
    readers = [threading.Thread(target=lambda child=child: results.append(child.communicate())) for child in children]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for output, errors in results:
        assert (output.splitlines() == rows, errors) == (True, "")
    noted = (tmp_path / "cache" / loading.CHECKED).read_text().split()
    assert len(set(noted)) == 12 and all(re.fullmatch("[0-9a-f]{64}", line) for line in noted)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.rgb")) <= 12 * 773


def test_a_bad_picture_among_good_ones_is_named(make, folder):
    (folder / "b.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"^1 of 3 images cannot be used: pets/images/b.jpg \(not a picture"):
        make()(KEYS[:3])


@pytest.mark.parametrize("workers", [1, 3])
def test_examine_finds_what_cannot_be_used(make, folder, monkeypatch, workers):
    monkeypatch.setattr(loading, "CHUNK", 5)
    (folder / "b.jpg").unlink()
    (folder / "d.jpg").write_bytes(b"")
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:400])
    loader = make(workers=workers)
    bad = examine(loader, [*KEYS, *KEYS]).bad
    assert list(bad) == [KEYS[0], KEYS[1], KEYS[3]]
    assert bad[KEYS[1]] == "no such file or directory" and bad[KEYS[3]] == "an empty file"
    assert "truncated" in bad[KEYS[0]]
    assert sorted(loader.images.opened) == [key for key in KEYS if key not in (KEYS[1], KEYS[3])]
    loader([key for key in KEYS if key not in bad])
    assert len(loader.images.opened) == 10  # the cache is full of the good ones


@pytest.mark.parametrize("limit", [2**20, 0], ids=["cache", "cache of no size"])
def test_a_second_examination_tries_only_what_is_new(make, folder, tmp_path, limit):
    (folder / "k.jpg").write_text("no picture")
    assert list(examine(make(limit=limit), KEYS[:-1]).bad) == [KEYS[10]]
    for entry in (tmp_path / "cache").glob("*.rgb"):
        entry.unlink()
    (folder / "a.jpg").write_text("replaced")
    again = make(limit=limit)
    assert list(examine(again, KEYS).bad) == [KEYS[0], KEYS[10]]
    assert sorted(again.images.opened) == [KEYS[0], KEYS[10], KEYS[11]]


def test_examining_without_a_cache_works_and_remembers_nothing(make):
    for _ in range(2):
        loader = make(limit=None)
        assert examine(loader, KEYS).bad == {}
        assert sorted(loader.images.opened) == KEYS


def test_a_torn_note_costs_one_examination(make, tmp_path):
    examine(make(), KEYS[:6])
    notes = tmp_path / "cache" / loading.CHECKED
    notes.write_bytes(notes.read_bytes()[:-5] + b"\xff")  # the writer was killed in the middle of the last line
    again = make()
    examine(again, KEYS)
    assert sorted(again.images.opened) == KEYS[6:]  # the torn one is still in the cache
    for entry in (tmp_path / "cache").glob("*.rgb"):
        entry.unlink()
    last = make()
    examine(last, KEYS)
    assert last.images.opened == []  # all twelve are written down


def test_examining_holds_no_pictures(make, monkeypatch):
    alive, most = 0, 0

    class Held:
        info: ClassVar = {}

        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(Loader, "load", lambda self, key: Held())
    assert examine(make(workers=2), KEYS).bad == {}
    assert alive == 0 and most <= 2


def test_notes_that_cannot_be_written_cost_a_warning(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loading, "CHUNK", 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / loading.CHECKED).symlink_to(tmp_path / "nowhere" / "file")
    assert examine(make(), KEYS).bad == {}
    (record,) = caplog.records
    assert "checked.txt cannot be written: No such file or directory (cache_dir)" in record.getMessage()


@pytest.mark.slow
def test_resizing_leaves_the_interpreter_to_other_threads():
    """Threads are of use only if Python code gets on meanwhile; one call of PIL that takes about 0.3 s."""
    picture, done, turns = noise(500, 400).resize((5000, 4000)), threading.Event(), 0

    def work():
        resize(picture, 3000, "squash")
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 10


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"a/x.jpg": "an empty file"}, "1 of 3,669 images cannot be used: a/x.jpg (an empty file); repair"),
        (
            {f"a/{number}.jpg": f"reason {number}" for number in range(10)},
            "10 of 3,669 images cannot be used: "
            + ", ".join(f"a/{number}.jpg (reason {number})" for number in range(10))
            + "; repair",
        ),
        (
            {f"a/{number}.jpg": "cut" if number == 7 else "no such file" for number in range(1005)},
            "1,005 of 3,669 images cannot be used: "
            + ", ".join(f"a/{number}.jpg ({'cut' if number == 7 else 'no such file'})" for number in range(10))
            + " and 995 more (of all: 1,004 no such file, 1 cut); repair",
        ),
    ],
    ids=["one", "ten", "many"],
)
def test_the_report_is_one_line_with_the_fix(bad, line):
    text = str(report(bad, 3669))
    assert text.startswith(line) and "\n" not in text and "data.skip_bad=true" in text


def test_only_the_pictures_that_are_kept_are_cached(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (9, 7), (9, 8, 7)).save(tmp_path / f"{name}.png")
    cache = DiskCache(tmp_path / "cache", 2**20, SUFFIX)
    load = Loader(FileImages({"d": tmp_path}), 8, "squash", cache, 1, kept={"d/b.png"})
    assert len(load(["d/a.png", "d/b.png"])) == 2
    assert [path.stat().st_size for path in cache.folder.glob(f"*{SUFFIX}")] == [bytes_per_picture(8)]


def test_no_picture_starts_a_program(monkeypatch):
    """PIL hands EPS to Ghostscript; a file called .jpg may be one."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **options: started.append(given))
    content = io.BytesIO()
    noise(20, 10).save(content, "EPS")
    assert Image.open(io.BytesIO(content.getvalue())).format == "EPS", "PIL itself would"
    with pytest.raises(BadImage):
        decode(content.getvalue())
    assert started == []
