"""Which formats a device multiplies: AMD's MI300 has its own, with one NaN and no -0."""

from unclamp.formats import E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, Format

FNUZ = {E4M3FN: E4M3FNUZ, E5M2: E5M2FNUZ}


def native_format(fmt: Format, arch: str) -> Format:
    """Return what a format becomes on a device (`gpu.architecture`); most leave it as it is."""
    return FNUZ.get(fmt, fmt) if arch.startswith("gfx94") else fmt
