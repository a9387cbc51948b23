"""How doppel grows with the data, each figure as a share of what the disk or the server gives: `infra/scale.sh` calls this.

Partitions generated conversations with n-gram deduplication, writes and reads tables of embeddings on disk and on the S3
server of the tests, and queries a table of texts; a quarter, a half and all of --rows. Beside each stands a plain write
or read of as many bytes in the same minute: `dd conv=fdatasync`, a read of files that the page cache forgot, one plain PUT
or GET for each file. Prints one JSON line per figure, then a table; `growth` is the time for each row beside that of
the smallest size, 1 where time grows as the data do. Fails when partition takes more than 4 GB of memory.
"""

import argparse
import datetime
import hashlib
import hmac
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlparse

PARTS = [1 / 4, 1 / 2, 1]
BLOCK = 8 << 20
# What partition may take, in bytes.
BOUND = 4_000_000_000
REPOSITORY = Path(__file__).parent.parent.parent


def run(command, environment=None):
    """(seconds, (peak memory in bytes, processor seconds), standard output) of a command that must succeed."""
    started = time.perf_counter()
    environment = {**os.environ, "RUST_LOG": "warn", **(environment or {})}
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, env=environment)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {child.returncode}")
    return time.perf_counter() - started, (usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime), output


def forget(files):
    """Writes files to disk and takes them out of the page cache; how long writing took."""
    started = time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return time.perf_counter() - started


def plain_write(folder, size):
    path = folder / "plain"
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}", f"count={max(1, size // BLOCK)}", "conv=fdatasync"]
    seconds = run([*command, "status=none"])[0]
    path.unlink()
    return seconds * size / (max(1, size // BLOCK) * BLOCK)


def plain_read(files):
    forget(files)
    buffer = bytearray(BLOCK)
    started = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return time.perf_counter() - started


class Server:
    """The S3 server of the tests, and plain requests to it, signed by AWS Signature Version 4."""

    def __init__(self, args):
        # It keeps its volumes on the disk that is measured, too.
        environment = {**os.environ, "TMPDIR": str(args.folder)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([args.tool, "server"], env=environment, **pipes)
        told = json.loads(self.process.stdout.readline())
        self.root, self.environment = told["root"], told["environment"]
        self.host = urlparse(self.environment["AWS_ENDPOINT_URL"]).netloc

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def headers(self, method, path):
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        signed = {"host": self.host, "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": now}
        names = ";".join(signed)
        lines = [method, path, "", *(f"{name}:{value}" for name, value in signed.items()), "", names, "UNSIGNED-PAYLOAD"]
        scope = f"{now[:8]}/us-east-1/s3/aws4_request"
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        key = ("AWS4" + self.environment["AWS_SECRET_ACCESS_KEY"]).encode()
        for part in [*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"]:
            key = hmac.digest(key, part.encode(), "sha256")
        credential = f"{self.environment['AWS_ACCESS_KEY_ID']}/{scope}"
        signed["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={key.hex()}"
        )
        return signed

    def request(self, connection, method, name, body=None):
        path = quote(f"/{urlparse(self.root).netloc}/plain/{name}")
        headers = self.headers(method, path)
        if body is not None:
            headers["content-length"] = str(os.fstat(body.fileno()).st_size)
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        while answer.read(BLOCK):
            pass
        if answer.status != 200:
            sys.exit(f"{method} {path}: HTTP {answer.status}")

    def plain(self, method, files):
        connection = http.client.HTTPConnection(self.host, blocksize=1 << 20)
        started = time.perf_counter()
        for index, file in enumerate(files):
            with open(file, "rb") as body:
                self.request(connection, method, f"{index}.parquet", body if method == "PUT" else None)
        return time.perf_counter() - started


class Report:
    """Figures, printed as they come and as a table at the end."""

    def __init__(self):
        self.rows = []

    def add(self, work, amount, unit, size, seconds, plain, ceiling, used):
        peak, processor = used
        first = next((row for row in self.rows if row["work"] == work), None)
        row = {
            "work": work,
            "amount": amount,
            "unit": unit,
            "bytes": size,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(processor, 2),
            "rate": round(amount / seconds),
            "mb_per_s": round(size / seconds / 1e6, 1),
            "of": ceiling,
            "of_mb_per_s": round(size / plain / 1e6, 1),
            "share": round(plain / seconds, 3),
            "growth": round(seconds / amount / (first["seconds"] / first["amount"]), 2) if first else 1.0,
            "peak_mb": round(peak / 1e6),
        }
        print(json.dumps(row), flush=True)
        self.rows.append(row)

    def table(self):
        heads = ["work", "amount", "unit", "seconds", "cpu_seconds", "rate", "mb_per_s", "of", "share", "growth", "peak_mb"]
        print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for row in self.rows:
            print("| " + " | ".join(str(row[head]) for head in heads) + " |")


def partition(args, report):
    raw, lake = args.folder / "conversations.jsonl", args.folder / "partition"
    for part in PARTS:
        rows = int(args.rows * part)
        run([args.tool, "conversations", raw, rows, args.words])
        size = raw.stat().st_size
        plain = plain_read([raw])
        forget([raw])
        flags = [f"--private={lake}", "--run=scale", "--corpus=scale", f"--input={raw}", "--unit-column=id"]
        # What does not fit in memory goes to the disk that is measured.
        seconds, used, _ = run([args.binaries / "doppel-partition", *flags], {"TMPDIR": str(args.folder)})
        report.add("partition, n-grams", rows, "conversations", size, seconds, plain, "plain read", used)
        shutil.rmtree(lake)
    raw.unlink()


def embeddings(args, report):
    lake = args.folder / "lake"
    for part in PARTS:
        rows = int(args.rows * part) // 5
        seconds, used, output = timed([args.tool, "embeddings", lake, rows])
        files = sorted(lake.rglob("*.parquet"))
        size = sum(file.stat().st_size for file in files)
        seconds += forget(files)
        report.add("write embeddings, disk", rows, "rows", size, seconds, plain_write(args.folder, size), "dd conv=fdatasync", used)
        plain = plain_read(files)
        forget(files)
        seconds, used, output = timed([args.tool, "scan", lake])
        if (output["amount"], output["width"]) != (rows, 768):
            sys.exit(f"{rows} rows of 768 were written, but read: {output}")
        report.add("read embeddings, disk", rows, "rows", size, seconds, plain, "plain read", used)
        served(args, report, rows, files, size)
        shutil.rmtree(lake)


def timed(command, environment=None):
    """(seconds as the tool took them, memory and processor time, what it told)"""
    _, used, output = run(command, environment)
    told = json.loads(output)
    return told["seconds"], used, told


def served(args, report, rows, files, size):
    """The same rows on the server, beside plain requests with the very files that the disk got."""
    with Server(args) as server:
        data = [file for file in files if "_delta_log" not in file.parts]
        # The first request makes the server set its volumes up.
        server.plain("PUT", data[:1])
        put, get = server.plain("PUT", data), server.plain("GET", data)
        seconds, used, _ = timed([args.tool, "embeddings", server.root, rows], server.environment)
        report.add("write embeddings, S3", rows, "rows", size, seconds, put, "plain PUT", used)
        seconds, used, _ = timed([args.tool, "scan", server.root], server.environment)
        report.add("read embeddings, S3", rows, "rows", size, seconds, get, "plain GET", used)


def query(args, report):
    lake = args.folder / "lake"
    queries = {
        "query, length_distribution.sql": ["--file", REPOSITORY / "sql/length_distribution.sql"],
        "query, LIKE over texts": ["SELECT count(*) FROM synthetic WHERE text LIKE '%haiku%'"],
        "query, GROUP BY shard and reason": ["SELECT shard, finish_reason, avg(tokens) FROM synthetic GROUP BY 1, 2"],
    }
    for part in PARTS:
        rows = int(args.rows * part) * 2
        timed([args.tool, "synthetic", lake, rows, args.words])
        files = sorted(lake.rglob("*.parquet"))
        size = sum(file.stat().st_size for file in files)
        plain = plain_read(files)
        for name, sql in queries.items():
            forget(files)
            command = [args.binaries / "doppel-query", f"--release={lake}", "--run=scale", "--output=json", *sql]
            seconds, used, _ = run(command)
            report.add(name, rows, "rows", size, seconds, plain, "plain read", used)
        shutil.rmtree(lake)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", required=True, help="binary of the bench `scale` (tests/benches/scale.rs)")
    parser.add_argument("--binaries", type=Path, required=True, help="folder of doppel's binaries")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--words", required=True, help="ShareGPT's file, whose words the texts are made of")
    help = "conversations; a fifth as many embeddings, twice as many rows to query"
    parser.add_argument("--rows", type=int, default=5_000_000, help=help)
    works = {"partition": partition, "embeddings": embeddings, "query": query}
    parser.add_argument("--only", choices=works, help="one of the works")
    args = parser.parse_args()
    report = Report()
    for name, work in works.items():
        if args.only in (None, name):
            work(args, report)
    report.table()
    peak = max((row["peak_mb"] * 1e6 for row in report.rows if row["work"].startswith("partition")), default=0)
    if peak > BOUND:
        sys.exit(f"partition took {peak / 1e9:.1f} GB of memory; at most {BOUND / 1e9:.0f} GB were promised")


if __name__ == "__main__":
    main()
