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
MODULES = [module for topic in TOPICS.values() for module in topic.modules]
PACKAGES = ("analysis", "doctor", "nn", "numerics", "runlog", "telemetry", "traps")
_MENTION = re.compile(r"(?<![\w/>\"])docs/(\w+)\.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, text in pages():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a search find the guides first."""
    if page.file.src_uri.startswith("reference/"):
        page.meta["search"] = {"boost": 0.2}
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the pages that docstrings name."""
    if not page.file.src_uri.startswith("reference/"):
        return html

    def link(mention: re.Match[str]) -> str:
        target = files.get_file_from_path(f"{mention[1]}.md")
        if target is None or target.page is None:
            raise ValueError(f"{page.file.src_uri} names {mention[0]}, which is no page")
        return f'<a href="../{mention[1]}.html">{target.page.title}</a>'

    return _MENTION.sub(link, html)


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
    parts += [_name("unclamp", name) for name in names]
    parts += [_module(module) for module in topic.modules]
    return "\n".join(parts)


def _module(module: str) -> str:
    """The directive for a module: what it exports, without the hooks that its trainer calls."""
    top = public_names()
    path = _file(module).relative_to(SOURCE).as_posix()
    members = [name for name in _exported(path) if name not in top]
    return f"""::: {module}
    options:
      show_root_full_path: true
      show_object_full_path: true
      filters: ["!^_", "!^on_"]
      members: {members}
"""


def _package(package: str) -> str:
    top = public_names()
    members = [name for name in _exported(f"{package}/__init__.py") if name not in top]
    head = f"::: unclamp.{package}\n    options:\n      heading_level: 1\n      members: false\n"
    return "\n".join([head, *(_name(f"unclamp.{package}", name) for name in members)])


def _name(package: str, name: str) -> str:
    """The directive for one name.

    Where a module on the way has the name of what it defines (`unclamp.nn.convert.convert`),
    griffe takes the name for the module: then the whole path is given, and the short one is an
    anchor.
    """
    path = list(_imports_of(package, name))
    if any(_is_module(module, name) for module in path):
        return f"[](){{#{package}.{name}}}\n\n::: {path[-1]}.{name}\n"
    return f"::: {package}.{name}\n"


def _imports_of(module: str, name: str) -> Iterator[str]:
    """The modules that a name is imported through; the last one defines it."""
    yield module
    for node in ast.walk(ast.parse(_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            assert node.module
            yield from _imports_of(node.module, name)
            return


def _is_module(package: str, name: str) -> bool:
    folder = SOURCE.parent.joinpath(*package.split("."))
    return (folder / name).is_dir() or (folder / f"{name}.py").exists()


def _file(module: str) -> Path:
    path = SOURCE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
