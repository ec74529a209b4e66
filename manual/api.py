"""Writes the pages of the reference of names, which mkdocstrings fills from the docstrings.

The names of `unclamp` are sorted by the room they come from (`TOPICS`), those of its packages
stand on a page a package. A new name needs no line here, a new room does: the build says so.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SOURCE = Path(__file__).parent.parent / "src" / "unclamp"


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A page of names of `unclamp`, and of the modules that belong to it."""

    title: str
    about: str
    rooms: tuple[str, ...]
    modules: tuple[str, ...] = ()


TOPICS = {
    "models": Topic(
        title="Models",
        about="Put FP8 into a model, change it, look at it, and take it out again.",
        rooms=("nn", "parallel", "covered"),
    ),
    "recipes": Topic(
        title="Recipes and scalings",
        about="What each layer of a model gets.",
        rooms=("recipe", "scaling", "formats", "names"),
    ),
    "casts": Topic(title="Casts", about="FP8 arithmetic on single tensors.", rooms=("numerics",)),
    "recording": Topic(
        title="Recording",
        about="From a training into a log, and onto dashboards; and a log as data.",
        rooms=("telemetry", "runlog"),
    ),
    "spikes": Topic(
        title="Spikes and rules",
        about="What caused a spike, and rules that change a scaling during training.",
        rooms=("explain", "analysis", "autopilot"),
    ),
    "trainers": Topic(
        title="Trainers",
        about="unclamp inside of the trainers of others.",
        rooms=("integrations",),
        modules=(
            "unclamp.integrations.recorded",
            "unclamp.integrations.transformers",
            "unclamp.integrations.accelerate",
            "unclamp.integrations.lightning",
            "unclamp.integrations.torchtitan",
            "unclamp.integrations.transformer_engine",
            "unclamp.integrations.torchao",
            "unclamp.integrations.nvdlfw",
        ),
    ),
    "errors": Topic(
        title="Errors",
        about="All are `UnclampError`s. A message says what was expected, what came, and what "
        "to do.",
        rooms=("errors",),
    ),
}
PACKAGES = ("analysis", "doctor", "nn", "numerics", "runlog", "telemetry", "traps")
_MENTION = re.compile(r"(?<![\w/>\"])docs/(\w+)\.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, text in pages():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the pages that docstrings name."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    return _MENTION.sub(r'<a href="../\1.html">\1</a>', html)


def pages() -> Iterator[tuple[str, str]]:
    """Each page's name and its Markdown."""
    names = {topic: sorted(_names_of(topic), key=str.lower) for topic in TOPICS}
    yield "index", _overview(names)
    for key, topic in TOPICS.items():
        yield key, _page(topic, names[key])
    for package in PACKAGES:
        yield f"unclamp.{package}", _package(package)


def public_names() -> dict[str, str]:
    """Each public name of `unclamp` and the room that it comes from, read without importing."""
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    wanted = set(_exported("__init__.py"))
    found = {
        alias.name: node.module.split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unclamp.")
        for alias in node.names
        if alias.name in wanted
    }
    found.pop("__version__")
    known = {room for topic in TOPICS.values() for room in topic.rooms}
    if unknown := set(found.values()) - known:
        raise ValueError(f"no topic of manual/api.py has the rooms {sorted(unknown)}")
    return found


def _names_of(topic: str) -> list[str]:
    return [name for name, room in public_names().items() if room in TOPICS[topic].rooms]


def _exported(path: str) -> list[str]:
    """What a module's `__all__` says."""
    for node in ast.parse((SOURCE / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{path} has no __all__")


def _overview(names: dict[str, list[str]]) -> str:
    lines = [
        "# Reference",
        "",
        "[The command line](cli.md), with every option. And the names that a program uses, from "
        "their docstrings: `import unclamp` gives those of the first table, and those that need "
        "torch load it at first use.",
        "",
        "| page | names of `unclamp` |",
        "|---|---|",
    ]
    for key, topic in TOPICS.items():
        links = ", ".join(f"[`{name}`][unclamp.{name}]" for name in names[key])
        lines.append(f"| [{topic.title}]({key}.md) | {links} |")
    lines += [
        "",
        "What else its packages offer; what is public at the top is not repeated there.",
        "",
        "| package | what it answers |",
        "|---|---|",
    ]
    for package in PACKAGES:
        tree = ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))
        about = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
        lines.append(f"| [`unclamp.{package}`](unclamp.{package}.md) | {about} |")
    return "\n".join(lines) + "\n"


def _page(topic: Topic, names: list[str]) -> str:
    parts = [f"# {topic.title}", "", topic.about, ""]
    parts += [f"::: unclamp.{name}\n" for name in names]
    for module in topic.modules:
        parts.append(f"::: {module}\n    options:\n      show_root_full_path: true\n")
    return "\n".join(parts)


def _package(package: str) -> str:
    top = public_names()
    members = [name for name in _exported(f"{package}/__init__.py") if name not in top]
    return "\n".join(
        [
            f"::: unclamp.{package}",
            "    options:",
            "      heading_level: 1",
            "      show_root_full_path: true",
            "      members:",
            *(f"        - {name}" for name in members),
            "",
        ]
    )
