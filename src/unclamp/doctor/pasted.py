"""One paragraph for a bug report: versions, devices, what casts and GEMMs do, what is unusual."""

from collections.abc import Mapping, Sequence

from unclamp.doctor.casts import CastAnswer
from unclamp.doctor.device import DeviceAnswer
from unclamp.doctor.matmul import ACCEPTED
from unclamp.written import counted, listed


def paragraph(build: Mapping[str, str], devices: Sequence[DeviceAnswer]) -> str:
    """Return the paragraph: no line breaks, no paths, nothing of the user's."""
    versions = ", ".join(
        f"{name} {build[name]}" for name in ("unclamp", "torch", "python", "numpy", "numba",
                                              "triton", "cuda") if build.get(name)
    )  # fmt: skip
    return " ".join([f"{versions}.", *(_of_device(device) for device in devices)])


def _of_device(device: DeviceAnswer) -> str:
    fates = "; ".join(dict.fromkeys(map(_fate, device.casts)))
    off = sum(cast.clamped_differ or 0 for cast in device.casts)
    taken = [answer for answer in device.matmul if answer.outcome == ACCEPTED]
    bad = [trap.name for trap in device.traps if trap.is_bad]
    unusual = f"not as documented: {listed(bad)}" if bad else "all as documented"
    return (
        f"{device.device} ({device.name}): plain casts {fates}; {counted(off, 'code')} off after "
        f"a clamp; {device.matmul_api} takes {len(taken)} of {len(device.matmul)} products; "
        f"casts by {device.kernels['casts']}; {counted(len(device.traps), 'experiment')}, "
        f"{unusual}."
    )


def _fate(cast: CastAnswer) -> str:
    return f"to {cast.format}: {cast.finite_overflow}"
