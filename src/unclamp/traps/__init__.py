"""FP8's and PyTorch's numerical traps, as short experiments that run on the reader's machine.

A `Trap` is what people believe, the few lines that show otherwise, what is documented for which
torch on which device, what it costs in training, and what unclamp does about it. The lines that
are shown are those that run. Answers: which traps there are (`catalogue`, and a file for each
theme: `casts`, `scales`, `gemms`, `sums`, `ranks`, `training`, `compiled`); what they do here
(`running`, and `apart` for those that need processes); the page of the documentation (`page`).
`unclamp.doctor` takes its verdicts from the same experiments, and `unclamp.report.traps` prints
the outcomes.
"""

from unclamp.traps.catalogue import TRAPS, find
from unclamp.traps.running import Outcome, run
from unclamp.traps.trap import Between, Documented, Trap

__all__ = ["TRAPS", "Between", "Documented", "Outcome", "Trap", "find", "run"]
