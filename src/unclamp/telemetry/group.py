"""What a user may call the kind of a step's batch."""

from enum import Enum

from unclamp.errors import RunLogError

Name = str | int | Enum | None
LONGEST = 80
"""Characters; a name stands in legends, tables and sentences."""


def group_name(group: object) -> str | None:
    """Return what the kind of a batch is called: a line of text that is not blank; None of None.

    An int, a bool and a member of an enum are called what str() makes of them, as in files; a
    member that is a str is called by its text.

    Raises:
        RunLogError: It is something else.

    Example:
        >>> group_name(3)
        '3'
    """
    if group is None:
        return None
    if isinstance(group, int | Enum) and not isinstance(group, str):
        group = str(group)
    if not isinstance(group, str):
        raise RunLogError(
            f"expected group to be the name of the batch's kind, a str, an int, a member of an "
            f"enum or None, got {group!r} "
            f"({type(group).__name__}); nothing is recorded"
        )
    if not group.strip() or not group.isprintable() or len(group) > LONGEST:
        raise RunLogError(
            f"expected group to be a name of 1 to {LONGEST} printable characters, not all blank, "
            f"got {group[: 2 * LONGEST]!r}; nothing is recorded"
        )
    return str.__str__(group)  # of a class of its own the text alone
