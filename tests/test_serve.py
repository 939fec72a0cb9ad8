"""The local page: what is refused, what is kept, and the whole of it in a real browser."""

from __future__ import annotations

import csv
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from PIL import Image

from common import Classifier
from common.data.digits import Digits
from common.data.source import load_dataset
from common.predict.classifier import Answer
from common.run.result import Result
from common.serve import __main__ as command
from common.serve.page import Uploads
from common.serve.service import Limits, PredictionService
from common.types import UserError
from tests.conftest import REPOSITORY
from tests.test_browser import BROWSER


def png(picture, **options):
    file = BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def bomb(side=60_000):
    """A PNG of a kilobyte whose header promises gigabytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


class Echo:
    """Names a picture by its width."""

    names, background = ("narrow", "wide"), "white"

    def __call__(self, pictures):
        return [Answer(name, label=str(Image.open(BytesIO(content)).width)) for name, content in pictures.items()]


GOOD = png(Image.new("RGB", (7, 5), "red"))


def test_what_is_too_much_is_refused_and_the_others_are_answered(tmp_path):
    service = PredictionService(Echo(), tmp_path, Limits(megabytes=0.01, megapixels=1, pictures=5))
    noise = png(Image.frombytes("RGB", (100, 100), os.urandom(30_000)))
    answers = service.answer({"big": noise, "bomb": bomb(), "text": b"no picture", "good": GOOD, "empty": b""})
    assert [each.image for each in answers] == ["big", "bomb", "text", "good", "empty"]
    assert answers[3] == Answer("good", label="7")
    troubles = [each.error for each in answers]
    assert troubles[0].endswith("MB are more than 0.01 MB") and "3600 megapixels are more than 1" in troubles[1]
    assert troubles[2] == troubles[4] and troubles[2].startswith("not a picture that is taken here") and not troubles[3]
    nested = BytesIO()  # PIL decodes what is inside before it knows how large that is
    Image.new("RGB", (256, 256)).save(nested, "ICO")
    assert service.refusal(nested.getvalue()).startswith("not a picture that is taken here")
    for kind in ("HEIF", "AVIF"):  # as phones write them
        photo = BytesIO()
        Image.new("RGB", (64, 64)).save(photo, kind)
        assert service.refusal(photo.getvalue()) == ""
    with pytest.raises(UserError, match="300 MB at once; at most 200 MB"):
        Limits().check([150_000_000] * 2)
    assert service.answer({"bomb": bomb()})[0].error, "nobody is asked about nothing"
    with pytest.raises(UserError, match="6 pictures at once; at most 5"):
        service.answer({str(n): GOOD for n in range(6)})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_corrections_are_a_dataset(tmp_path, compose):
    """Written anew without metadata, a later name replaces the earlier, and data=folder reads them."""
    service, exif = PredictionService(Echo(), tmp_path / "feedback"), Image.Exif()
    exif[0x010E] = "where I live"
    pictures = [Image.new("RGB", (9, 9), (n * 20, 0, 0)) for n in range(6)]
    for number, picture in enumerate(pictures):
        table = service.keep(png(picture, exif=exif), "wide" if number % 2 else "  very   narrow ", "7")
    assert service.keep(png(pictures[1]), "narrow too", None) == table
    rows = list(csv.DictReader(table.open()))
    assert [row["label"] for row in rows] == ["very narrow", "narrow too", *["very narrow", "wide"] * 2]
    assert rows[0]["answered"] == "7" and rows[1]["answered"] == ""
    for row, picture in zip(rows, pictures, strict=True):
        kept = table.parent / row["path"]
        assert b"where I live" not in kept.read_bytes() and Image.open(kept).tobytes() == picture.tobytes()
    data = load_dataset(compose("data=folder", f"data.folder={table}").data)
    assert data.source.names == ("narrow too", "very narrow", "wide") and len(data.source.train) == 6
    for label in ("", " ", "a,b", "x" * 101, "?!"):
        with pytest.raises(UserError, match="is no class name"):
            service.keep(GOOD, label, None)
    with pytest.raises(UserError, match="not a picture"):
        service.keep(b"text", "wide", None)
    assert len(list(csv.DictReader(table.open()))) == 6


def test_without_gradio_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([str(tmp_path)]) == 2
    assert "uv pip install 'gradio" in capsys.readouterr().err


QUICK = ["method=zeroshot", "tracking=none", "tracking.report=false", "setting.test_per_class=2"]


@pytest.fixture(scope="module")
def served(runner, tmp_path_factory):
    """A page over a run, as the command starts it: its address, its run, its folders."""
    from tests.conftest import CACHE

    folder = tmp_path_factory.mktemp("served")
    environment = {
        **os.environ,
        "FEWSHOT_CACHE": str(CACHE),
        "TMPDIR": str(folder / "temporary"),
        "WANDB_MODE": "offline",
    }
    (folder / "temporary").mkdir()
    assert runner(folder / "run", QUICK) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [sys.executable, "-m", "common.serve", str(folder / "run"), "--port", str(port)]
    started += ["--feedback", str(folder / "feedback"), "--max-mb", "10"]
    process = subprocess.Popen(started, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}", folder
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, "Ctrl-C ends it"
        left = [
            path.name
            for path in (folder / "temporary").rglob("*")
            if "uploads-" in str(path) or "predict-" in str(path)
        ]
        assert left == [], "no upload stays"
    finally:
        process.kill()


@pytest.fixture(scope="module")
def known(served):
    """What the run answers about some digits: by key, content and answer."""
    classifier, digits = Classifier.load(served[1] / "run"), Digits()
    contents = {f"{key}.png": png(digits.open(str(key))) for key in range(20)}
    answers = dict(zip(contents, classifier(contents), strict=True))
    classifier.close()
    return {name: (contents[name], answers[name]) for name in contents}


def whole(folder):
    """Uploads that have come through and still lie on the disk."""
    return [path for path in (folder / "temporary").glob("uploads-*/*/*") if path.is_file()]


def test_what_is_left_of_uploads_is_deleted_after_a_while(tmp_path):
    (tmp_path / "hash").mkdir()
    for name, age in (("partial", 130), ("coming", 60), ("hash/waiting.png", 1000), ("hash/forgotten.png", 4000)):
        (tmp_path / name).write_bytes(GOOD)
        os.utime(tmp_path / name, (10_000 - age,) * 2)
    Uploads(tmp_path, 10).tidy(10_000)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["waiting.png"]
    assert not (tmp_path / "partial").exists() and (tmp_path / "coming").exists()


def test_uploads_are_read_once_and_remembered_for_a_while(tmp_path):
    paths = [tmp_path / "uploads" / name for name in "abc"]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    uploads, sizes = Uploads(tmp_path / "uploads", 20), []
    assert uploads([str(paths[0])] * 2, sizes.append) == [b"a" * 10] * 2 and not paths[0].exists()
    assert uploads([str(path) for path in paths], sizes.append) == [b"a" * 10, b"b" * 10, b"c" * 10]
    assert sizes == [[10, 10], [10, 10, 10]]
    with pytest.raises(UserError, match="an upload is not there any more"):
        uploads([str(paths[0])], sizes.append)
    (tmp_path / "secret").write_bytes(b"s")
    for path in (tmp_path / "secret", tmp_path / "uploads" / ".." / "secret"):
        with pytest.raises(UserError, match="this is no uploaded picture"):
            uploads([str(path)], sizes.append)

    def refuse(sizes):
        raise UserError("too much")

    with pytest.raises(UserError, match="too much"):
        uploads([str(paths[2])], refuse)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium-headless-shell)")
def test_in_a_browser(served, known, tmp_path):
    """Upload, answer, refusals, correction; nothing foreign is asked, no upload stays."""
    from playwright.sync_api import expect, sync_playwright

    address, folder = served
    files = {"3.png": known["3.png"][0], "notes.png": b"no picture", "bomb.png": bomb()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + os.urandom(50_000_000))
    foreign, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.on("request", lambda request: foreign.append(request.url) if address not in request.url else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        about = page.locator(".about")
        expect(about).to_contain_text("They stay on this machine")
        expect(about).to_contain_text("10: zero, one, two, three, four, five, six, seven, eight, nine")
        summary = Result.load(folder / "run").before["test"]
        expect(about).to_contain_text(f"{100 * summary.accuracy:.1f} % right on {summary.n} test images")
        page.set_input_files("input[type=file]", [tmp_path / name for name in files])
        cards = page.locator(".answer")
        expect(cards).to_have_count(3, timeout=60_000)
        answer = known["3.png"][1]
        expect(cards.nth(0).locator("h3")).to_have_text(answer.label)
        expect(cards.nth(0).locator(".bar").first).to_contain_text(f"{100 * answer.confidence:.1f} %")
        expect(cards.nth(1)).to_contain_text("not a picture that is taken here")
        expect(cards.nth(2)).to_contain_text("3600 megapixels are more than 50")
        page.get_by_label("Right name").fill("three")
        page.get_by_label("Right name").press("Enter")
        page.get_by_role("button", name="Save correction").click()
        expect(page.get_by_text("3.png: saved as three in")).to_be_visible(timeout=20_000)
        page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"), full_page=True)
        page.reload()
        page.set_input_files("input[type=file]", [tmp_path / "large.png"])
        expect(page.locator("main .error", has_text="Error").first).to_be_visible(timeout=60_000)
        expect(cards).to_have_count(0)
        browser.close()
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == [] and errors == []
    (row,) = csv.DictReader((folder / "feedback" / "feedback.csv").open())
    assert row["label"] == "three" and row["answered"] == (answer.label or "")
    assert whole(folder) == []


@pytest.mark.slow
def test_twenty_at_once_are_all_answered_right(served, known, tmp_path):
    from gradio_client import Client, handle_file

    address, folder = served
    client = Client(address, verbose=False)

    def ask(name):
        path = tmp_path / name
        if not path.exists():  # another thread may be sending it
            path.write_bytes(known[name][0])
        return client.predict([handle_file(str(path))], api_name="/classify")

    with ThreadPoolExecutor(20) as pool:
        for name, found in zip(known, pool.map(ask, known), strict=True):
            (answer,) = found
            assert (answer["label"], answer["reply"]) == (known[name][1].label, known[name][1].reply)
            assert answer["confidence"] == pytest.approx(known[name][1].confidence, abs=1e-5)
    # equal pictures under one name, in one request and in many at a time
    same = tmp_path / "0.png"
    twice = client.predict([handle_file(str(same)), handle_file(str(same))], api_name="/classify")
    assert [answer["label"] for answer in twice] == [known["0.png"][1].label] * 2
    with ThreadPoolExecutor(10) as pool:
        assert {found[0]["reply"] for found in pool.map(ask, ["0.png"] * 10)} == {known["0.png"][1].reply}
    assert whole(folder) == []


@pytest.mark.slow
def test_files_of_the_machine_cannot_be_asked_for(served):
    import httpx

    address, folder = served
    secret = folder / "secret.png"
    secret.write_bytes(GOOD)
    for way in (
        f"file={secret}",
        f"file={folder}/temporary/../secret.png",
        "file=/etc/passwd",
        "file=..%2f..%2fetc/passwd",
    ):
        reply = httpx.get(f"{address}/gradio_api/{way}")
        assert reply.status_code in (403, 404) and reply.content != GOOD and b"root:" not in reply.content
    for path in (str(secret), "/etc/passwd", "../../secret.png", f"{folder}/temporary/../secret.png"):
        for file in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}):
            asked = httpx.post(f"{address}/gradio_api/call/classify", json={"data": [[file]]})
            assert asked.status_code == 200, asked.text
            told = httpx.get(f"{address}/gradio_api/call/classify/{asked.json()['event_id']}", timeout=60).text
            assert "event: error" in told and "root:" not in told
            assert "this is no uploaded picture" in told or "was not uploaded by a user" in told
    assert secret.read_bytes() == GOOD, "and none is deleted"
    large = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", os.urandom(50_000_000))}, timeout=60)
    assert large.status_code >= 400 and whole(folder) == []
    host, port = address.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=5)
