"""Was it the clamping? Snapshots of a training, and replays of a spike with sites un-clamped.

While a run trains: `snapshots` is what a loop calls, `watch` hears its losses, `ring` holds states
in memory, `snapshot` is one of them as plain data, `store` puts it on disk, `training` takes and
puts back a state, `facts` says what must be alike for a replay. `in_place` explains a spike while
the training waits.

Afterwards: `entry` chooses spike, snapshot and code, and `chain` finds the snapshots that lead up
to it; `investigate` asks the questions in order from a `start`, and `backwards` asks again from
further back; `replay` does the steps again, `game` keeps the answers, `screening`, `attribution`,
`shapley` and `smallest` share the spike out among `players`, within `limits`; `noise` says how much
of it is chaos, and `underflow` at which steps it is underflow; `remedy` finds what mends it, and
`mend` makes the override of that; `findings` writes the answer so far. The answer itself is
`unclamp.analysis.explanation`, and how far back it reaches `unclamp.analysis.horizon`; `comeback`
says why losses did not come back.

On several processes: `ranks` is what they tell each other, `shared_loss` the loss that all go by,
`shards` a state of which each has a part, `parts` a snapshot that each writes a part of, `launched`
where they meet, and `across` what an answer says of them.
"""

from unclamp.analysis.counterfactual import SiteShare
from unclamp.analysis.explanation import Explanation
from unclamp.explain.entry import explain_spike
from unclamp.explain.limits import Limits
from unclamp.explain.snapshots import Rewind, Snapshots
from unclamp.explain.training import Training

__all__ = [
    "Explanation",
    "Limits",
    "Rewind",
    "SiteShare",
    "Snapshots",
    "Training",
    "explain_spike",
]
