"""What matrix products a training step has, their FLOPs, and which of them go through FP8: as data.

Found by `unclamp.nn.coverage`, which runs the model. A run log keeps it as JSON, and a page reads
it without torch.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from unclamp.names import GEMMS, Gemm, shown
from unclamp.shown import Shown
from unclamp.written import counted, listed, percent

State = Literal["converted", "observed", "would be converted", "would be observed", "left out"]
"""Of a product: its casts are computed with; they are only counted; they would be if the model were
converted with the default recipe; or there are none."""
STATES: tuple[State, ...] = get_args(State)
SMALLEST_ROW = 5e-4
"""Share of the FLOPs from which on a product has a row of its own in the table."""
MOST_ROWS = 40
MOST_LEFT_OUT = 6
MOST_IDLE = 3


@dataclass(frozen=True, kw_only=True)
class CoveredProduct:
    """One matrix product of a step: all calls of it.

    Attributes:
        fqn: Its name: that of its module; of module and parameter where a module has several; of
            module and `qk`, `pv` (attention) or `matmul` where no parameter takes part.
        module: Class of the module that computes it.
        kind: What it is in a sentence: "linear", "experts", "attention", "convolution", ...
        sizes: M, N and K of its first call: rows of the output, columns of the output, and what
            is summed over. Of a batch of products M counts the rows of all of them.
        calls: How often it was computed forward; what checkpointing computes again is left out.
        output, grad_input, grad_weight: FLOPs of each GEMM, two for a multiplication and an
            addition. Without a parameter grad_input is the gradient of the first operand, and
            grad_weight that of the second one.
        state: Whether it goes through FP8.
        why: Of a product that is left out: the reason.
    """

    fqn: str
    module: str
    kind: str
    sizes: tuple[int, int, int]
    calls: int
    output: int
    grad_input: int
    grad_weight: int
    state: State
    why: str = ""

    @property
    def flops(self) -> int:
        """FLOPs of its three GEMMs."""
        return self.output + self.grad_input + self.grad_weight


@dataclass(frozen=True, kw_only=True)
class CoverageRow:
    """Products that are alike: the same layer of repeated blocks.

    Attributes:
        name: Their name, "*" where they differ: "layers.*.mlp.down_proj".
        count: How many they are.
        product: The first of them, with the FLOPs and calls of all.
    """

    name: str
    count: int
    product: CoveredProduct


@dataclass(frozen=True, kw_only=True, repr=False)
class CoverageReport(Shown):
    """Every matrix product of a training step, and what FP8 does to it; made by `unclamp.coverage`.

    Attributes:
        products: In the order in which they were first computed.
        how: "fake" if the step ran on shapes alone, "real" if the model needed data.
        unknown: Operators of other libraries that ran, of whose FLOPs nothing is known.
        idle: Modules with weight matrices that the step did not call: a branch that it did not
            take.
    """

    products: tuple[CoveredProduct, ...]
    how: Literal["fake", "real"] = "fake"
    unknown: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """FLOPs of all matrix products of the step."""
        return sum(product.flops for product in self.products)

    @property
    def share(self) -> float:
        """Share of the FLOPs whose products are converted, observed, or would be: 0 to 1."""
        return self.share_of("converted", "observed", "would be converted", "would be observed")

    def share_of(self, *states: State) -> float:
        """Return the share of the FLOPs in some states; 0 where there is no product."""
        part = sum(product.flops for product in self.products if product.state in states)
        return part / self.flops if self.flops else 0.0

    def share_in(self, product: CoveredProduct) -> float:
        """Return a product's share of the FLOPs."""
        return product.flops / self.flops if self.flops else 0.0

    def gemm_share(self, gemm: Gemm) -> float:
        """Return the share of the FLOPs of all products' GEMMs of one name."""
        part = sum(getattr(product, gemm) for product in self.products)
        return part / self.flops if self.flops else 0.0

    def by_kind(self) -> dict[str, float]:
        """Return the share of the FLOPs of each kind of product, in the order of the products."""
        shares: dict[str, float] = {}
        for product in self.products:
            shares[product.kind] = shares.get(product.kind, 0.0) + self.share_in(product)
        return shares

    def left_out(self) -> dict[str, tuple[float, str]]:
        """Return what is left out: its share and the reason, the largest share first.

        By kind; linear layers by their names, "*" for each number in them.
        """
        found: dict[tuple[str, str], float] = {}
        for product in self.products:
            if product.state == "left out":
                is_layer = product.kind == "linear"
                key = (pattern(product.fqn) if is_layer else product.kind, product.why)
                found[key] = found.get(key, 0.0) + self.share_in(product)
        names: dict[str, tuple[float, str]] = {}
        for (kind, why), part in sorted(found.items(), key=lambda item: -item[1]):
            place = itertools.count(2)
            name = kind
            while name in names:
                name = f"{kind} ({next(place)})"
            names[name] = (part, why)
        return names

    def rows(self) -> list[CoverageRow]:
        """Return the products with repeated layers folded into one, the largest share first."""
        alike: dict[tuple[Any, ...], list[CoveredProduct]] = {}
        for product in self.products:
            key = (pattern(product.fqn), product.module, product.sizes[1:], product.state)
            alike.setdefault((*key, product.why), []).append(product)
        rows = [_row(key[0], products) for key, products in alike.items()]
        return sorted(rows, key=lambda row: -row.product.flops)

    def sentence(self) -> str:
        """Say in one sentence what is covered, and what is left out and why."""
        if not self.flops:
            return "the step has no matrix product"
        has = {state: self.share_of(state) for state in STATES if state != "left out"}
        names = {"would be converted": "would convert", "would be observed": "would observe"}
        said = [f"{names.get(state, state)} {short(part)}" for state, part in has.items() if part]
        text = f"{', '.join(said) or 'converted nothing'} of the FLOPs"
        left = self.left_out()
        if left:
            alike: dict[str, list[str]] = {}
            for kind, (part, why) in itertools.islice(left.items(), MOST_LEFT_OUT):
                reason = why.split(";")[0]  # what would take it in is in the conversion's report
                alike.setdefault(reason, []).append(f"{kind} {short(part)}")
            each = [f"{', '.join(kinds)} ({reason})" for reason, kinds in alike.items()]
            more = len(left) - MOST_LEFT_OUT
            each += [f"{more} more"] if more > 0 else []
            text += f"; left out: {', '.join(each)}"
        if self.unknown:
            text += f"; of unknown FLOPs: {', '.join(self.unknown)}"
        if self.idle:
            text += f"; not called: {listed([shown(fqn) for fqn in self.idle], most=MOST_IDLE)}"
        return text

    def __str__(self) -> str:
        rows = self.rows()
        large = [r for r in rows if self.share_in(r.product) >= SMALLEST_ROW][:MOST_ROWS]
        cells = [("product", "M x N x K", "GFLOP", "share", "state")]
        for row in large:
            p = row.product
            name = shown(row.name) + (f" x{row.count}" if row.count > 1 else "")
            sizes = " x ".join(f"{size:,}" for size in p.sizes)
            state = f"{p.state}: {p.why}" if p.why else p.state
            cells.append((name, sizes, f"{p.flops / 1e9:,.4g}", short(self.share_in(p)), state))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in cells
        ]
        if len(rows) > len(large):
            rest = sum(r.product.flops for r in rows) - sum(r.product.flops for r in large)
            part = short(rest / self.flops if self.flops else 0.0)
            lines.append(f"and {counted(len(rows) - len(large), 'smaller product')}, {part}")
        return "\n".join([*lines, self.sentence()])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "flops": self.flops,
            "share": self.share,
            "sentence": self.sentence(),
            "how": self.how,
            "unknown": list(self.unknown),
            "idle": list(self.idle),
            "products": [asdict(p) | {"sizes": list(p.sizes)} for p in self.products],
        }

    def summary(self) -> dict[str, Any]:
        """Return what a run log keeps of it, as JSON has it: repeated layers in one row."""
        rows = [
            {
                "name": row.name,
                "count": row.count,
                "kind": row.product.kind,
                "sizes": list(row.product.sizes),
                "flops": row.product.flops,
                "share": self.share_in(row.product),
                "state": row.product.state,
                "why": row.product.why,
            }
            for row in self.rows()
        ]
        return {
            "flops": self.flops, "share": self.share, "sentence": self.sentence(), "rows": rows
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what `to_dict` made; keys of later versions are ignored.

        Raises:
            ValueError: Something is missing, or no state of a product.
        """
        names = CoveredProduct.__dataclass_fields__
        try:
            products = [
                CoveredProduct(
                    **{
                        key: value for key, value in each.items() if key in names and key != "sizes"
                    },
                    sizes=tuple(each["sizes"]),
                )
                for each in data["products"]
            ]
            how, unknown, idle = data["how"], tuple(data["unknown"]), tuple(data["idle"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected what CoverageReport.to_dict makes: {error}") from error
        if any(product.state not in STATES for product in products):
            raise ValueError(f"expected the states {list(STATES)}")
        return cls(products=tuple(products), how=how, unknown=unknown, idle=idle)


def pattern(fqn: str) -> str:
    """Return a name with "*" for each number in it.

    Example:
        >>> pattern("layers.31.mlp.down_proj")
        'layers.*.mlp.down_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in fqn.split("."))


def short(share: float) -> str:
    """Return a share of the FLOPs for people: as `percent`, but none below a hundredth of one.

    Example:
        >>> short(0.9412), short(0.00123), short(1e-6), short(1.0)
        ('94.1 %', '0.12 %', 'under 0.01 %', '100 %')
    """
    if 0 < share < 1e-4:
        return "under 0.01 %"
    if share < 0.01:
        return f"{100 * share:.2g} %"
    return "over 99.9 %" if 0.9995 <= share < 1 else percent(share)


def _row(name: str, products: Iterable[CoveredProduct]) -> CoverageRow:
    every = list(products)
    first = every[0]
    sums = {gemm: sum(getattr(product, gemm) for product in every) for gemm in GEMMS}
    total = replace(first, calls=sum(product.calls for product in every), **sums)
    return CoverageRow(name=name if len(every) > 1 else first.fqn, count=len(every), product=total)
