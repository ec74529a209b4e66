"""What it takes to import unclamp and to show its help, each in a process of its own."""

import statistics
import subprocess
import sys
import time

from bench.timing import verdict

ROUNDS = 9
COMMANDS = {
    "python -c 'import unclamp'": (["-c", "import unclamp"], 0.3),
    "unclamp --help": (["-m", "unclamp", "--help"], 0.5),
}


def measure() -> dict[str, dict[str, float]]:
    """Time each command and an empty Python beside it."""
    print("\nimports (seconds, an empty Python included)")
    results = {}
    for name, (arguments, target) in {"python -c pass": (["-c", "pass"], 0.3), **COMMANDS}.items():
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        results[name] = {"s": seconds}
        print(f"{name:36} {seconds:9.3f} s   target {target} s: {verdict(seconds, target)}")
    return results
