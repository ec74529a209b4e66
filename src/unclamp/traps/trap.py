"""What a trap is: a belief, the few lines that show otherwise, and what is documented of them.

The lines that are shown are the source of the function that runs, with whatever it uses of its
own module and the imports that it needs, so that text and run cannot part.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType

Fact = str | int | float
"""What an experiment found under one name; NaN and Inf are the texts "nan" and "inf"."""
Version = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Between:
    """A number that depends on the processor or the kernel: both ends belong to it."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True, kw_only=True)
class Documented:
    """What is known of some versions of torch on one kind of device.

    Attributes:
        expected: What each fact is.
        since: The first version of torch that it holds for; None: all the earlier ones too.
        before: The first version that it does not hold for; None: all the later ones too.
        device: "cpu", "cuda", or one architecture such as "sm_90".
        source: Where it comes from, if not from running this experiment.
    """

    expected: Mapping[str, Fact | Between]
    since: Version | None = None
    before: Version | None = None
    device: str = "cpu"
    source: str = ""

    def holds_for(self, version: Version, devices: tuple[str, ...]) -> bool:
        """Whether it says something of this version on a device with one of these names."""
        return (
            self.device in devices
            and (self.since is None or version >= self.since)
            and (self.before is None or version < self.before)
        )

    @property
    def versions(self) -> str:
        """The range in words: "torch 2.13 and later"."""
        since, before = (v and ".".join(map(str, v)) for v in (self.since, self.before))
        if since and before:
            return f"torch {since} to before {before}"
        if since:
            return f"torch {since} and later"
        return f"torch before {before}" if before else "every torch from 2.11"

    def differences(self, facts: Mapping[str, Fact]) -> tuple[str, ...]:
        """Return a sentence for each fact that is not as documented; none if all are."""
        said = []
        for name, wanted in self.expected.items():
            got = facts.get(name, "nothing")
            if not agrees(got, wanted):
                said.append(f"{name}: {fact_text(got)}, documented {fact_text(wanted)}")
        return tuple(said)


@dataclass(frozen=True, kw_only=True)
class Trap:
    """One experiment, and everything to know of it.

    Attributes:
        name: What it is called on the command line.
        belief: What people believe, in one sentence.
        truth: What happens instead.
        experiment: Takes the device's name, or nothing where it has ranks, and returns facts.
        documented: What the facts are, for which torch on which device.
        cost: What it costs in training.
        remedy: What unclamp does about it.
        see: A page of docs/, or a name of the package.
        telling: The fact that a table shows, if not the first.
        devices: Where it can run.
        ranks: Processes that meet through gloo; 0 where it runs without any others.
        apart: Whether it needs a process of its own: it imports or compiles for long.
        needs: Says why it cannot run here, given the device; None where it can.
    """

    name: str
    belief: str
    truth: str
    experiment: Callable[..., Mapping[str, Fact]]
    documented: tuple[Documented, ...]
    cost: str
    remedy: str
    see: str
    telling: str = ""
    devices: tuple[str, ...] = ("cpu",)
    ranks: int = 0
    apart: bool = False
    needs: Callable[[str], str | None] = lambda device: None

    @property
    def theme(self) -> str:
        """The name of the file that holds the experiment."""
        return self.experiment.__module__.rpartition(".")[2]

    @property
    def code(self) -> str:
        """The lines that run, complete, to paste into a file."""
        return _script(self.experiment, device=self.devices[0], ranks=self.ranks)

    def documented_for(self, version: Version, devices: tuple[str, ...]) -> Documented | None:
        """Return what is documented of a torch and a device with these names, if anything is."""
        return next((d for d in self.documented if d.holds_for(version, devices)), None)


def agrees(got: Fact, wanted: Fact | Between) -> bool:
    """Whether a fact is as documented; floats to one part in a thousand.

    Example:
        >>> agrees(0.28, Between(low=0.1, high=0.6)), agrees(196, 196), agrees("nan", 448.0)
        (True, True, False)
    """
    if isinstance(wanted, Between):
        return not isinstance(got, str) and wanted.low <= got <= wanted.high
    if isinstance(wanted, str) or isinstance(got, str):
        return got == wanted
    return abs(got - wanted) <= 1e-3 * abs(wanted)


def fact_text(value: Fact | Between) -> str:
    """Return a fact as people read it.

    Example:
        >>> fact_text(28702), fact_text(0.0300483), fact_text(448.0), fact_text("raises")
        ('28,702', '0.03', '448', 'raises')
    """
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _script(experiment: Callable[..., Mapping[str, Fact]], *, device: str, ranks: int) -> str:
    module = sys.modules[experiment.__module__]
    sources = [inspect.getsource(thing).rstrip() for thing in _used(experiment, module)]
    call = f'print({experiment.__name__}("{device}"))'
    if ranks:
        call = (
            f'dist.init_process_group("gloo")  # torchrun --nproc-per-node {ranks} FILE\n'
            f"print(dist.get_rank(), {experiment.__name__}())\n"
            "dist.destroy_process_group()"
        )
    imports = _imports(module, "\n".join([*sources, call]))
    return TOOLS.sub("", "\n\n\n".join(["\n".join(imports), *sources, call]) + "\n")


TOOLS = re.compile(r"  # (?:pyright|noqa|fmt): .*")
"""Remarks to the linters, which are left out of what is shown."""


def _used(experiment: Callable[..., object], module: ModuleType) -> Iterator[Callable[..., object]]:
    """Yield what an experiment uses of its own module, itself too, in the module's order."""
    own = {
        name: thing
        for name, thing in vars(module).items()
        if isinstance(thing, FunctionType | type) and thing.__module__ == module.__name__
    }
    seen, left = {experiment.__name__}, [experiment.__name__]
    while left:
        new = _names(inspect.getsource(own[left.pop()])) & own.keys() - seen
        seen |= new
        left += new
    yield from (thing for name, thing in own.items() if name in seen)


def _imports(module: ModuleType, code: str) -> Iterator[str]:
    """Yield those imports of a module that some of its code needs."""
    names = _names(code)
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [a for a in node.names if (a.asname or a.name.split(".")[0]) in names]
            if kept:
                node.names = kept
                yield ast.unparse(node)


def _names(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
