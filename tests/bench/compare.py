"""doppel beside its peers, in turn, on the same machine in one run: `infra/bench.sh` builds, installs and calls this.

Each comparison runs doppel, then the peer, and so on, and takes the median of the pairs' ratios: on a shared machine
single times say little. Both sides train on, embed and deduplicate the same texts. A peer's batch is halved and doubled
first, for as long as that is faster. Prints one JSON line per comparison, a table, and a plot. `ratio` is above 1 where
doppel is better. `limit` is what the machine's matrix product, measured in the same run, would give if nothing but the
products that the work needs took time; there is none for work of another kind.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Work:
    """One comparison: commands that print JSON, and what of it is compared."""

    name: str
    ours: list
    peer: str
    theirs: list
    # The batch that the peer is tried with first, if it takes one, and the largest.
    batch: int | None = None
    largest: int = 256
    # The kind of matrix product that limits it, if one does.
    dtype: str | None = None
    # The field of the JSON, in MB, that compares memory as well; `peak` is the most that a process held.
    memory: str | None = None
    # A result in both sides' JSON, and by what share of it they may differ.
    same: tuple | None = None

    def their_command(self, batch):
        return [*self.theirs, "--batch", batch] if batch else self.theirs


@dataclass
class Comparison:
    """What was measured of one work."""

    name: str
    peer: str
    unit: str
    less_is_better: bool = False
    flops: float = 0.0
    pairs: list = field(default_factory=list)
    # What both sides found.
    result: dict = field(default_factory=dict)

    def row(self, gflops):
        ratios = [theirs / ours if self.less_is_better else ours / theirs for ours, theirs in self.pairs]
        doppel, peer = (statistics.median(side) for side in zip(*self.pairs))
        limit = gflops * 1e9 / self.flops if self.flops and gflops else None
        return {
            "name": self.name,
            "doppel": significant(doppel),
            "peer": significant(peer),
            "unit": self.unit,
            "ratio": round(statistics.median(ratios), 2),
            "limit": limit and significant(limit),
            "share_of_limit": limit and round(doppel / limit, 2),
            "against": self.peer,
            **self.result,
        }


def significant(number):
    return float(f"{number:.3g}")


def works(args, texts, python):
    if args.shapes:
        yield from llama_works(args, texts, python)
        return
    model, encoder = f"{args.cache}/models/smollm2-135m-instruct", f"{args.cache}/models/all-minilm-l6-v2"

    for dtype in ["bf16", "f32"]:
        kind = ["--dtype", dtype]
        # One logical batch, the same on both sides.
        for length, count, batch in [(128, 256, 8), (1024, 64, 2)]:
            flags = ["--model", model, "--texts", texts, *kind, "--count", count, "--length", length]
            yield Work(
                f"train to {length} tokens, {dtype}",
                [args.train, *flags],
                "Opacus + PEFT",
                [*python, "train", *flags],
                batch=batch,
                dtype=dtype,
                memory="peak",
            )
        yield Work(
            f"sample, {dtype}",
            [args.lm, "sample", model, *kind, "--count", 192],
            "transformers.generate",
            [*python, "sample", *kind, "--model", model, "--count", 128],
            batch=64,
            dtype=dtype,
        )
        yield Work(
            f"embed, {dtype}",
            [args.lm, "embed", encoder, texts, *kind, "--count", 1024],
            "sentence-transformers",
            [*python, "embed", *kind, "--model", encoder, "--texts", texts, "--count", 1024],
            batch=32,
            dtype=dtype,
        )
    step = [args.train, "--model", model, "--texts", texts, "--count", 256, "--length", 128]
    yield Work("train with privacy, bf16", step, "doppel without privacy", [*step, "--no-dp"], dtype="bf16")
    yield Work(
        "sample, bf16, beside decoding",
        [args.lm, "sample", model, "--count", 192],
        "llama.cpp, Q4_1",
        [*python, "decode", "--model", model],
        batch=64,
        dtype="bf16",
    )
    shape = ["--count", 180_000, "--clusters", 1000, "--dimension"]
    yield Work(
        "cluster 180,000 x 256, K = 1000",
        [args.vote, "cluster", 180_000, 256, 1000],
        "faiss",
        [*python, "cluster", *shape, 256],
        dtype="f32",
        memory="peak",
    )
    yield Work(
        "vote 180,000 x 768, K = 1000",
        [args.vote, "vote", 180_000, 768, 1000],
        "scikit-learn + faiss",
        [*python, "vote", *shape, 768],
        dtype="f32",
        memory="peak",
    )
    yield Work(
        "deduplicate by 10-grams, one core",
        [args.partition, texts],
        "NLTK and sets",
        [*python, "dedup", "--texts", texts],
        memory="held",
        # The two cut words differently (src/partition/benches/speed.rs).
        same=("kept", 0.02),
    )
    yield Work("account by PLD", [args.account], "dp-accounting", [*python, "account"], same=("epsilon", 1e-9))
    for stage, imports in [("partition", "nltk"), ("train", "opacus, peft, transformers")]:
        yield Work(
            f"start {stage}",
            ["time", args.binaries / f"doppel-{stage}", "--version"],
            f"import {imports}",
            ["time", sys.executable, "-c", f"import {imports}"],
        )


# Examples of a logical batch, their longest length, and sequences to sample at a time, for models of Llama's shapes.
LLAMA = {"tiny": (64, 128, 64), "7b": (128, 1024, 512), "13b": (256, 128, 256)}


def llama_works(args, texts, python):
    """Models of Llama's shapes and random weights: what a GPU is measured with."""
    device = ["--device", args.device]
    for shape in args.shapes.split(","):
        count, length, sequences = LLAMA[shape]
        folder = args.models / shape
        if not folder.exists():
            source = f"{args.cache}/models/smollm2-135m-instruct"
            run([*python, "model", "--model", source, "--shape", shape, "--out", folder, *device])
        flags = ["--model", folder, "--texts", texts, "--count", count, "--length", length]
        yield Work(
            f"train {shape} to {length} tokens, bf16",
            [args.train, *flags],
            "Opacus + PEFT",
            [*python, "train", *device, *flags],
            batch=4,
            dtype="bf16",
            # Of a GPU's memory the process knows nothing here.
            memory="peak" if args.device == "cpu" else None,
        )
        yield Work(
            f"sample {shape}, bf16",
            [args.lm, "sample", folder, "--count", 4 * sequences, "--batch", sequences],
            "transformers.generate",
            [*python, "sample", *device, "--model", folder, "--count", sequences],
            batch=sequences,
            largest=sequences,
            dtype="bf16",
        )


def run(command):
    """What the command printed as JSON, all lines together, and the most memory that it held."""
    if command[0] == "time":
        return {"rate": 1 / min(seconds(command[1:]) for _ in range(5)), "unit": "starts/s"}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, text=True)
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(map(str, command))}: exit code {child.returncode}\n{errors.read()[-2000:]}")
    found = {"peak": usage.ru_maxrss / 1024}
    for line in output.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def seconds(command):
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def compare(work, pairs):
    """The rate, and the memory if that is compared."""
    batch, first = best(work)
    peer = f"{work.peer}, batch {batch}" if batch else work.peer
    rate, memory = Comparison(work.name, peer, ""), Comparison(f"{work.name}: memory", peer, "MB", less_is_better=True)
    for index in range(pairs):
        ours, theirs = run(work.ours), first if index == 0 else run(work.their_command(batch))
        rate.unit, rate.flops = ours["unit"], ours.get("flops", 0)
        rate.pairs.append((ours["rate"], theirs["rate"]))
        if work.same:
            name, tolerance = work.same
            found, expected = ours[name], theirs[name]
            if not math.isclose(found, expected, rel_tol=tolerance):
                sys.exit(f"{work.name}: {name}: doppel found {found}, {work.peer} {expected}")
            rate.result = {name: {"doppel": found, "peer": expected}}
        if work.memory:
            memory.pairs.append((ours[work.memory], theirs[work.memory]))
    return [rate, memory] if work.memory else [rate]


def best(work):
    """The peer's batch of the highest rate, and what it gave: half of it and twice it are slower. Those within a tenth of
    it run a second time before that is believed, and the better run of a batch counts."""
    tried, untried = {}, [work.batch]
    while untried:
        for batch in untried:
            tried.setdefault(batch, []).append(attempt(work.their_command(batch)))
        rates = {batch: max(found["rate"] for found in runs) for batch, runs in tried.items()}
        fastest = max(rates, key=rates.get)
        neighbours = [fastest // 2, fastest * 2] if fastest else []
        untried = [batch for batch in neighbours if 1 <= batch <= work.largest and batch not in tried]
        close = [batch for batch in neighbours if rates.get(batch, 0) > 0.9 * rates[fastest]]
        if close and not untried:
            untried = [batch for batch in [fastest, *close] if len(tried[batch]) == 1]
    if not rates[fastest]:
        sys.exit(f"{work.name}: {work.peer} failed")
    return fastest, max(tried[fastest], key=lambda found: found["rate"])


def attempt(command):
    """What the command gave; a rate of 0 where it failed, as a batch does that does not fit in memory."""
    try:
        return run(command)
    except SystemExit as failure:
        print(failure, file=sys.stderr)
        return {"rate": 0}


def table(rows):
    heads = ["name", "doppel", "peer", "unit", "ratio", "limit", "share_of_limit", "against"]
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        cells = [f"{row[head]:,.6g}" if isinstance(row[head], float) else row[head] for head in heads]
        print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")


def plot(rows):
    """Ratios on a logarithmic scale, so that twice as good and half as good look alike."""
    octave, left, right = 8, 2, 7
    width = max(len(row["name"]) for row in rows)
    ticks = "".join(f"{f'{2.0**power:g}x':<{octave}}" for power in range(-left, right + 1))
    print(f"\n{'':{width}}  {ticks.rstrip()}")
    for row in rows:
        end = round(octave * min(max(math.log2(row["ratio"]), -left), right))
        bar = " " * (octave * left + min(end, 0)) + "█" * max(abs(end), 1)
        print(f"{row['name']:{width}}  {bar}  {row['ratio']:g}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="DOPPEL_CACHE")
    parser.add_argument("--train", required=True, help="binary of the bench `speed` of train")
    parser.add_argument("--lm", required=True, help="binary of the bench `speed` of lm")
    parser.add_argument("--vote", required=True, help="binary of the bench `speed` of vote")
    parser.add_argument("--partition", required=True, help="binary of the bench `speed` of partition")
    parser.add_argument("--account", required=True, help="binary of the bench `account` of privacy")
    parser.add_argument("--binaries", required=True, type=Path, help="folder of doppel's binaries")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shapes", help="measure models of these shapes of Llama, with random weights: tiny, 7b, 13b (with a GPU: 7b,13b)"
    )
    parser.add_argument("--models", type=Path, help="where these are kept")
    parser.add_argument("--pairs", type=int, default=3, help="how often each comparison runs")
    parser.add_argument("--only", default="", help="only comparisons whose name begins with this")
    args = parser.parse_args()
    if args.shapes is None and args.device == "cuda":
        args.shapes = "7b,13b"
    args.models = args.models or Path(args.cache, "bench-models")
    rows, limits = [], {}
    with tempfile.NamedTemporaryFile(suffix=".json") as texts:
        peers = [sys.executable, HERE / "peers.py"]
        run([*peers, "texts", "--data", f"{args.cache}/data/sharegpt.json", "--texts", texts.name])
        for work in works(args, texts.name, peers):
            if not work.name.startswith(args.only):
                continue
            if work.dtype and work.dtype not in limits:
                limits[work.dtype] = run([*peers, "matmul", "--dtype", work.dtype, "--device", args.device])["rate"]
                print(json.dumps({"matmul": work.dtype, "gflops": round(limits[work.dtype])}), flush=True)
            for comparison in compare(work, args.pairs):
                row = comparison.row(limits.get(work.dtype))
                print(json.dumps(row), flush=True)
                rows.append(row)
    if rows:
        table(rows)
        plot(rows)


if __name__ == "__main__":
    main()
