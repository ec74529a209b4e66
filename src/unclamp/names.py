"""What things are called: roles of operands, GEMMs by their results, and sites.

A *site* is one operand of one matrix product. Its name is the same in every process and on every
rank, in a run log, an explanation and a page.
"""

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Role = Literal["input", "weight", "grad_output"]
ROLES: tuple[Role, ...] = get_args(Role)
Gemm = Literal["output", "grad_input", "grad_weight"]
GEMMS: tuple[Gemm, ...] = get_args(Gemm)


@dataclass(frozen=True, order=True)
class SiteName:
    """One operand of one matrix product.

    Attributes:
        fqn: Dotted name of the product: that of its module, or of module and parameter where a
            module has several; empty for the model itself.
        role: Which operand.
    """

    fqn: str
    role: Role

    def __str__(self) -> str:
        return f"{shown(self.fqn)} {self.role}"

    def to_dict(self) -> dict[str, str]:
        """Return the name as JSON has it: its two fields."""
        return {"fqn": self.fqn, "role": self.role}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the name that a dict holds; other keys are ignored.

        Raises:
            ValueError: A role that there is not, or a name that is no text.
        """
        fqn, role = data["fqn"], data["role"]
        if not isinstance(fqn, str) or role not in ROLES:
            raise ValueError(f"expected the fqn and role of a site, got {fqn!r} and {role!r}")
        return cls(fqn, role)


def is_attention_name(name: str) -> bool:
    """Whether a product's name, or a glob for some, ends as those of attentions do, or heads of it.

    Example:
        >>> [is_attention_name(n) for n in ("0.attn.qk", "0.attn.pv.3", "*.qk.*", "0.attn.q_proj")]
        [True, True, True, False]
    """
    parts = [part for part in name.split(".")[-2:] if part != "*" and not part.isdigit()]
    return bool(parts) and parts[-1] in ("qk", "pv")


_EXPERT = re.compile(r"(experts?)\.\d+(?=\.)|\.(\d+)$", re.IGNORECASE)


def bank_of(fqn: str) -> str:
    """Return the name of a product with a star for its expert's number; of others their own.

    Example:
        >>> bank_of("0.experts.up.5"), bank_of("0.experts.5.up"), bank_of("layers.5.up")
        ('0.experts.up.*', '0.experts.*.up', 'layers.5.up')
    """
    if "expert" not in fqn.lower():
        return fqn
    return _EXPERT.sub(lambda found: f"{found[1] or ''}.*", fqn, count=1)


def shown(fqn: str) -> str:
    """Return a product's name for people: the empty one is that of the model itself."""
    return fqn or "(the model itself)"


NO_MARKS = frozenset({"model"})
"""Parts of wrappers that say nothing in a glob: PEFT's `base_model.model` is known by the first."""


class ModuleName(str):
    """A dotted name without the parts that wrappers put into it, which knows its other spellings.

    It is equal to the plain name, wherever one is expected.

    Attributes:
        spelled: The name with all its parts, as `named_modules` has it.
        stands_for: The name of the module that this one is a copy of; "" of none.
        marks: The parts of wrappers which, in a glob, show that it is written for spelled names;
            with "*" behind it one that shows it among wildcards too ("*base_layer").
    """

    spelled: str
    stands_for: str
    marks: frozenset[str]

    def __new__(
        cls, name: str, spelled: str = "", stands_for: str = "", marks: frozenset[str] = frozenset()
    ) -> Self:
        """Return the plain name `name`."""
        made = super().__new__(cls, name)
        made.spelled, made.stands_for, made.marks = spelled, stands_for, marks
        return made


def joined(fqn: str, name: str) -> str:
    """Return the name of what lies in a module, from the module's and its name within that."""
    if not isinstance(fqn, ModuleName):
        return f"{fqn}.{name}" if fqn and name else fqn or name
    if not name:
        return fqn
    spelled, other = joined(fqn.spelled, name), fqn.stands_for and joined(fqn.stands_for, name)
    return ModuleName(joined(str(fqn), name), spelled, other, fqn.marks)


def spellings(fqn: str, glob: str) -> Iterator[str]:
    """Yield what a glob is compared with: the name, and what else the module is called.

    A name with the parts of wrappers is another spelling only for a glob that has such a part: a
    tail of it may be the plain name of another module.
    """
    yield fqn
    if isinstance(fqn, ModuleName):
        if fqn.stands_for:
            yield fqn.stands_for
        parts = glob.removeprefix("^").split(".")
        if any(p in fqn.marks or p.strip("*?") + "*" in fqn.marks for p in parts):
            yield fqn.spelled


def without_wrappers(
    paths: Sequence[tuple[str, Hashable]],
    put_in: Collection[str],
    copies: Collection[str] = (),
) -> list[str]:
    """Return names without the parts that wrappers put in, in the order of `paths`.

    A wrapper has the name of what it wraps. No two others have one name: where two would, parts
    come back into that of the one which lies in more wrappers, the last part first.

    Args:
        paths: Dotted paths, that of what is around before those within, and what lies there: the
            same module may have several.
        put_in: Paths whose last part a wrapper put in: what lies there has the wrapper's name.
        copies: Paths below which copies lie of what has the name of what is around.

    Example:
        >>> paths = [("", 0), ("module", 1), ("module.a", 2), ("module.a.module", 3)]
        >>> without_wrappers(paths, ["module"])
        ['', '', 'a', 'a.module']
    """
    if not (put_in or copies):
        return [path for path, _ in paths]
    plain: dict[str, str] = {"": ""}
    stands: dict[str, str] = {"": ""}
    for path, _ in paths:
        above, _, last = path.rpartition(".")
        if path:
            plain[path] = plain[above] if path in put_in else joined(plain[above], last)
            if copies:
                is_in = path in put_in or path in copies
                stands[path] = stands[above] if is_in else joined(stands[above], last)
    around = {path.rpartition(".")[0] for path in put_in}
    there = {path: key for path, key in paths if path not in around}
    _keep_apart(plain, there, frozenset(put_in))
    marks = _marks(put_in, {part for path in there for part in plain[path].split(".")})
    names: list[str] = []
    for path, _ in paths:
        name = plain[path]
        other = stands[path] if copies and _is_below(path, copies) else ""
        is_path = name == path and not other
        names.append(path if is_path else ModuleName(name, path, other, marks))
    return names


def _marks(put_in: Collection[str], parts: Collection[str]) -> frozenset[str]:
    """Return `ModuleName.marks` where the plain names have these parts."""
    own = {path.rpartition(".")[2] for path in put_in} - NO_MARKS - set(parts)
    among_wildcards = {f"{mark}*" for mark in own if not any(mark in part for part in parts)}
    return frozenset(own | among_wildcards)


def _keep_apart(
    names: dict[str, str], there: Mapping[str, Hashable], put_in: frozenset[str]
) -> None:
    """Put parts back where another module would have the same name."""
    kept: dict[str, int] = {}
    while True:
        held: dict[str, list[str]] = {}
        for path in there:
            held.setdefault(names[path], []).append(path)
        groups = [paths for paths in held.values() if len({there[path] for path in paths}) > 1]
        if not groups:
            return
        for paths in groups:
            left = {path: _left_out(path, put_in) - kept.get(path, 0) for path in paths}
            for path in (path for path in paths if left[path] == max(left.values())):
                kept[path] = kept.get(path, 0) + 1
                names[path] = _with_last(path, put_in, kept[path])


def _left_out(path: str, put_in: frozenset[str]) -> int:
    """Return how many parts of a path wrappers put in."""
    parts = path.split(".")
    return sum(".".join(parts[:n]) in put_in for n in range(1, len(parts) + 1))


def _with_last(path: str, put_in: frozenset[str], number: int) -> str:
    """Return a path without the parts that wrappers put in, but the last ones of these."""
    parts, kept = path.split("."), list[str]()
    for n in range(len(parts), 0, -1):
        is_put_in = ".".join(parts[:n]) in put_in
        if not is_put_in or number > 0:
            kept.append(parts[n - 1])
        number -= is_put_in
    return ".".join(reversed(kept))


def _is_below(path: str, tops: Collection[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:n]) in tops for n in range(1, len(parts) + 1))
