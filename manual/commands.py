"""Writes the reference of the command line, from the commands themselves."""

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from unclamp.cli import app

URI = "reference/cli.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, URI, content=page()))
    return files


def page() -> str:
    """The page in Markdown: what there is, then each command with its options."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="unclamp")
    commands = {name: root.get_command(context, name) for name in root.list_commands(context)}
    rows = [
        f"| [`unclamp {name}`](#unclamp-{name}) | {_first(command.help)} |"
        for name, command in commands.items()
    ]
    parts = [
        get_docs_for_click(
            obj=command,
            ctx=typer.Context(command, info_name=name, parent=context),
            indent=1,
            call_prefix="unclamp",
        )
        for name, command in commands.items()
    ]
    return "\n".join(
        [
            "# Command line",
            "",
            "Written from the commands themselves; `unclamp COMMAND --help` says the same. "
            "Results go to stdout, progress and notes to stderr. What you can mend ends with "
            "one line and exit code 2.",
            "",
            "| command | what it does |",
            "|---|---|",
            *rows,
            "",
            *parts,
        ]
    )


def _first(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split()).replace("|", "\\|")
