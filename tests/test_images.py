"""Pictures: decoding what datasets contain, resizing, the cache of decoded ones, and the check before a run."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

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


def palette_with_transparency():
    picture = noise(20, 10).quantize(16)
    picture.info["transparency"] = bytes(range(0, 256, 16))  # one alpha value for every colour
    return encoded(picture, "PNG")


PLAIN = {  # what PIL's convert is enough for
    "jpeg": encoded(noise(30, 20), "JPEG"),
    "greyscale jpeg": encoded(noise(30, 20, 1), "JPEG"),
    "cmyk jpeg": encoded(noise(30, 20, 4).convert("RGB").convert("CMYK"), "JPEG"),
    "png": encoded(noise(30, 20), "PNG"),
    "1-bit png": encoded(noise(30, 20, 1).convert("1"), "PNG"),
    "greyscale png with alpha": encoded(noise(30, 20, 4).convert("LA"), "PNG"),
    "png with alpha": encoded(noise(30, 20, 4), "PNG"),
    "png with a transparent colour": encoded(noise(30, 20), "PNG", transparency=(1, 2, 3)),
    "palette png": encoded(noise(30, 20).quantize(16), "PNG"),
    "gif with a transparent colour": encoded(noise(30, 20).quantize(16), "GIF", transparency=3),
    "webp with alpha": encoded(noise(30, 20, 4), "WEBP", lossless=True),
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


def test_decoding_a_palette_with_transparency_keeps_the_colours_and_is_silent():
    content = palette_with_transparency()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(content)
    stored = Image.open(io.BytesIO(content))
    colours = np.array(stored.getpalette(), dtype=np.uint8).reshape(-1, 3)
    assert np.array_equal(np.asarray(found), colours[np.asarray(stored)])


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
    "gif cut in half": (PLAIN["gif with a transparent colour"][:300], "truncated"),
    "webp cut in half": (PLAIN["webp with alpha"][:500], "."),
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

    monkeypatch.setattr(images.Image, "open", lambda _: Plugin(io.BytesIO(PLAIN["png"])))
    with pytest.raises(BadImage, match="^a long message x{65}$"):
        decode(b"")


def test_lack_of_memory_is_no_fault_of_the_picture(monkeypatch):
    def fail(_):
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
    status = (folder / "b.jpg").stat()
    stored = (folder / "b.jpg").read_bytes()
    assert (found.size(KEYS[1]), found.content(KEYS[1]), found.content(KEYS[1], 3, 5)) == (
        len(stored),
        stored,
        stored[3:8],
    )
    for missing in (found.size, found.content):
        with pytest.raises(BadImage, match="no such file"):
            missing("pets/images/zz.jpg")
    assert found.stamp(KEYS[1]) == f"{folder}/b.jpg:{status.st_size}:{status.st_mtime_ns}"


def test_stamps_do_not_depend_on_the_working_directory(folder, monkeypatch):
    before = FileImages({"pets": folder.parent}).stamp(KEYS[0])
    monkeypatch.chdir(folder.parent.parent)
    assert FileImages({"pets": Path("pets")}).stamp(KEYS[0]) == before


@pytest.mark.parametrize(
    ("key", "reason"),
    [("pets/images/zz.jpg", "no such file"), ("pets/images/empty.jpg", "an empty file"), ("pets/images", "not a file")],
)
def test_a_stamp_needs_a_file_with_content(folder, key, reason):
    (folder / "empty.jpg").touch()
    with pytest.raises(BadImage, match=reason):
        FileImages({"pets": folder.parent}).stamp(key)


def test_several_sources_become_one(folder, tmp_path):
    class Digits:
        def open(self, image):
            return Image.new("RGB", (8, 8), GREEN)

        def stamp(self, image):
            return f"digits {image}"

    both = combine([(KEYS, FileImages({"pets": folder.parent})), (["digits/0", "digits/1"], Digits())])
    same(both.open(KEYS[0]), Image.open(folder / "a.jpg"))
    assert both.open("digits/1").getpixel((0, 0)) == GREEN
    assert both.stamp("digits/1") == "digits digits/1" and both.stamp(KEYS[0]).startswith(f"{folder}/a.jpg:")


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
    entry = 3 * 16 * 16 + 4
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
loader = Loader(FileImages({"pets": folder}), 16, "squash", DiskCache(cache, 5 * 772, ".rgb"), 2)
keys = [f"pets/images/{name}.jpg" for name in "abcdefghijkl"]
print("ready", flush=True)
sys.stdin.readline()
assert examine(loader, keys) == {}
for _ in range(30):
    for picture, key in zip(loader(keys), keys, strict=True):
        sys.stdout.write(picture.tobytes().hex() + "\\n")
"""


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
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.rgb")) <= 12 * 772


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
    bad = examine(loader, [*KEYS, *KEYS])
    assert list(bad) == [KEYS[0], KEYS[1], KEYS[3]]
    assert bad[KEYS[1]] == "no such file or directory" and bad[KEYS[3]] == "an empty file"
    assert "truncated" in bad[KEYS[0]]
    assert sorted(loader.images.opened) == [key for key in KEYS if key not in (KEYS[1], KEYS[3])]
    loader([key for key in KEYS if key not in bad])
    assert len(loader.images.opened) == 10  # the cache is full of the good ones


@pytest.mark.parametrize("limit", [2**20, 0], ids=["cache", "cache of no size"])
def test_a_second_examination_tries_only_what_is_new(make, folder, tmp_path, limit):
    (folder / "k.jpg").write_text("no picture")
    assert list(examine(make(limit=limit), KEYS[:-1])) == [KEYS[10]]
    for entry in (tmp_path / "cache").glob("*.rgb"):
        entry.unlink()
    (folder / "a.jpg").write_text("replaced")
    again = make(limit=limit)
    assert list(examine(again, KEYS)) == [KEYS[0], KEYS[10]]
    assert sorted(again.images.opened) == [KEYS[0], KEYS[10], KEYS[11]]


def test_examining_without_a_cache_works_and_remembers_nothing(make):
    for _ in range(2):
        loader = make(limit=None)
        assert examine(loader, KEYS) == {}
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
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(Loader, "load", lambda self, key: Held())
    assert examine(make(workers=2), KEYS) == {}
    assert alive == 0 and most <= 2


def test_notes_that_cannot_be_written_cost_a_warning(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loading, "CHUNK", 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / loading.CHECKED).symlink_to(tmp_path / "nowhere" / "file")
    assert examine(make(), KEYS) == {}
    (record,) = caplog.records
    assert "checked.txt cannot be written: No such file or directory (cache_dir)" in record.getMessage()


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
            {f"a/{number}.jpg": "no such file" for number in range(1005)},
            "1,005 of 3,669 images cannot be used: a/0.jpg (no such file), a/1.jpg (no such file), "
            "a/2.jpg (no such file) and 1,002 more; repair",
        ),
    ],
    ids=["one", "many"],
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
