"""A run's page in a real browser, opened from the disk. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

from common.predict import cards
from common.predict.classifier import Answer
from common.report.html import run_page
from tests.test_html import HOSTILE, NAMES, answered, write  # noqa: F401

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium-headless-shell)"),
]
MANY = 50_000


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser, folder, link="", width=1200, scheme="light"):
    """The page; afterwards: nothing was asked of a network, no script failed, no dialog opened, nothing was hacked."""
    troubles = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{(folder / 'report.html').as_uri()}{link}")
    page.wait_for_selector("#list li, #page:text('nothing fits')")
    yield page
    assert troubles == [] and page.evaluate("window.hacked") is None
    here = folder.as_uri()
    assert [url for url in asked if not url.startswith((here, "data:image/webp"))] == []
    page.close()


def shown(page):
    return page.locator("#list .words").all_inner_texts()


def settle(page, count):
    sync_api.expect(page.locator("#count")).to_have_text(re.compile(f"^{count} of"), timeout=20_000)


def arrive(page, part):
    """Wait until the address says so."""
    page.wait_for_url(lambda url: part in url.partition("#")[2])


@pytest.fixture
def folder(write):  # noqa: F811
    """45 images: of every nine, seven are right twice, one is fixed and one broken."""
    images = [f"{NAMES[n % 3]}/{n:02}.png" for n in range(45)]
    labels = [NAMES[n % 3] for n in range(45)]
    other = dict(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))
    first = [other[name] if n % 9 == 4 else name for n, name in enumerate(labels)]
    last = [other[name] if n % 9 == 5 else name for n, name in enumerate(labels)]
    texts = [f"a hook number {n}" for n in range(45)]
    confidences = [0.99 - n / 100 for n in range(45)]
    agrees = [n != 7 for n in range(45)]
    before = answered(images, labels, first, NAMES, confidences, texts, reasoning_agrees=agrees)
    after = answered(images, labels, last, NAMES, confidences, texts, reasoning_agrees=agrees)
    row = {"prompt": "Which?", "label": "six", "tokens": 1, "truncated": False, "lag": 0, "rewards/accuracy": 1.0}
    row |= {"judge_reply/judge": "Score: 8", "reward": 1.5}
    samples = [
        row | {"step": s, "image": "t.png", "completion": f"c{s}{g}", "advantage": g - 1.0}
        for s in (1, 2)
        for g in (0, 2)
    ]
    made = write("run", before, after, samples=samples, keep=images)
    run_page.make(made)
    return made


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_page_opens_and_nothing_overflows(browser, folder, width, scheme):
    with opened(browser, folder, width=width, scheme=scheme) as page:
        settle(page, 45)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert len(shown(page)) == 20 and page.locator("#page").inner_text() == "1 / 3"
        assert page.locator("#list img").first.evaluate("image => image.naturalWidth") == 128
        assert page.locator("figure svg").count() == 2
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert (ink == "rgb(28, 36, 48)") == (scheme == "light")
        assert page.get_by_text("Wide tables scroll sideways.").is_visible() == (width == 390)
        row = page.locator("#results tr", has_text="test, trained")
        assert row.locator("td").nth(2).inner_text().count("–") == 1, "the interval"
        box = row.locator("td").nth(2).bounding_box()
        assert box["x"] + box["width"] <= width, "is seen without scrolling"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_page_of_answers(browser, tmp_path, width, scheme):
    """Its filter, its bars (a name, a bar, a number, none over the other), and nothing overflows."""
    names = ("a <name> that is long enough to need two lines, or three, on a telephone", "🎉 b")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "x.png")
    answers = [
        Answer("1.png", label=names[0], confidence=0.7, top=((names[0], 0.7), (names[1], 0.3)), reasoning="red"),
        Answer("2.png", label=names[1], confidence=0.9, top=((names[1], 0.9), (names[0], 0.1))),
        Answer("3.png", abstained=True, confidence=0.4, top=((names[1], 0.4),)),
        Answer("4.png", error="not a picture"),
    ]
    pictures = {answer.image: tmp_path / "x.png" for answer in answers}
    about = cards.About("birds-7", "probe", names, "70 % right", "answers from 50 % on")
    (tmp_path / "page.html").write_text(cards.page(answers, pictures, about), encoding="utf-8")
    troubles = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("h1").inner_text() == "Answers of birds-7" and "70 % right" in page.inner_text("header")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for bar in page.locator(".bar").all():
        places = [bar.locator(f"> {part}").bounding_box() for part in ("span", "i", "b")]
        for left, right in pairwise(places):
            assert left["x"] + left["width"] < right["x"]

    def seen(**given):
        for name, value in given.items():
            field = page.locator(f"#{name}")
            field.select_option(value) if name in ("kind", "class") else field.fill(value)
        return [text.removesuffix(".png") for text in page.locator(".answer:visible .file").all_inner_texts()]

    assert seen() == ["1", "2", "3", "4"] and page.inner_text("#shown") == "4 of 4 shown"
    assert seen(kind="abstained") == ["3"] and seen(kind="broken") == ["4"] and seen(kind="answered") == ["1", "2"]
    assert seen(**{"class": names[1]}) == ["2"] and seen(**{"class": ""}, words="RED") == ["1"]
    assert seen(words="", below="90") == ["1"] and seen(kind="") == ["1", "3", "4"]
    assert page.inner_text("#shown") == "3 of 4 shown" and troubles == []
    page.close()


def test_filters(browser, folder):
    with opened(browser, folder) as page:
        settle(page, 45)
        for choice, count in (
            ("fixed", 5),
            ("broken", 5),
            ("wrong", 5),
            ("right", 40),
            ("disagrees", 1),
            ("malformed", 0),
        ):
            page.select_option("#show", choice)
            settle(page, count)
        assert page.locator("#page").inner_text() == "nothing fits"
        page.click("button[type=reset]")
        settle(page, 47)  # with the two training images
        page.select_option("#split", label="test")
        page.select_option("#label", label="nine")
        settle(page, 15)
        page.fill("#below", "60")
        settle(page, 2)  # 40 and 43 of nine; 0.99 - n / 100 < 0.6 from 40 on
        assert [text.split("\n")[-1].split(" · ")[1] for text in shown(page)] == ["nine/40.png", "nine/43.png"]


def test_a_cell_of_the_matrix_shows_its_images(browser, folder):
    with opened(browser, folder) as page:
        page.click("button[data-label='2'][data-answer='0']")
        settle(page, 5)
        assert page.locator("#list .words").first.inner_text().startswith("two → six")
        assert page.locator("#detail h3").first.inner_text() == "two"


def test_search_and_clear(browser, folder):
    with opened(browser, folder) as page:
        page.keyboard.press("/")
        page.keyboard.type("NUMBER 13")
        settle(page, 1)
        assert "nine/13.png" in shown(page)[0] and "query=NUMBER+13" in page.url
        page.keyboard.press("Escape")
        settle(page, 47)
        page.fill("#query", "score: 8")
        settle(page, 2)  # what a judge said
        page.fill("#query", "which")
        settle(page, 0)  # the questions list all names, so they are not searched


def test_keys_move_and_the_address_leads_back(browser, folder):
    with opened(browser, folder) as page:
        settle(page, 45)
        for key in ("j", "j", "k", "ArrowRight", "j"):
            page.keyboard.press(key)
        arrive(page, "21.png")
        assert page.locator("#page").inner_text() == "2 / 3"
        page.select_option("#show", "fixed")
        settle(page, 5)
        page.keyboard.press("j")
        arrive(page, "13.png")
        link = page.url.partition("#")[2]
    with opened(browser, folder, f"#{link}") as page:
        settle(page, 5)
        assert page.locator("#list [aria-current=true] small").inner_text().startswith("test · nine/13.png")
        cards = page.locator("#detail .card h3").all_inner_texts()
        assert cards == ["before training ✗", "after training ✓"]


def test_a_training_image_shows_what_was_compared(browser, folder):
    with opened(browser, folder, "#split=training") as page:
        settle(page, 2)
        cards = page.locator("#detail .card")
        assert cards.count() == 2 and cards.nth(0).locator("pre").first.inner_text() == "c10"
        facts = dict(
            zip(cards.nth(1).locator("dt").all_inner_texts(), cards.nth(1).locator("dd").all_inner_texts(), strict=True)
        )
        assert facts == {"reward": "1.5", "accuracy": "1", "advantage": "1", "tokens": "1"}
        page.keyboard.press("j")
        arrive(page, "row=46")
        link = page.url.partition("#")[2]
    with opened(browser, folder, f"#{link}") as page:  # the same picture again, of the second update
        settle(page, 2)
        cards = page.locator("#detail .card")
        assert cards.nth(0).locator("pre").first.inner_text() == "c20"
        cards.nth(1).locator("summary").click()
        assert cards.nth(1).locator("details pre").inner_text() == "Score: 8"


@pytest.mark.faults
def test_fifty_thousand_rows(browser, write):  # noqa: F811
    """Their texts lie beside the page; each page of the list is there in a fifth of a second."""
    images = [f"{n}.png" for n in range(MANY)]
    labels = [NAMES[n % 3] for n in range(MANY)]
    said = [NAMES[(n + (n % 7 == 0)) % 3] for n in range(MANY)]
    texts = [f"number {n}, " + "and so on " * 20 for n in range(MANY)]
    made = write("run", answered(images, labels, said, NAMES, [0.5 + n / (2 * MANY) for n in range(MANY)], texts))
    run_page.make(made)
    assert (made / "report.html").stat().st_size < 3_000_000
    turn = """async (id) => {
        const page = document.getElementById("page"), before = page.textContent, start = performance.now();
        document.getElementById(id).click();
        while (page.textContent === before) await new Promise((next) => setTimeout(next, 1));
        return performance.now() - start;
    }"""
    with opened(browser, made) as page:
        settle(page, "50,000")
        times = [page.evaluate(turn, "next") for _ in range(15)]
        page.select_option("#show", "wrong")
        settle(page, "7,143")  # every seventh: rows of a page come from several files
        times += [page.evaluate(turn, "next") for _ in range(15)]
        assert median(times) < 200, times
        page.fill("#query", "number 49994,")
        settle(page, 1)
        assert "49994.png" in shown(page)[0]
    assert Path(made / "report" / "rows-499.js").is_file()


def test_hostile_texts_are_text(browser, write):  # noqa: F811
    texts = [*HOSTILE, "<b>" * 300_000]
    names = [f"{text[:60]} {n}" for n, text in enumerate(HOSTILE)]
    labels = [names[n % len(names)] for n in range(len(texts))]
    images = [f"{text[:50]}/{n}.png" for n, text in enumerate(texts)]
    before = answered(images, labels, labels, names, [0.9] * len(texts), texts, prompt=texts)
    said = {key: HOSTILE[n] for n, key in enumerate(("method", "data", "model", "setting", "protocol"))}
    made = write("a <b>run</b> & 'more'", before, before, names=names, **said)
    run_page.make(made)
    with opened(browser, made) as page:
        settle(page, len(texts))
        for n, text in enumerate(texts[:-1]):
            assert page.locator("#detail pre").nth(1).text_content() == text, n
            page.locator("#detail summary").click()
            page.keyboard.press("j")
            arrive(page, f"%2F{n + 1}.png")
        assert page.locator("#detail b, #list b, h1 b").count() == 0
        assert page.locator("h1").text_content() == f"{HOSTILE[0]} · digits", "the dataset by its configuration"
        page.select_option("#label", index=3)
        settle(page, 1)
