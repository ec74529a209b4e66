"""What other packages say when they are imported, which is none of a user's business here.

transformers imports torchao wherever it is installed, for its quantisers. torchao then logs each
of its libraries that this machine cannot load, and torch that it is used in an old way: four lines
on stderr before the first of ours.
"""

import logging

SAID = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass",),
}
"""How messages begin that are left out, by the name of their logger."""


def quiet_imports() -> None:
    """Leave out what torchao logs when it is imported, and nothing else, in this process."""
    for name, starts in SAID.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(starts))


class _Without(logging.Filter):
    """Lets pass whatever does not begin in one of some ways."""

    def __init__(self, starts: tuple[str, ...]) -> None:
        super().__init__()
        self._starts = starts

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        return not str(record.msg).startswith(self._starts)
