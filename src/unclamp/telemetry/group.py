"""What a user may call the kind of a step's batch."""

from unclamp.errors import RunLogError

LONGEST = 80
"""Characters; a name stands in legends, tables and sentences."""


def check_group(group: object) -> None:
    """Check that `group` is None or a name: a line of text that is not blank.

    Raises:
        RunLogError: It is something else.
    """
    if group is None:
        return
    if not isinstance(group, str):
        raise RunLogError(
            f"expected group to be the name of the batch's kind, a str or None, got {group!r} "
            f"({type(group).__name__}); nothing is recorded"
        )
    if not group.strip() or not group.isprintable() or len(group) > LONGEST:
        raise RunLogError(
            f"expected group to be a name of 1 to {LONGEST} printable characters, not all blank, "
            f"got {group[: 2 * LONGEST]!r}; nothing is recorded"
        )
