"""With whom a ledger's updates agree: one maximum a step over the ranks that hold its products.

A maximum has no order, so for equal tensors the histories of delayed, guarded and static scaling
are, bit for bit, those of one process that sees everything. What enters a history is the newest
amax of each row over all ranks, -1 where no rank measured any; a rank that saw nothing takes over
what the others saw. Whose optimizers own other layers than those of the next rank, have other
products on each at one step: after the amaxes a vector says which products have their turn, and one
that has it on some rank has it on all.

Ranks that come by apart would wait for each other for ever, and vectors of different length end
the process. So every step of an optimizer that holds the model's parameters meets, whether or not
anything is pending, and each vector begins with a header:

    [pending, loaded, failed, h, -h]      h: a digest of sites, scalings, updates: parts of 24 bits

The maximum of h and that of -h tell whether all have the same h. Only then does the length of a
vector change, and only then are amaxes used; where a state was loaded since the last meeting,
histories and scales are compared too. Ranks that differ get one error, each of them: those of
several groups meet in all of them first, in the largest one last, and tell there that they failed.

On a CPU the header is read at once. On a GPU nobody waits for it: it is looked at one step late,
every followed step counts as an update, and an update that waits for a new length is made with the
next step. In a CUDA graph only amaxes meet.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unclamp.errors import ConvertError
from unclamp.names import ROLES
from unclamp.nn import first
from unclamp.nn.alive import Alive
from unclamp.nn.apart import Description, difference, tell_alone
from unclamp.nn.groups import Finder, Groups, is_distributed, max_over, version
from unclamp.nn.holders import Product
from unclamp.nn.turns import FRESH, NOTHING, Turn
from unclamp.nn.vectors import (
    DIGEST,
    DIGEST_PARTS,
    FAILED,
    HEADER,
    LOADED,
    PENDING,
    Meeting,
    Pact,
    Part,
    contents_of,
    described,
    digest_of,
    hash_of,
    on_its_way,
    size_and_ranks,
    turns_of,
    with_rows,
)


@dataclass
class Shared:
    """The meetings of one ledger.

    Attributes:
        parts: The rows that are agreed on; none where the process is alone.
        is_loaded: Whether state was loaded since the last meeting.
        is_late: Whether headers are read one step late; None: as the device wants it.
        is_off: Whether each rank goes by its own amaxes, as a replay asks; the same on all ranks.
        first: The products whose casts may agree on a first scale, and with whom (`nn.first`).
        within_ddp: Those of them that a DDP is around.
        unseeded: Sites of such products that have no scale; None until the ranks have met.
        agreed: The amaxes that ranks have agreed on for such sites.
    """

    parts: list[Part] = field(default_factory=list)
    is_loaded: bool = False
    is_late: bool | None = None
    is_off: bool = False
    first: dict[int, Groups] = field(default_factory=dict)
    within_ddp: set[int] = field(default_factory=set)
    unseeded: set[int] | None = None
    agreed: dict[int, Tensor] = field(default_factory=dict)
    _joinable: Alive[nn.Module] = field(default_factory=Alive)
    _alone: list[int] = field(default_factory=list)
    _failure: ConvertError | None = None
    _fails_at_last: bool = False
    _pacts: dict[Groups, Pact] = field(default_factory=dict)
    _looked: Any = None
    _looked_at: Any = None
    _has_told: bool = False

    def __reduce__(self) -> tuple[type["Shared"], tuple[()]]:
        """Pickle and copy as new: whom a ledger meets is a matter of its own process."""
        return Shared, ()

    # ---- with whom -------------------------------------------------------------------------

    def look(self, ledger: Meeting) -> bool:
        """Look who holds the products, where that may have changed; return whether to meet.

        A model that is only observed stays as it is: each rank counts for itself.
        """
        self._looked_at = (ledger.turns.made, version())
        if ledger.observes or self.is_off or not is_distributed():
            self.parts, self._alone = [], []
            return False
        products = ledger.clock.products(ledger)
        # One that is reverted is nobody's, whether or not its ledger lives on some rank.
        there = [p for p in products if p.owner() is not None]
        kinds = [(p.number, type(p.weight())) for p in there]
        state = (version(), ledger.sites, ledger.layout, kinds)
        if self._looked is None or not _same(state, self._looked):
            self._looked = state
            self._find(ledger, there)
        return bool(self.parts)

    def _find(self, ledger: Meeting, products: Sequence[Product]) -> None:
        finder = Finder(ledger.clock.model)
        by_groups: dict[Groups, list[int]] = {}
        self.first, self.within_ddp = {}, set()
        self._joinable, self._alone = Alive(), []
        for product in products:
            module, number = product.owner(), product.number
            own = product.operands and product.operands()
            if module is None or own is None:
                continue
            found = finder.look(module)
            own.is_gathered = found.is_gathered
            if not found.is_known:
                self._alone.append(number)
            for wrapper in found.within_ddp:
                self._joinable.add(wrapper)
            fqn = ledger.sites[number * len(ROLES)].fqn
            is_routed = getattr(module, "may_be_missed", False) or first.is_routed(fqn)
            if found.groups and not (found.may_be_missed or is_routed):
                self.first[number] = found.groups
                if found.within_ddp:
                    self.within_ddp.add(number)
            for index in range(number * len(ROLES), (number + 1) * len(ROLES)):
                whole = ledger.sites[index].remembers.is_whole
                groups = found.groups if whole else found.of_blocks
                if groups:
                    by_groups.setdefault(groups, []).append(index)
        # Where ranks are in several groups all of them go through these in one order, and last
        # through the largest: there they can still tell the others that they failed.
        ordered = sorted(by_groups, key=size_and_ranks)
        self.parts = [self._part(ledger, groups, by_groups[groups]) for groups in ordered]
        self._pacts = {groups: self._pacts.get(groups, Pact()) for groups in ordered}

    def tell_alone(self, ledger: Meeting) -> None:
        """Warn once of products that nothing says who holds; the ledger is about to update.

        Not before: an average of weights or a frozen teacher has no updates to agree on.
        """
        if self._alone and not self._has_told:
            self._has_told = True
            names = [ledger.sites[number * len(ROLES)].fqn for number in self._alone]
            tell_alone(names, ledger.clock.model)

    def _refuse_join(self) -> None:
        """Raise, before anybody meets, where ranks are to run out of inputs one by one."""
        for wrapper in self._joinable:
            if getattr(getattr(wrapper, "_join_config", None), "enable", False):
                raise ConvertError(
                    "expected as many steps on every rank that shares scales, got "
                    "DistributedDataParallel.join(), under which some make fewer; give every rank "
                    "as many batches, or unclamp.convert(model, recipe, group=()), which leaves "
                    "each rank its own scales"
                )

    def _part(self, ledger: Meeting, groups: Groups, sites: list[int]) -> Part:
        rows, layout = ledger.layout.numbers_of(sites), ledger.layout
        products = list(dict.fromkeys(index // len(ROLES) for index in sites))
        return Part(
            groups=groups,
            sites=sites,
            products=products,
            rows=None if len(rows) == layout.rows else rows,
            length=len(rows) + len(products),
            text=hash_of("\n".join(f"{n}: {d}" for n, d in described(ledger, sites).items())),
        )

    # ---- before the first update -----------------------------------------------------------

    def first_groups(
        self, ledger: Meeting, number: int, *, commits: bool, training: bool
    ) -> Groups:
        """Return with whom the casts of a product's forward agree on a first scale.

        Looks who holds the products, once a step. At the first forward that trains the ranks
        meet: that they are alike is known before anything is shared.

        Args:
            ledger: Whose.
            number: The product's.
            commits: Whether what the casts see is to count.
            training: Whether the module is in training mode.
        """
        if self._looked_at != (ledger.turns.made, version()):
            self.look(ledger)
        if not self.first or self.unseeded == set() or ledger.is_warming:
            return ()
        groups = self.first.get(number, ())
        if not groups or not first.trains(commits=commits, training=training):
            return ()
        is_in_ddp = first.is_in_backward() or first.is_in_ddp()
        if number in self.within_ddp and not is_in_ddp:
            return ()
        if self.unseeded is None:
            self._begin(ledger)
        return groups

    def _begin(self, ledger: Meeting) -> None:
        self._refuse_join()
        for part in self.parts:
            with self._failing():
                self._compare_contents(ledger, part)
                self._pacts[part.groups].length = part.length
        self._raise_failure()
        self.is_loaded = False
        wants = ~ledger.layout.settings.takes_own & (ledger.scale == 0)
        empty = set(ledger.layout.site_of_row[wants].tolist())
        self.unseeded = {i for i in empty if ledger.sites[i].remembers.is_whole}

    def _has_updated(self, turn: Turn) -> None:
        left = () if turn is None else (self.unseeded or ())
        self.unseeded = {i for i in left if turn is not None and i // len(ROLES) not in turn}
        self.agreed = {index: amax for index, amax in self.agreed.items() if index in self.unseeded}

    # ---- meeting ---------------------------------------------------------------------------

    def agree(
        self, ledger: Meeting, newest: Tensor, pending: int, turn: Turn, *, captured: bool
    ) -> tuple[Tensor, int, Turn]:
        """Return the newest amaxes of all ranks, float32 `[rows]`, what is pending, and whose turn.

        Where this rank's turn is for some products only, it waits for the device to learn of the
        others.

        Args:
            ledger: Whose.
            newest: This rank's, of all products, -1 where nothing was measured.
            pending: What this rank has (`nn.turns`).
            turn: Which products the update is for, on this rank.
            captured: Whether this becomes part of a CUDA graph.

        Raises:
            ConvertError: The ranks differ in sites, scalings, updates or loaded state.
        """
        self._refuse_join()
        is_late = newest.device.type != "cpu" if self.is_late is None else self.is_late
        had_failed = self._failure is not None
        agreed, whose, is_whole = newest.clone(), turn, True
        found = [FRESH if is_late or captured else pending]
        for part in self.parts:
            own = newest if part.rows is None else newest[part.rows]
            own = torch.cat([own, turns_of(part, turn, own)])
            met = None
            if captured:
                met = max_over(part.groups, own)
            elif is_late:
                with self._failing():
                    met = self._meet_late(ledger, part, own)
            else:
                with self._failing():
                    met, there = self._meet(ledger, part, own, pending)
                    found.append(there)
            if met is None:
                is_whole = False
                continue
            amaxes, theirs = met.split([len(own) - len(part.products), len(part.products)])
            agreed = with_rows(agreed, part, amaxes)
            if whose is not None and not (captured or whose.issuperset(part.products)):
                flags = zip(part.products, theirs.tolist(), strict=True)
                whose |= {product for product, flag in flags if flag > 0}
        if not is_late or had_failed or self._fails_at_last:
            self._raise_failure()
        if not captured:
            self.is_loaded = False
        if not is_whole:
            return agreed, NOTHING, whose
        if max(found) != NOTHING:
            self._has_updated(whose)
        return agreed, max(found), whose

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Keep what is raised until this rank has met all that wait for it."""
        self._fails_at_last = False
        try:
            yield
        except ConvertError as error:
            self._failure = self._failure or error
            self._fails_at_last = True

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _meet(self, ledger: Meeting, part: Part, own: Tensor, pending: int) -> tuple[Tensor, int]:
        """Meet and read the header at once."""
        pact = self._pacts[part.groups]
        fits = pact.length == part.length
        vector = self._reduced(ledger, part, own if fits else None, pending)
        self._check(ledger, part, vector)
        if pact.length is None or vector[LOADED] > 0:
            self._compare_contents(ledger, part)
        found = int(vector[PENDING])
        if not fits:
            pact.length = part.length
            vector = self._reduced(ledger, part, own, pending)
        return vector[HEADER:], found

    def _meet_late(self, ledger: Meeting, part: Part, own: Tensor) -> Tensor | None:
        """Meet, and read the header of the meeting before; None where no update can be made yet."""
        pact = self._pacts[part.groups]
        if pact.length is None:
            return self._meet(ledger, part, own, FRESH)[0]
        if pact.header is not None:
            if pact.arrived is not None:
                pact.arrived.synchronize()  # of the step before: it is there
            header, pact.header = pact.header, None
            self._check(ledger, part, header)
            if header[LOADED] > 0:
                self._compare_contents(ledger, part)
            if pact.sent == part.text:
                pact.length = part.length
        fits = pact.length == part.length
        vector = self._reduced(ledger, part, own if fits else None, FRESH)
        pact.header, pact.arrived = on_its_way(vector[:HEADER])
        pact.sent = part.text
        return vector[HEADER:] if fits else None

    def _reduced(
        self,
        ledger: Meeting,
        part: Part,
        own: Tensor | None,
        pending: int,
        contents: bytes | None = None,
    ) -> Tensor:
        """Return header and amaxes over all ranks; without `own` a vector of the length agreed.

        With `contents` a header alone, whose digest is also of them.
        """
        told = f"{part.text}\n{ledger.updates} updates".encode()
        digest = digest_of(told if contents is None else told + contents)
        failed = self._failure is not None
        header = [pending, int(self.is_loaded), int(failed), *digest, *(-part for part in digest)]
        device = ledger.scale.device
        head = torch.tensor(header, dtype=torch.float32, pin_memory=device.type == "cuda")
        head = head.to(device, non_blocking=True)
        if contents is not None:
            return max_over(part.groups, head)
        if own is None:
            own = head.new_full((self._pacts[part.groups].length or 0,), -1.0)
        return max_over(part.groups, torch.cat([head, own]))

    def _compare_contents(self, ledger: Meeting, part: Part) -> None:
        vector = self._reduced(ledger, part, None, NOTHING, contents_of(ledger, part))
        self._check(ledger, part, vector)

    def _check(self, ledger: Meeting, part: Part, vector: Tensor) -> None:
        """Raise, on all ranks alike, where one of them differs, or did in another group."""
        if vector[FAILED] > 0:
            raise ConvertError(
                "expected ranks that share scales to have the same layers, scalings and scaling "
                "state: some that share other layers differ, and their errors say in what"
            )
        most, least = vector[DIGEST:HEADER].view(2, DIGEST_PARTS)
        if torch.equal(most, -least):
            return
        own = Description(
            rank=dist.get_rank(),
            updates=ledger.updates,
            sites=described(ledger, part.sites),
            contents=digest_of(contents_of(ledger, part)),
        )
        everyone = [own]
        for group in part.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, everyone, group=group)
            everyone = list(itertools.chain(*gathered))
        raise ConvertError(difference(everyone))


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two states are: the ledger's parts by identity, the rest by value."""
    held = zip(one[1:3], other[1:3], strict=True)
    return all(a is b for a, b in held) and (one[0], one[3]) == (other[0], other[3])
