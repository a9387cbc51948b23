"""doppel beside its peers, in turn, on the same machine in one run: `infra/bench.sh` builds, installs and calls this.

Each comparison runs doppel, then the peer, and so on, and takes the median of the pairs' ratios: on a shared machine
single times say little. Prints one JSON line per comparison, then a table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def comparisons(args):
    """(name, doppel's command, the peer, the peer's command)"""
    cache = args.cache
    peers = [sys.executable, f"{HERE}/peers.py"]
    model = ["--model", f"{cache}/models/smollm2-135m-instruct", "--data", f"{cache}/data/sharegpt.json"]
    encoder = ["--encoder", f"{cache}/models/all-minilm-l6-v2", "--data", f"{cache}/data/sharegpt.json"]
    for dtype in ["bf16", "f32"]:
        yield (
            f"train {dtype}",
            [args.lm, "train", dtype, "256"],
            "Opacus + PEFT, batch 8",
            [*peers, "train", *model, "--dtype", dtype, "--count", "96"],
        )
        yield (
            f"sample {dtype}",
            [args.lm, "sample", dtype, "192"],
            "transformers.generate, batch 32",
            [*peers, "sample", *model, "--dtype", dtype, "--count", "96", "--batch", "32"],
        )
        yield (
            f"embed {dtype}",
            [args.lm, "embed", dtype, "1024"],
            "sentence-transformers, batch 32",
            [*peers, "embed", *encoder, "--dtype", dtype, "--count", "1024"],
        )
    yield (
        "cluster",
        [args.vote, "cluster", "180000", "256", "1000"],
        "faiss",
        [*peers, "cluster", "--count", "180000", "--dimension", "256", "--clusters", "1000"],
    )


def rate(command):
    """The first line of JSON with a rate that the command prints, and its unit."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in ran.stdout.splitlines():
        if line.startswith("{") and "rate" in json.loads(line):
            found = json.loads(line)
            return found["rate"], found["unit"]
    sys.exit(f"{' '.join(command)}: no rate\n{ran.stderr[-2000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True, help="DOPPEL_CACHE")
    parser.add_argument("--lm", required=True, help="binary of the bench `speed` of lm")
    parser.add_argument("--vote", required=True, help="binary of the bench `speed` of vote")
    parser.add_argument("--pairs", type=int, default=3, help="how often each comparison runs")
    parser.add_argument("--only", default="", help="only comparisons whose name begins with this")
    args = parser.parse_args()
    rows = []
    for name, ours, peer, theirs in comparisons(args):
        if not name.startswith(args.only):
            continue
        pairs = []
        for _ in range(args.pairs):
            (doppel, unit), (other, _) = rate(ours), rate(theirs)
            pairs.append((doppel, other))
        row = {
            "name": name,
            "doppel": statistics.median(pair[0] for pair in pairs),
            "peer": statistics.median(pair[1] for pair in pairs),
            "unit": unit,
            "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 2),
        }
        print(json.dumps(row), flush=True)
        rows.append((row, peer))
    print("\n| work | doppel | peer | unit | ratio | the peer |\n|---|---|---|---|---|---|")
    for row, peer in rows:
        print(f"| {row['name']} | {row['doppel']:.1f} | {row['peer']:.1f} | {row['unit']} | {row['ratio']} | {peer} |")


if __name__ == "__main__":
    main()
