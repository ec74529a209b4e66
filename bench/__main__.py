"""Run every benchmark side by side, print ratios, write bench/results.json."""

import json
from pathlib import Path

from bench import linear

if __name__ == "__main__":
    results = {"linear": linear.measure()}
    path = Path(__file__).with_name("results.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}")
