"""Writes the reference of configs from the files below conf/: every group, option and knob, its default and comment.

MkDocs calls it while it builds, so that no page of it is kept and none goes stale. The README becomes a page, too: it
holds the figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
SECTION = "Configs"
WHOLE = ("strategy", "experiment", "space", "debug")
"""Groups whose files are compositions: they are shown as they are."""
FLAGS = re.compile(r"^# @package .*\n")


class Knob(NamedTuple):
    key: str
    default: str
    comment: str


def on_config(config: Any) -> Any:
    """Puts a page for each group into the navigation."""
    pages: list[Any] = [{"Overview": "reference/index.md"}]
    pages += [{group: f"reference/{page_name(group)}.md"} for group in groups()]
    for entry in config.nav:
        if SECTION in entry:
            entry[SECTION] = pages
    config.watch = [*config.watch, str(CONF), str(ROOT / "README.md")]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    pages = {"reference/index.md": overview(), "figures.md": figures()}
    pages |= {f"reference/{page_name(group)}.md": page(group) for group in groups()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def groups() -> list[str]:
    """Every folder with options, as overrides name it."""
    return sorted({file.parent.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml") if file.parent != CONF})


def page_name(group: str) -> str:
    return group.replace("/", "-")


def figures() -> str:
    """The README under another title."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.replace("# hasten\n", "# README, with all figures\n", 1)


def overview() -> str:
    """All groups with their options, and the keys that belong to no group."""
    lines = ["# Configs", "", "Every knob is spelt in a file below `conf/`; these pages are written from them.", ""]
    lines += ["| group | options |", "|---|---|"]
    for group in groups():
        options = ", ".join(f"[`{file.stem}`]({page_name(group)}.md#{file.stem})" for file in files_of(group))
        lines.append(f"| [{group}]({page_name(group)}.md) | {options} |")
    lines += [
        "",
        "## Keys of no group",
        "",
        "They are set in `conf/config.yaml`, which also says the default of each group.",
        "",
    ]
    root = [knob for knob in knobs(CONF / "config.yaml", "") if not knob.key.startswith(("hydra.", "defaults"))]
    return "\n".join([*lines, *table(root), "", "## Defaults", "", *fenced(CONF / "config.yaml", part="defaults")])


def page(group: str) -> str:
    """One group: its options, each with its knobs."""
    lines = [f"# {group}", "", "| option | |", "|---|---|"]
    lines += [f"| [`{file.stem}`](#{file.stem}) | {cell(purpose(file))} |" for file in files_of(group)]
    for file in files_of(group):
        lines += ["", f"## {file.stem} {{ #{file.stem} }}", "", purpose(file), ""]
        flag = "-m " if group.startswith(("hparams_search", "hydra/")) else ""
        if group not in ("pipeline", "strategy"):
            lines += ["```bash", f"hasten {flag}{group}={file.stem}", "```", ""]
        lines += fenced(file) if group in WHOLE else option(file, group)
    return "\n".join(lines) + "\n"


def option(file: Path, group: str) -> list[str]:
    prefix = "" if FLAGS.match(file.read_text(encoding="utf-8")) else group.replace("/", ".")
    found = list(knobs(file, prefix))
    target = next((knob.default for knob in found if knob.key == f"{prefix}._target_"), None)
    lines = [f"Class: `{target}`", ""] if target else []
    others = [knob for knob in found if not knob.key.endswith("._target_") or knob.comment]
    return lines + (table(others) if others else ["It has no knobs."])


def files_of(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def purpose(file: Path) -> str:
    """The comment that a file begins with."""
    text = FLAGS.sub("", file.read_text(encoding="utf-8"))
    return text.partition("\n")[0].removeprefix("#").strip() if text.startswith("#") else ""


def table(found: list[Knob]) -> list[str]:
    lines = ["| knob | default | |", "|---|---|---|"]
    return lines + [f"| `{knob.key}` | {code(knob.default)} | {cell(knob.comment)} |" for knob in found]


def code(text: str) -> str:
    return "" if text == "" else f"`{text.replace('|', chr(92) + '|')}`"


def cell(text: str) -> str:
    pieces = text.replace("|", "\\|").split("`")
    pieces[::2] = [re.sub(r"([*_<])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def fenced(file: Path, part: str | None = None) -> list[str]:
    text = FLAGS.sub("", file.read_text(encoding="utf-8")).rstrip()
    if part is not None:
        begin = text.index(f"{part}:")
        text = re.split(r"\n(?=\S)", text[begin:], maxsplit=1)[0]
    return ["```yaml", text, "```"]


def knobs(file: Path, prefix: str) -> Iterator[Knob]:
    """Every leaf of a file with its default as it is written, and the comments beside or above it."""
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if root is not None:
        yield from _leaves(root, prefix, text.splitlines())


def _leaves(node: Any, prefix: str, lines: list[str]) -> Iterator[Knob]:
    for key, value in node.value:
        name = f"{prefix}.{key.value}" if prefix else key.value
        if key.value == "defaults":
            continue
        comment = _comment(lines, key, value)
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            if comment:
                yield Knob(name, "", comment)
            yield from _leaves(value, name, lines)
        else:
            yield Knob(name, _written(value, lines), comment)


def _written(value: Any, lines: list[str]) -> str:
    """A value as the file has it, or on one line."""
    start, end = value.start_mark, value.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column].strip()
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000, sort_keys=False).strip()


def _plain(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value) for key, value in node.value}
    return [_plain(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def _comment(lines: list[str], key: Any, value: Any) -> str:
    """Beside the key or its value, or else on lines of their own above it."""
    line, one_line = key.start_mark.line, value.start_mark.line == value.end_mark.line == key.start_mark.line
    after = value.end_mark.column if one_line else key.end_mark.column
    if found := re.search(r"(?:^|\s)#\s?(.*)$", lines[line][after:]):
        return found[1].strip()
    above: list[str] = []
    while line > 1 and lines[line - 1].strip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].strip().removeprefix("#").strip())
    return " ".join(above)
