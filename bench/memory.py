"""The peak memory of one step of a layer, in a process of its own."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

import unclamp


def peak_mib(name: str) -> float:
    """Return by how much the peak resident memory grew in four steps of this layer, MiB."""
    command = [sys.executable, "-m", "bench.memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident_mib(field: str) -> float:
    """Return a field of this process's memory: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    """Print the peak of four steps above what was resident before them."""
    from bench.linear import layers, step  # noqa: PLC0415  # each imports the other

    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("name", help="of a layer in bench.linear")
    name = parser.parse_args().name
    unclamp.quantize(torch.ones(2), unclamp.E4M3FN)  # the compiler's memory is not the step's
    run = step(layers(name)[name])
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(4):
        run()
    print(resident_mib("VmHWM") - before)


if __name__ == "__main__":
    main()
