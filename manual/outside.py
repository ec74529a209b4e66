"""Puts files that lie outside of docs/ into the site, and points the pages' links at them.

Links are written for a viewer of the repository: `../lab/LOG.md` in docs/, `docs/gpu.md` in
ARCHITECTURE.md. On the site, what is not in docs/ lies under `project/`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PREFIX = "project/"
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "lab/LOG.md")
FILES = ("examples/first_look.ipynb", "examples/train_fsdp2.py", "LICENSE")
UNSEARCHED = {"project/CHANGELOG.md", "project/lab/LOG.md"}
"""Pages in which a search for a word would mostly find its history."""
_NAMED = re.compile(r"\[[\w/]+\.md\]\(([^)#\s:]+)(#[^)]*)?\)")
"""A link whose text is the file's name."""
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files under `project/`."""
    for name in (*PAGES, *FILES):
        files.append(File.generated(config, PREFIX + name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that leave docs/ or come from outside of it, and call pages by their titles."""
    here = page.file.src_uri
    if here in UNSEARCHED:
        page.meta["search"] = {"exclude": True}

    def titled(link: re.Match[str]) -> str:
        uri = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        target = files.get_file_from_path(uri)
        if target is None or target.page is None:
            return link[0]
        return f"[“{target.page.title}”]({link[1]}{link[2] or ''})"

    linked = _LINK.sub(lambda link: site_link(link[1], here), markdown)
    return _NAMED.sub(titled, linked)


def site_link(link: str, here: str) -> str:
    """The link on the site; unchanged where it points at nothing that the site has."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(here)), link))
    if target == "README.md":
        uri = "index.md"
    elif target in PAGES or target in FILES:
        uri = PREFIX + target
    elif target.startswith("docs/"):
        uri = target.removeprefix("docs/")
    else:
        return link
    return posixpath.relpath(uri, posixpath.dirname(here) or ".")


def _in_repository(uri: str) -> str:
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"
