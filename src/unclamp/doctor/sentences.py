"""What follows from the answers, in plain words: one sentence for each thing to know."""

from collections.abc import Callable, Iterator, Sequence

from unclamp.doctor.casts import GIVES_INF, GIVES_NAN, MIXED, NOT_SUPPORTED, SATURATES, CastAnswer
from unclamp.doctor.device import NO_ACCUMULATION, DeviceAnswer
from unclamp.doctor.matmul import ACCEPTED, NO_CHANGE, REJECTED, WRONG
from unclamp.written import counted

FATES = {
    GIVES_INF: "turns overflow into Inf, and one Inf spoils a row of a GEMM",
    GIVES_NAN: "turns overflow into NaN, and one NaN spoils a row of a GEMM",
    SATURATES: "saturates and leaves no trace",
    MIXED: "does not treat all overflow alike",
}
NOT_ON_HOPPER = ("e5m2 x e5m2", "K not a multiple of 16", "row-major second operand")
"""What a Hopper GPU rejects."""


def sentences(devices: Sequence[DeviceAnswer]) -> Iterator[str]:
    """Yield the sentences, the gravest of a device first."""
    for device in devices:
        yield from _of_wrong_numbers(device)
        yield from _of_traps(device)
        yield from _of_casts(device)
        yield from _of_matmul(device)
    for device in devices[1:]:
        yield from _of_differences(devices[0], device)
    if not any(d.device == "cuda" for d in devices):
        yield "torch sees no CUDA device, so none was probed."
    if any(NO_ACCUMULATION in d.kernels["Hopper-like accumulation"] for d in devices):
        yield "Hopper-like accumulation needs a numba that works: pip install numba."


def _of_wrong_numbers(device: DeviceAnswer) -> Iterator[str]:
    for cast in device.casts:
        if cast.clamped_differ:
            are = "is" if cast.clamped_differ == 1 else "are"
            yield (
                f"{device.device}: {counted(cast.clamped_differ, 'code')} of {cast.format} from "
                f"{cast.source} {are} off the reference even after a clamp: do not trust FP8 here."
            )
    if wrong := [m.case for m in device.matmul if m.outcome == WRONG]:
        yield f"{device.device}: {device.matmul_api} gives wrong results for {', '.join(wrong)}."


def _of_traps(device: DeviceAnswer) -> Iterator[str]:
    for trap in device.traps:
        if trap.is_bad:
            yield (
                f"{device.device}: {trap.name} does not behave as documented for this torch "
                f"({trap.detail}): see `unclamp traps {trap.name}`."
            )


def _of_casts(device: DeviceAnswer) -> Iterator[str]:
    for fate, words in FATES.items():
        if formats := _formats(device, lambda cast, fate=fate: cast.finite_overflow == fate):
            yield f"{device.device}: a plain cast to {formats} {words}: unclamp clamps first."
    if formats := _formats(device, lambda cast: cast.ties not in ("to even", NOT_SUPPORTED)):
        yield f"{device.device}: casts to {formats} do not round ties to even."
    for error in dict.fromkeys(cast.error for cast in device.casts if cast.error):
        formats = _formats(device, lambda cast, error=error: cast.error == error)
        yield f"{device.device}: casts to {formats} are not supported ({error})."


def _of_matmul(device: DeviceAnswer) -> Iterator[str]:
    answers = {answer.case: answer for answer in device.matmul}
    if all(answer.outcome == REJECTED for answer in answers.values()):
        first = device.matmul[0].detail
        yield f"{device.device}: {device.matmul_api} takes nothing that was tried ({first})."
    if lax := [case for case in NOT_ON_HOPPER if answers[case].outcome == ACCEPTED]:
        yield (
            f"{device.device}: {device.matmul_api} takes what a Hopper GPU rejects "
            f"({', '.join(lax)}): code that runs here may fail there."
        )
    if answers["use_fast_accum"].detail == NO_CHANGE:
        yield (
            f"{device.device}: use_fast_accum changes nothing, so what fast accumulation costs on "
            "a Hopper GPU does not show here."
        )


def _of_differences(first: DeviceAnswer, other: DeviceAnswer) -> Iterator[str]:
    """Compare the plain casts of two devices, which probe the same list in the same order."""
    for one, two in zip(first.casts, other.casts, strict=True):
        here, there = (", ".join((c.finite_overflow, c.inf, c.nan)) for c in (one, two))
        if here != there and not one.error and not two.error:
            yield (
                f"Plain casts to {one.format} from {one.source} differ: finite overflow, Inf, NaN "
                f"on {first.device}: {here}; on {other.device}: {there}."
            )


def _formats(device: DeviceAnswer, wanted: Callable[[CastAnswer], bool]) -> str:
    return ", ".join(dict.fromkeys(cast.format for cast in device.casts if wanted(cast)))
