"""The documentation site: that it has everything, and that its build fails where it should.

`make docs` builds it and checks each link; here is what can be said without building it.
"""

import re
from pathlib import Path

import griffe
import pytest
import yaml
from manual import api, check, commands, docstrings, lists, outside
from markdown import markdown
from markdown_it import MarkdownIt

import unclamp

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in outside.PAGES)]
SITE = ["sane_lists", "tables", "pymdownx.superfences"]
BLOCKS = ("ul", "ol", "li", "table", "tr", "blockquote", "pre", "h1", "h2", "h3", "h4", "img")


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without making the objects that it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: tag)


def _menu() -> list[str]:
    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        assert isinstance(inner, (list, type({}.values())))
        return [leaf for value in inner for leaf in leaves(value)]

    return leaves(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"])


def test_each_page_is_in_the_menu_once():
    written = [path.name for path in (ROOT / "docs").glob("*.md")]
    made = [f"reference/{name}.md" for name, _ in api.pages()] + [commands.URI]
    outer = [outside.PREFIX + name for name in outside.PAGES]
    assert sorted(_menu()) == sorted([*written, *made, *outer])


def test_each_public_name_is_in_the_reference():
    text = "".join(text for name, text in api.pages() if name in api.TOPICS)
    for name in unclamp.__all__:
        if name != "__version__":
            shown = rf"^::: unclamp\.{name}$|^\[\]\(\){{#unclamp\.{name}}}$"
            assert len(re.findall(shown, text, re.MULTILINE)) == 1, name


def test_a_page_of_the_reference_shows_names_and_not_the_modules_called_like_them():
    """griffe takes `unclamp.nn.convert` for the module, which the package's function hides."""
    package = griffe.load("unclamp", search_paths=[ROOT / "src"])
    modules = {*api.MODULES, *(f"unclamp.{name}" for name in api.PACKAGES)}
    shown = {path for _, text in api.pages() for path in re.findall(r"^::: (.+)$", text, re.M)}
    assert shown > modules
    for path in shown - modules:
        assert not package[path.removeprefix("unclamp.")].is_module, path


def test_the_reference_of_the_command_line_has_each_command_and_option():
    text = commands.page()
    assert "## `unclamp advise`" in text
    assert "### `unclamp import nvdlfw`" in text
    assert "--tokens-per-step" in text
    for link in re.findall(r"\]\(#unclamp-(\w+)\)", text):
        assert f"## `unclamp {link}`" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_blocks_that_a_viewer_of_the_repository_shows(page):
    """markdown-it follows CommonMark, as such viewers do; the site is rendered by another."""
    text = page.read_text(encoding="utf-8")
    viewed = MarkdownIt("commonmark").enable("table").render(text)
    site = markdown(lists.with_room(text), extensions=SITE)
    site = site.replace("<code", "\n<code")
    assert {tag: len(re.findall(rf"<{tag}[ >]", site)) for tag in BLOCKS} == {
        tag: len(re.findall(rf"<{tag}[ >]", viewed)) for tag in BLOCKS
    }


@pytest.mark.parametrize(
    ("link", "here", "expected"),
    [
        ("scaling.md", "explain.md", "scaling.md"),
        ("../lab/LOG.md", "scaling.md", "project/lab/LOG.md"),
        ("../README.md", "scaling.md", "index.md"),
        ("docs/gpu.md", "project/ARCHITECTURE.md", "../gpu.md"),
        ("../docs/gpu.md", "project/lab/LOG.md", "../../gpu.md"),
        ("CHANGELOG.md", "project/CONTRIBUTING.md", "CHANGELOG.md"),
        ("../bench/cast.py", "scaling.md", "../bench/cast.py"),  # the build will complain
    ],
)
def test_links_that_are_right_in_the_repository_are_right_on_the_site(link, here, expected):
    assert outside.site_link(link, here) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("In [2**-126, 2**126], F(x)**n.", "<p>In [2**-126, 2**126], F(x)**n.</p>"),
        ("**Keys** are in `2**3`.", "<p><strong>Keys</strong> are in <code>2**3</code>.</p>"),
        ("In explain-<onset>.json.", "<p>In explain-&lt;onset&gt;.json.</p>"),
        ("**recording: more", "<p>**recording: more</p>"),
    ],
)
def test_signs_of_a_docstring_stay_signs(text, shown):
    assert markdown(docstrings.as_markdown(text)) == shown


def test_an_example_of_a_docstring_stays_as_it_is():
    text = "Do.\n\nExample:\n    >>> f(2**3)\n    <x**2>\n\nThen <x>."
    assert docstrings.as_markdown(text) == text.replace("Example:", "Examples:").replace(
        "Then <", "Then &lt;"
    )


def test_the_check_finds_what_leads_nowhere_or_is_fetched(tmp_path):
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (tmp_path / "beside.py").touch()
    (site / "a.html").write_text(
        '<h1 id="one"><a href="#one">.</a></h1><a href="sub/b.html#two">.</a>'
        '<a href="https://example.org/x">.</a><a href="c.html">.</a><img src="gone.png">'
        '<a href="../beside.py">.</a>',
        encoding="utf-8",
    )
    (site / "sub" / "b.html").write_text(
        '<p id="2"></p><a href="../a.html#one">.</a><a href="../a.html#two">.</a>'
        '<script src="https://example.org/x.js"></script>',
        encoding="utf-8",
    )
    assert check.find_faults(site) == [
        "a.html points at ../beside.py",
        "a.html points at c.html",
        "a.html points at gone.png",
        "a.html points at sub/b.html#two",
        "sub/b.html loads https://example.org/x.js",
        "sub/b.html points at ../a.html#two",
    ]
