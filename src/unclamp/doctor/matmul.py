"""What torch's scaled matmul accepts on a device: each case is a tiny product, tried.

The products are those of the traps of `unclamp.traps.gemms`; here all pairs of formats come too.
"""

from dataclasses import asdict, dataclass
from typing import Any

from unclamp.formats import FORMATS
from unclamp.traps.answers import one_line
from unclamp.traps.gemms import fast_accumulation
from unclamp.traps.products import ACCEPTED, REJECTED, WRONG, Problem, attempt

__all__ = ["ACCEPTED", "NO_CHANGE", "REJECTED", "WRONG", "MatmulAnswer", "api", "probe_matmul"]

NO_CHANGE = "changes nothing"


@dataclass(frozen=True, kw_only=True)
class MatmulAnswer:
    """Whether a case was accepted; `detail` is the error, or what else was seen."""

    case: str
    outcome: str
    detail: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


CASES = {
    "per-tensor scales": Problem(),
    "row scales": Problem(row_scales=True),
    "K not a multiple of 16": Problem(k=40),
    "row-major second operand": Problem(row_major=True),
    **{f"{a} x {b}": Problem(a=a, b=b) for a in FORMATS for b in FORMATS},
}


def api() -> str:
    """Return the name of the function that is probed."""
    return "torch.nn.functional.scaled_mm"


def probe_matmul(device: str) -> tuple[MatmulAnswer, ...]:
    """Try every case on a device, the format pairs and fast accumulation last."""
    tried = [_try_product(case, problem, device) for case, problem in CASES.items()]
    return (*tried, _try_fast_accumulation(device))


def _try_product(case: str, problem: Problem, device: str) -> MatmulAnswer:
    tried = attempt(problem, device)
    detail = None if tried.error is None else one_line(tried.error)
    return MatmulAnswer(case=case, outcome=tried.outcome, detail=detail)


def _try_fast_accumulation(device: str) -> MatmulAnswer:
    """Sum many positive products both ways: with fast accumulation a Hopper GPU loses bits."""
    try:
        ((name, change),) = fast_accumulation(device).items()
    except Exception as error:
        return MatmulAnswer(case="use_fast_accum", outcome=REJECTED, detail=one_line(error))
    detail = f"{name}: {100 * change:.2g} %" if change else NO_CHANGE
    return MatmulAnswer(case="use_fast_accum", outcome=ACCEPTED, detail=detail)
