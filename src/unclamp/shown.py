"""How a report looks in a REPL and in a notebook: the text that `print` shows."""

import html


class Shown:
    """A base of values that say in `__str__` what they are."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows; names of modules are the user's and may hold markup."""
        return f"<pre>{html.escape(str(self))}</pre>"
