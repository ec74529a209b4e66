"""What a log counted of its own scalings, a row a step and site whatever was recorded twice."""

from pathlib import Path

import pytest

from truths.rows import cast_row, columns, step
from unclamp.analysis.whatif.recorded import Recorded, recorded
from unclamp.runlog import Header, RunLog, RunLogWriter

SITES = 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("steps", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 2, 3, 4]], ids=["on", "went back"])
def test_a_step_that_was_recorded_twice_is_one(tmp_path: Path, steps: list[int], ranks: int):
    clamped = 3
    for rank in range(ranks):
        header = Header(unclamp_version="0", world_size=ranks, run_id="one")
        with RunLogWriter(tmp_path, header=header, rank=rank, flush_interval_s=1e9) as writer:
            ids = [writer.first_site + rank + ranks * i for i in range(SITES)]
            kind = {"role": "input", "format": "e4m3fn", "scaling": "delayed", "format_max": 448.0}
            names = {"site": ids, "fqn": [f"m{i}" for i in range(SITES)]}
            writer.add("sites", names | {name: [value] * SITES for name, value in kind.items()})
            for number in steps:
                writer.add("steps", step(number))
                saturated = int(number == clamped)
                same = {"elements": 9, "nonfinite": 0, "saturated": saturated, "recast": 0}
                rows = [cast_row(number, i, **same) for i in ids]
                writer.add("casts", columns(rows))
            writer.close("finished")
    with RunLog.open(tmp_path) as log:
        found = recorded(log, log.computed_sites())
    different = len(set(steps))
    assert found == Recorded(
        casts=SITES * different, clamped=SITES, recast=0, reads=1.0, scalings=("delayed",)
    )
