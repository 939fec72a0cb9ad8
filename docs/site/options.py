"""Writes the page "Every option" while the site is built: values and comments from conf/, types from the schema.

A hook of mkdocs (mkdocs.yml). The page is made anew with every build, so none of it can be out of date.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
PAGE = "options.md"
PRESET = "# @package _global_"
HEAD = """# Every option

This page is made from the files in `conf/` and the types in `common/config/`.
Choose one option of a group with `group=option`, and set a single value with `key=value`.
`python run.py --cfg job` shows the values of one run, `--info defaults-tree` says which files they come from.
"""
NOTES = {
    "tune": "Exceptions for one combination of choices. They apply by themselves; nobody names them.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those of docs/."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The whole page, as Markdown with tables in HTML, in which no character of a value has a meaning."""
    schema = Schema()
    folders = sorted({path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")})
    first = [key for key, *_ in schema.classes["Config"].fields if key in folders]
    parts = [HEAD, *_values_of_a_run(schema)]
    for folder in [*first, *(folder for folder in folders if folder not in first)]:
        parts.append(f"## {folder} {{#{_anchor(folder)}}}\n")
        if note := NOTES.get(folder) or NOTES.get(folder.partition("/")[0]):
            parts.append(f"{note}\n")
        if kind := schema.of_group(folder):
            parts += schema.describe(folder, kind)
        for path in sorted((CONF / folder).glob("*.yaml")):
            parts += _option(folder, path)
    return "\n".join(parts)


def _values_of_a_run(schema: Schema) -> Iterator[str]:
    """The keys of conf/config.yaml itself."""
    types = schema.types
    plain = {key: kind for key, kind in types.items() if kind not in schema.classes}
    written = Written((CONF / "config.yaml").read_text(encoding="utf-8"))
    rows = [row for row in written.rows() if not row.key.startswith("hydra.")]
    yield "## Values of a run {#run}\n"
    yield _table(
        ("key", "value", "type", ""),
        [(row.key, row.value, plain.get(row.key, ""), row.comment) for row in rows],
    )
    for key, kind in types.items():
        if kind in schema.classes and not (CONF / key).is_dir():
            yield from schema.describe(key, kind)


def _option(folder: str, path: Path) -> Iterator[str]:
    """One file: what it says of itself, what it chooses, and its values."""
    written = Written(path.read_text(encoding="utf-8"))
    option = path.stem
    is_group = folder.partition("/")[0] not in NOTES and folder not in NOTES
    title = f"{folder}={option}" if is_group else f"{folder}/{option}"
    yield f"### `{title}` {{#{_anchor(title)}}}\n"
    yield f"`conf/{folder}/{option}.yaml`\n"
    yield from _head(written.head)
    for verb, chosen in _choices(folder, written.defaults).items():
        if chosen:
            yield f"<p>{verb} {', '.join(f'<code>{escape(each)}</code>' for each in chosen)}.</p>\n"
    prefix = "" if PRESET in written.text else folder.replace("/", ".")
    rows = [(f"{prefix}.{row.key}".lstrip("."), row.value, row.comment) for row in written.rows()]
    if rows:
        yield _table(("key", "value", ""), rows)


def _head(lines: Sequence[str]) -> Iterator[str]:
    """The comment at the top of a file: sentences, and commands as code."""
    sentences = [line for line in lines if not _is_command(line)]
    commands = [line.strip() for line in lines if _is_command(line)]
    if sentences:
        yield f"<p>{_text(' '.join(sentences))}</p>\n"
    if commands:
        yield "\n".join(["```bash", *commands, "```", ""])


def _is_command(line: str) -> bool:
    return line.strip().startswith(("python ", "make "))


def _choices(folder: str, defaults: Sequence[object]) -> dict[str, list[str]]:
    """What a file's defaults list begins from in its own group, and chooses in others."""
    begins = [
        f"{folder}={entry}" for entry in defaults if isinstance(entry, str) and not re.search("[/@]|_self_", entry)
    ]
    pairs = [(str(key), value) for entry in defaults if isinstance(entry, dict) for key, value in entry.items()]
    pairs = [(key, value) for key, value in pairs if not key.startswith("optional ")]  # files of conf/tune/
    chooses = [f"{key.removeprefix('override ').removeprefix('/')}={value}" for key, value in pairs if "@" not in key]
    return {"Begins from": begins, "Chooses": chooses}


@dataclass(frozen=True)
class Row:
    """A key with its value as it is written, and the comment beside or above it."""

    key: str
    value: str
    comment: str


class Written:
    """A YAML file with its comments, which no parser keeps."""

    def __init__(self, text: str) -> None:
        self.text, self.lines = text, text.splitlines()
        ends = [0] * (len(self.lines) + 1)  # where the last token of every line ends
        for token in yaml.scan(text):
            if token.start_mark.index < token.end_mark.index:
                mark = token.end_mark
                ends[mark.line] = max(ends[mark.line], mark.column)
        self.comments = {
            number: (line.index("#", ends[number]), line[ends[number] :].strip().lstrip("#").strip())
            for number, line in enumerate(self.lines)
            if line[ends[number] :].strip().startswith("#")
        }
        self.alone = {number for number in self.comments if self.lines[number].strip().startswith("#")}
        self.begins = next((n for n in range(len(self.lines)) if n not in self.alone), len(self.lines))
        self.node = yaml.compose(text)
        loaded = yaml.safe_load(text)
        self.defaults: list[object] = loaded.get("defaults", []) if isinstance(loaded, dict) else []

    @property
    def head(self) -> list[str]:
        """The lines of the comment that the file begins with."""
        return [self.comments[n][1] for n in range(self.begins) if self.lines[n] != PRESET]

    def rows(self) -> list[Row]:
        """All values, by dotted key. A key that holds others has a row of its own where something is said of it."""
        return (
            list(self._rows(self.node, "", set(range(self.begins)))) if isinstance(self.node, yaml.MappingNode) else []
        )

    def _rows(self, node: yaml.MappingNode, prefix: str, used: set[int]) -> Iterator[Row]:
        for key, value in node.value:
            name = prefix + str(key.value)
            if name == "defaults":
                continue
            holds = isinstance(value, yaml.MappingNode) and value.value
            last = key.start_mark.line if holds else max(key.start_mark.line, self._last_line(value))
            comment = self._said(key.start_mark.line, last, used)
            if not holds:
                yield Row(name, self._source(value), comment)
                continue
            if comment:
                yield Row(name, "", comment)
            yield from self._rows(value, f"{name}.", used)

    def _last_line(self, node: yaml.Node) -> int:
        return node.end_mark.line if node.end_mark.column else node.end_mark.line - 1

    def _said(self, line: int, last: int, used: set[int]) -> str:
        """The comment above a line, beside it, and its further lines in the same column; each is given once."""
        above = line
        while above - 1 in self.alone and above - 1 not in used:
            above -= 1
        found = list(range(above, line))
        for beside in dict.fromkeys((line, last)):
            if beside in self.comments and beside not in used:
                found.append(beside)
                column = self.comments[beside][0]
                below = beside + 1
                while below in self.alone and self.comments[below][0] == column > 0:
                    found.append(below)
                    below += 1
        used.update(found)
        return " ".join(self.comments[number][1] for number in found)

    def _source(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.SequenceNode) and not node.flow_style:
            return f"[{', '.join(self._source(each) for each in node.value)}]"
        return self.text[node.start_mark.index : node.end_mark.index].strip()


@dataclass(frozen=True)
class Kind:
    """A dataclass of the schema: its docstring, and its fields with type and default as a YAML file has them."""

    bases: tuple[str, ...]
    said: str
    fields: tuple[tuple[str, str, str], ...]


class Schema:
    """The configuration's types, read from their source: nothing is imported."""

    def __init__(self) -> None:
        self.classes: dict[str, Kind] = {}
        for path in sorted((ROOT / "common" / "config").glob("schema*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    bases = tuple(ast.unparse(base) for base in node.bases)
                    fields = tuple(_field(each) for each in node.body if isinstance(each, ast.AnnAssign))
                    self.classes[node.name] = Kind(bases, ast.get_docstring(node) or "", fields)

    @property
    def types(self) -> dict[str, str]:
        """The type of every key of a run; a class also where the key may be null."""
        types = {key: kind for key, kind, _ in self.classes["Config"].fields}
        bare = {key: kind.removesuffix(" | None") for key, kind in types.items()}
        return {key: bare[key] if bare[key] in self.classes else kind for key, kind in types.items()}

    def of_group(self, group: str) -> str | None:
        """The class of a group; None for those whose keys are free."""
        kind = self.types.get(group)
        return kind if kind in self.classes else None

    def describe(self, prefix: str, name: str) -> Iterator[str]:
        """What a class says and its fields, those that it inherits included; then the classes of its fields, and those
        that build on it and are no other group's.
        """
        lineage = [self.classes[base] for base in self.classes[name].bases if base in self.classes]
        yield from self._described(prefix, [*lineage, self.classes[name]])
        for key, kind, _ in self.classes[name].fields:
            if kind in self.classes:
                yield from self.describe(f"{prefix}.{key}", kind)
        taken = {*self.types.values()}
        for child, more in self.classes.items():
            if name in more.bases and child not in taken:
                yield from self._described(prefix, [more])

    def _described(self, prefix: str, kinds: Sequence[Kind]) -> Iterator[str]:
        said: dict[str, str] = {}
        for kind in kinds:
            general, of_fields = _told(kind.said, [key for key, *_ in kind.fields])
            said |= of_fields
            if general:
                yield f"<p>{_text(general)}</p>\n"
        fields = [field for kind in kinds for field in kind.fields if field[1] not in self.classes]
        rows = [(f"{prefix}.{key}", of, default, said.get(key, "")) for key, of, default in fields]
        yield _table(("key", "type", "default", ""), rows)


def _field(node: ast.AnnAssign) -> tuple[str, str, str]:
    default = "" if node.value is None else ast.unparse(node.value)
    if made := re.fullmatch(r"field\(default_factory=(?:lambda: )?(.*)\)", default):
        default = {"dict": "{}", "list": "[]"}.get(made[1], made[1])
    elif isinstance(node.value, ast.Constant):
        default = yaml.safe_dump(node.value.value, width=1000).removesuffix("...\n").strip()
    return ast.unparse(node.target), ast.unparse(node.annotation), "" if default == "MISSING" else default


def _told(docstring: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What a docstring says of the class, and of each field: `one, other: what they are.`"""
    text, some = " ".join(docstring.split()), "|".join(names)
    parts = re.split(rf"(?:^|(?<=[.;)] ))((?:{some})(?:, (?:{some}))*): ", text)
    said = {
        name: what.strip(" .;")
        for keys, what in zip(parts[1::2], parts[2::2], strict=True)
        for name in keys.split(", ")
    }
    return parts[0].strip(), said


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The last column holds sentences where it has no title, the others code."""
    lines = ["<table>", f"<thead><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr></thead>", "<tbody>"]
    for row in rows:
        cells = [
            _text(cell) if not title else f"<code>{escape(' '.join(cell.split()))}</code>" if cell else ""
            for title, cell in zip(titles, row, strict=True)
        ]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>", ""])


def _text(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", title.lower())
