"""Groups of sites that get one scaling: the same operand of the same kind of layer.

A kind of layer is its last name, such as `down_proj`; numbers in names ("0", "experts.3") are
layers of one kind. What hits one layer of a kind is taken for what may hit the others: guarding all
of them costs little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.names import Role
from unclamp.runlog.sites import SiteInfo


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sites that are decided together.

    Attributes:
        match: The glob of a rule that matches their products, and those of no other group of this
            role; "*" for all.
        role: Their operand.
        sites: Which of the log's sites, numbers.
    """

    match: str
    role: Role
    sites: np.ndarray


def kind_of(fqn: str) -> str:
    """Return the glob of a layer's kind: its name behind the last number.

    Example:
        >>> kind_of("model.layers.3.mlp.down_proj"), kind_of("lm_head"), kind_of("0")
        ('*.mlp.down_proj', '^lm_head', '^0')
    """
    parts = fqn.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    if last < 0 or last == len(parts) - 1:
        return f"^{fqn}" if last < 0 or last == 0 else f"^{'.'.join(parts[:-1])}.*"
    return f"*.{'.'.join(parts[last + 1 :])}"


def groups_of(sites: Sequence[SiteInfo]) -> list[Group]:
    """Return the groups of sites, in the order of their first."""
    found: dict[tuple[str, Role], list[int]] = {}
    for number, site in enumerate(sites):
        found.setdefault((kind_of(site.fqn), site.name.role), []).append(number)
    return [
        Group(match=match, role=role, sites=np.array(numbers))
        for (match, role), numbers in found.items()
    ]
