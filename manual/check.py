"""Holds the built site to what it promises: each link leads somewhere, and nothing is fetched.

MkDocs checks the links of the pages' Markdown. This checks all of the HTML, and with it what
comes from docstrings and from the theme.
"""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import BuildError

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser loads by itself, and the attribute that says from where."""


@dataclass(kw_only=True)
class Html(HTMLParser):
    """What one page points at, loads, and can be pointed at."""

    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element's id and where it points."""
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and (link := values.get("href")):
            self.links.add(link)
        if tag in LOADED and (link := values.get(LOADED[tag])):
            self.loads.add(link)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a link leads nowhere or a page loads something from elsewhere."""
    if faults := find_faults(Path(config.site_dir)):
        raise BuildError("\n".join(["the site has links that lead nowhere:", *faults]))


def find_faults(site: Path) -> list[str]:
    """A sentence for each link of the site's pages that is wrong."""
    pages = {path.resolve(): _read(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site.resolve())
        found += [f"{here} loads {link}" for link in sorted(page.loads) if urlsplit(link).netloc]
        found += [
            f"{here} points at {link}"
            for link in sorted(page.links | page.loads)
            if not _leads_somewhere(link, path, pages)
        ]
    return found


def _read(path: Path) -> Html:
    page = Html()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _leads_somewhere(link: str, path: Path, pages: dict[Path, Html]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or path.name == "404.html":
        return True  # another site; and the page for a server, whose links begin at its root
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in pages or anchor in pages[target].anchors
