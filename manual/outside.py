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
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files under `project/`."""
    for name in (*PAGES, *FILES):
        files.append(File.generated(config, PREFIX + name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links that leave docs/ or come from outside of it."""
    here = page.file.src_uri
    if here in UNSEARCHED:
        page.meta["search"] = {"exclude": True}
    return _LINK.sub(lambda link: site_link(link[1], here), markdown)


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
