"""Kinds of batches: a series is cut into those of each kind, since only a kind is comparable.

A group is the name that the user gave to the kind of a step's batch; batches without one are a
kind too. What is judged within a kind is for `spikes`, `divergences` and `response`.
"""

from collections.abc import Iterable, Sequence

Group = str | None
MOST_KINDS = 4
"""Kinds that a text tells of, those with the most batches; tables and JSON have all."""
JOINT = "+"
"""Between the names that the ranks of one step give."""


def split_places(groups: Sequence[Group]) -> dict[Group, list[int]]:
    """Return the places of each kind, in the order in which the kinds appear.

    Example:
        >>> split_places(["a", None, "a"])
        {'a': [0, 2], None: [1]}
    """
    places: dict[Group, list[int]] = {}
    for i, group in enumerate(groups):
        places.setdefault(group, []).append(i)
    return places


def largest_kinds(groups: Sequence[Group]) -> dict[Group, list[int]]:
    """Return the places of each kind, most batches first.

    Example:
        >>> largest_kinds(["a", None, None])
        {None: [1, 2], 'a': [0]}
    """
    return dict(sorted(split_places(groups).items(), key=lambda pair: -len(pair[1])))


def has_kinds(groups: Sequence[Group]) -> bool:
    """Return whether any batch has a group; without, all are of one kind."""
    return any(group is not None for group in groups)


def joined(groups: Iterable[Group]) -> Group:
    """Return the kind of a step of several ranks: their names in order, each once.

    Example:
        >>> joined(["text", None, "answers", "text"])
        'answers+text'
    """
    names = sorted({group for group in groups if group is not None})
    return JOINT.join(names) if names else None


def kind_in_words(group: Group) -> str:
    """Return what the batches of a kind are called in a sentence."""
    return "batches without a group" if group is None else f"batches of kind {group!r}"
