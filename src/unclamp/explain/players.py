"""Who can have caused a spike: sites, or groups of them, that are clamped or not together."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from unclamp.analysis.counterfactual import ANY, GroupRole
from unclamp.names import SiteName

Group = Literal["site", "layer", "role", "projection"]
GROUPS: tuple[Group, ...] = ("site", "layer", "role", "projection")


@dataclass(frozen=True, kw_only=True)
class Player:
    """Sites that are un-clamped together.

    Attributes:
        fqn: The site's layer; for a group a glob, as in a recipe's rules.
        role: The site's role; "*" for a group of several.
        sites: The sites.
    """

    fqn: str
    role: GroupRole
    sites: frozenset[SiteName]

    @property
    def name(self) -> str:
        """The player's name for people."""
        return self.fqn if self.role == ANY else str(SiteName(self.fqn, self.role))

    @property
    def is_group(self) -> bool:
        """Whether it goes by a name that is not that of a site."""
        return self.role == ANY or self.sites != {SiteName(self.fqn, self.role)}


def group_sites(sites: Iterable[SiteName], by: Group) -> list[Player]:
    """Return the sites as players, in order: one each, or one for each group's sites."""
    grouped: dict[tuple[str, GroupRole], set[SiteName]] = {}
    for site in sites:
        grouped.setdefault(_key(site, by), set()).add(site)
    return [Player(fqn=f, role=r, sites=frozenset(s)) for (f, r), s in grouped.items()]


def _key(site: SiteName, by: Group) -> tuple[str, GroupRole]:
    if by == "site":
        return site.fqn, site.role
    if by == "role":
        return ANY, site.role
    parts = site.fqn.split(".")
    if by == "projection":
        return f"{ANY}.{parts[-1]}" if len(parts) > 1 else site.fqn, ANY
    # A layer is what the first number in the name counts: model.layers.3.mlp.up_proj.
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    whole = ".".join(parts[: first + 1])
    return (whole if whole == site.fqn else f"{whole}.{ANY}"), ANY


def joined(players: Iterable[Player]) -> frozenset[SiteName]:
    """Return the sites of all these players."""
    return frozenset().union(*(player.sites for player in players))
