"""What this machine's build of torch does with FP8, device by device, found by trying it.

Answers, by running and never by version number: what a plain cast does with overflow, Inf, NaN
and ties, and whether clamping first makes it equal to the scalar reference (`casts`); what the
scaled matmul takes (`matmul`); what unclamp runs on a device (`device`); and the sentences that
follow (`sentences`). A probe that raises is an answer. `unclamp.report.doctor` prints it.
"""

from unclamp.doctor.casts import CastAnswer, probe_cast
from unclamp.doctor.device import DeviceAnswer, probe_device
from unclamp.doctor.diagnosis import Diagnosis, diagnose
from unclamp.doctor.matmul import MatmulAnswer, probe_matmul

__all__ = [
    "CastAnswer",
    "DeviceAnswer",
    "Diagnosis",
    "MatmulAnswer",
    "diagnose",
    "probe_cast",
    "probe_device",
    "probe_matmul",
]
