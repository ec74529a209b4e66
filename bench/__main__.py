"""Run every benchmark side by side, print ratios, write bench/results.json."""

import argparse
import json
import platform
from pathlib import Path

import torch

from bench import attention, bank, cast, gather, imports, ledger, linear, runlog, shared, study

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench", description=__doc__).parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{torch.get_num_threads()} threads, torch {capability}, casts {cast.instructions()}"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {machine}")
    benches = {
        "cast": cast,
        "linear": linear,
        "bank": bank,
        "attention": attention,
        "ledger": ledger,
        "shared": shared,
        "runlog": runlog,
        "study": study,
        "gather": gather,
        "imports": imports,
    }
    results = {name: bench.measure() for name, bench in benches.items()}
    results |= cast.measure_forced()
    path = Path(__file__).with_name("results.json")
    path.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")
    print(f"\nwritten: {path}")
