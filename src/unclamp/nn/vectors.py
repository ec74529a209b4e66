"""What ranks send to each other at a meeting: which rows, in which order, and a digest of the rest.

`nn.shared` says when they meet, and what the header of a vector means.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from unclamp.nn.clock import Ticking
from unclamp.nn.groups import Groups
from unclamp.nn.layout import Layout
from unclamp.nn.products import products_of
from unclamp.nn.ring import Ring
from unclamp.nn.turns import Turn

DIGEST_PARTS = 2
DIGEST_BITS = 24
"""Whole numbers up to 2**24 are exact in float32."""
PENDING, LOADED, FAILED, DIGEST = 0, 1, 2, 3
HEADER = DIGEST + 2 * DIGEST_PARTS


class Meeting(Ticking, Protocol):
    """What meets: a ledger."""

    layout: Layout
    ring: Ring
    scale: Tensor
    observes: bool

    @property
    def updates(self) -> int:
        """Updates so far."""
        ...

    @property
    def is_warming(self) -> bool:
        """Whether casts are only counted."""
        ...


@dataclass
class Part:
    """The rows of a ledger that the same ranks hold.

    Attributes:
        groups: Whose maxima, one after the other, are those of all these ranks.
        sites: The numbers of its sites.
        products: The numbers of the products that these sites are of.
        rows: The numbers of its rows; None where that is all of them.
        length: How many numbers ranks exchange: one a row, and one a product.
        text: A digest of sites and scalings in words, the same on ranks that are alike.
    """

    groups: Groups
    sites: list[int]
    products: list[int]
    rows: Tensor | None
    length: int
    text: str


@dataclass
class Pact:
    """What ranks have agreed on so far.

    Attributes:
        length: That of a vector; None before they have met.
        header: That of the last meeting, on its way to the host; None where it was read.
        sent: The part's text in that meeting.
        arrived: When the header is there: a CUDA event.
    """

    length: int | None = None
    header: Tensor | None = None
    sent: str = ""
    arrived: Any = None


def size_and_ranks(groups: Groups) -> tuple[int, list[list[int]]]:
    """Return what groups are ordered by, the same on all of their ranks."""
    ranks = [dist.get_process_group_ranks(group) for group in groups]
    return math.prod(map(len, ranks)), ranks


def turns_of(part: Part, turn: Turn, like: Tensor) -> Tensor:
    """Return 1 for each product of a part that has its turn on this rank, and 0 for the others."""
    if turn is None or turn.issuperset(part.products):
        return like.new_ones(len(part.products))
    return like.new_tensor([float(product in turn) for product in part.products])


def with_rows(agreed: Tensor, part: Part, amaxes: Tensor) -> Tensor:
    """Return all rows with those of a part replaced; may write into what it is given."""
    if part.rows is None:
        return amaxes
    agreed[part.rows] = amaxes
    return agreed


def described(ledger: Meeting, sites: Sequence[int]) -> dict[str, str]:
    """Return each site by its name in the model as it is now, and how it is scaled.

    Not by the name that the ledger has: a recorder, maybe of one rank, may have it renamed.
    """
    names = {}
    model = ledger.clock.model
    for fqn, own, _ in () if model is None else products_of(model):
        if own.ledger is ledger:
            names |= {index: f"{fqn} {role}".strip() for role, index in own.indices.items()}
    texts = {}
    for index in sites:
        site = ledger.sites[index]
        grids = f" in {site.grids} blocks" if site.grids else ""
        scaling = f"{_worded(site.operand.scaling)} {site.operand.format.name}{grids}"
        texts[names.get(index, f"site {index}")] = scaling
    return texts


def _worded(scaling: Any) -> str:
    """Return a scaling in words that do not depend on where its function lies in memory."""
    reduce = getattr(scaling, "reduce", None)
    if not callable(reduce):
        return repr(scaling)
    name = getattr(reduce, "__qualname__", type(reduce).__qualname__)
    return repr(scaling).replace(repr(reduce), name)


def contents_of(ledger: Meeting, part: Part) -> bytes:
    """Return histories and scales of a part; waits for the device."""
    rows = ledger.layout.numbers_of(part.sites)
    history = ledger.ring.newest(rows, ledger.layout.longest)
    kept = torch.cat([history.flatten(), ledger.scale[rows]])
    return kept.cpu().numpy().tobytes()


def hash_of(text: str) -> str:
    """Return a digest of a text, in words."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_of(told: bytes) -> list[int]:
    """Return a digest in whole numbers that float32 holds exactly."""
    size = DIGEST_BITS // 8
    raw = hashlib.blake2b(told, digest_size=size * DIGEST_PARTS).digest()
    whole = partial(int.from_bytes, byteorder="little")
    return [whole(raw[i * size : (i + 1) * size]) for i in range(DIGEST_PARTS)]


def on_its_way(header: Tensor) -> tuple[Tensor, Any]:
    """Return a copy on the host, and when it is there; nobody waits for it."""
    if header.device.type != "cuda":
        return header.to("cpu", copy=True), None
    copied = torch.empty(header.shape, dtype=header.dtype, pin_memory=True)
    copied.copy_(header, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copied, arrived
