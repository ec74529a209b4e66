"""A process of `unclamp.traps.apart`: runs the traps that it is told, and writes their answers.

`python -m unclamp.traps.child WHAT FILE`: WHAT is JSON, FILE gets a line of JSON for each trap.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unclamp.quiet import quiet_imports
from unclamp.traps.answers import answer_of
from unclamp.traps.catalogue import find


def main(what: dict[str, Any], path: Path) -> None:
    """Run the traps, one after the other; ranks meet first."""
    quiet_imports()
    torch.manual_seed(0)
    if what["ranks"]:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{what['meeting']}",
            rank=what["rank"],
            world_size=what["ranks"],
            timeout=timedelta(seconds=what["patience_s"]),
        )
    with path.open("a", encoding="utf-8") as file:
        for name in what["names"]:
            (trap,) = find(name)
            answer = answer_of(trap, what["device"], start=time.perf_counter())
            file.write(json.dumps({"name": name, "answer": answer.to_dict()}) + "\n")
            file.flush()
    if what["ranks"]:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
