"""The pages of docs/ as a site: it builds without a warning, loads nothing foreign, and says what the sources say."""

from __future__ import annotations

import ast
import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from common.counted import plural

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONF = ROOT / "conf"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
GENERATED = "options.md"  # while the site is built, by docs/site/options.py
OPTIONS = sorted(path.relative_to(CONF) for path in CONF.glob("*/**/*.yaml"))


def build(root: Path, target: Path) -> tuple[int, list[str]]:
    """Exit code and complaints. Notices of the theme about its own future are none, whether it prints them or not."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    lines = f"{done.stdout}\n{done.stderr}".splitlines()
    return done.returncode, [line for line in lines if re.match(r"(WARNING|ERROR|Aborted|Traceback|\w*Error)\b", line)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    assert build(ROOT, target) == (0, [])
    return target


class Loads(HTMLParser):
    """What a browser fetches by itself for a page, and the anchors in it."""

    KEYS = (("link", "href"), ("image", "href"), ("use", "href"), ("object", "data"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.urls += [value for key, value in attrs if value and (key in ("src", "srcset") or (tag, key) in self.KEYS)]
        self.anchors |= {value for key, value in attrs if key == "id"}


def is_foreign(url: str) -> bool:
    return re.match(r"(?!data:)[a-z][a-z+.-]*:|//", url, re.IGNORECASE) is not None


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def test_what_counts_as_foreign():
    page = Loads('<link rel="preconnect" href="//fonts.host"><script src="https://x/y.js"></script><img src="a.png">')
    assert [is_foreign(url) for url in page.urls] == [True, True, False]
    assert not is_foreign("data:image/png;base64,AA==")


@pytest.mark.slow
def test_pages_load_nothing_foreign(site):
    pages = sorted(site.glob("*.html"))
    assert {f"{path.stem}.md" for path in pages} >= {*PAGES, GENERATED}
    for path in pages:
        text = path.read_text(encoding="utf-8")
        loads = Loads(text)
        assert loads.urls and not [url for url in loads.urls if is_foreign(url)], path.name
        # what the theme's script would fetch from others by itself: a library for diagrams, facts about a repository
        assert 'class="mermaid"' not in text and 'data-md-component="source"' not in text, path.name
        files = [unquote(re.split("[?#]", url)[0]) for url in loads.urls if not url.startswith("data:")]
        # the page for broken links has paths from the root, wherever it is shown
        missing = [name for name in files if not (site / name.lstrip("/")).exists()]
        assert not missing, path.name
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        urls = re.findall(r"url\(['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        assert not [url for pair in urls for url in pair if is_foreign(url)], path.name


def listed(entry: object) -> list[str]:
    """The pages below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    below = entry.values() if isinstance(entry, dict) else entry
    return [page for each in below for page in listed(each)]


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(listed(nav)) == sorted([*PAGES, GENERATED])


@pytest.mark.parametrize("name", ["../README.md", *PAGES])
def test_links_lead_to_files_of_the_repository(name):
    """So that they work on GitHub too, where the generated page is not."""
    page = DOCS / name
    code = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", code.sub("", page.read_text(encoding="utf-8")))
    missing = [target for target in targets if not is_foreign(target) and not (page.parent / target).is_file()]
    assert not missing


@pytest.mark.slow
def test_a_dead_link_a_dead_anchor_and_a_forgotten_page_end_the_build(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    for name in ("conf", "common", "alert", "clsrl"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", root)
    shutil.copytree(DOCS, root / "docs")
    (root / "docs" / "forgotten.md").write_text(
        "# Forgotten\n\n[a](nowhere.md) [b](runs.md#nowhere)\n", encoding="utf-8"
    )
    code, complaints = build(root, tmp_path / "site")
    said = "\n".join(complaints)
    assert code == 1 and "'nowhere.md'" in said and "'#nowhere'" in said and 'not included in the "nav"' in said


def leaves(node: object, prefix: str = "") -> list[str]:
    """Dotted keys of all values."""
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [leaf for key, value in node.items() for leaf in leaves(value, f"{prefix}.{key}")]


@pytest.mark.slow
def test_every_option_is_listed_with_its_values(site):
    page = (site / "options.html").read_text(encoding="utf-8")
    anchors = Loads(page).anchors
    groups = {option.parent.as_posix() for option in OPTIONS}
    assert len(OPTIONS) > 100 and {group.replace("/", "-") for group in groups} <= anchors
    sections = dict(re.findall(r"<code>conf/([^<]+\.yaml)</code>(.*?)(?=<h[23] |\Z)", page, re.DOTALL))
    assert set(sections) == {option.as_posix() for option in OPTIONS}
    for option in OPTIONS:
        values = yaml.safe_load((CONF / option).read_text(encoding="utf-8")) or {}
        shown = [f".{key}" for key in re.findall(r"<td><code>([^<]+)</code></td>", sections[option.as_posix()])]
        for key in leaves({key: value for key, value in values.items() if key != "defaults"}):
            assert not key or any(each.endswith(key) for each in shown), f"{option}: {key}"


@pytest.mark.slow
def test_every_comment_of_the_configuration_is_on_the_page(site):
    page = text_of((site / "options.html").read_text(encoding="utf-8"))
    found = 0
    for option in OPTIONS:
        for line in (CONF / option).read_text(encoding="utf-8").splitlines():
            comment = re.search(r"(?:^|\s)#\s*(?!\s|@package)(.+)$", line)
            if comment and "defaults:" not in line:
                found += 1
                assert " ".join(comment[1].replace("`", "").split()) in page, f"{option}: {line}"
    assert found > 300


@pytest.mark.slow
def test_every_field_of_the_schema_is_on_the_page(site):
    page = (site / "options.html").read_text(encoding="utf-8")
    shown = set(re.findall(r"<td><code>([^<]+)</code></td>", page))
    for path in (ROOT / "common" / "config").glob("schema*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            fields = [each.target.id for each in getattr(node, "body", ()) if isinstance(each, ast.AnnAssign)]
            missing = [name for name in fields if not any(key.split(".")[-1] == name for key in shown)]
            assert not [name for name in missing if not (CONF / name).is_dir()], path.name


def test_comments_belong_to_the_key_beside_below_and_before_them():
    from docs.site.options import Row, Written

    text = """\
# What this is.
#   python run.py
defaults: [_self_]

# above a
a: "x # y"   # beside a
             # and below
b:           # of all
  c: {d: 1, e: [2,
       3]}   # at the end
  f:
    - one
    - two    # of a list
"""
    written = Written(text)
    assert written.head == ["What this is.", "python run.py"]
    assert written.rows() == [
        Row("a", '"x # y"', "above a beside a and below"),
        Row("b", "", "of all"),
        Row("b.c.d", "1", ""),
        Row("b.c.e", "[2,\n       3]", "at the end"),
        Row("b.f", "[one, two]", "of a list"),
    ]


@pytest.mark.slow
def test_the_api_is_read_without_a_gap(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    asked = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(asked) > 15 and ":::" not in text_of(page)
    assert set(asked) <= Loads(page).anchors
    text = text_of(page)
    for words in (
        "Abstain where more than this share",
        "train_prompts",
        "set_task",
        "logprobs_untruncated",
        "StatefulReward",
    ):
        assert words in text, words


def template(node: ast.AST) -> str:
    """A text of the source as a reader of messages sees it: `…` stands for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else filled(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def filled(part: ast.AST) -> str:
    """What stands for a value: a number and its noun for `counted`."""
    value = part.value if isinstance(part, ast.FormattedValue) else None
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "counted":
        noun = value.args[1]
        return f"… {plural(noun.value)}" if isinstance(noun, ast.Constant) else "…"
    return "…"


def templates() -> set[str]:
    files = [*(path for name in ("common", "alert", "clsrl") for path in (ROOT / name).rglob("*.py")), ROOT / "run.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {text for tree in trees for node in ast.walk(tree) if (text := template(node))}


def unknown(messages: list[str], known: set[str]) -> list[str]:
    return [message for message in messages if not any(message in text for text in known)]


def quoted() -> list[str]:
    """The messages of the page: code in the first column of its tables."""
    lines = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    return [
        message for line in lines if line.startswith("| `") for message in re.findall("`([^`]+)`", line.split(" | ")[0])
    ]


@pytest.mark.slow
def test_every_message_of_the_troubleshooting_page_is_in_the_source():
    messages = quoted()
    assert len(messages) >= 30 and all(len(message.replace("…", "")) > 10 for message in messages)
    assert not unknown(messages, templates())


def test_a_message_that_was_reworded_is_noticed():
    known = {"shots=…: give the number of training images", "gpus=…, but this machine has …"}
    assert unknown(["shots=…: give the number", "gpus=…, but there is …", "shots=4: give"], known) == [
        "gpus=…, but there is …",
        "shots=4: give",
    ]
