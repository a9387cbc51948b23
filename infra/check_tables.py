"""Checks that readers which are not ours read every table of a lake, in every version, with the right types and rows.

    check_tables.py LAKE

LAKE holds private/ and release/, as `tiny_lake` writes them (tests/examples). deltalake and polars read each version of
each table; DuckDB reads the Parquet files of the latest, which deltalake names; pyarrow reads embeddings from the files
themselves. At the end columns of other types are put into copies of a table, each of which must be noticed: a check that
cannot fail says nothing. Packages are pinned in downloads-python.txt.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import duckdb
import polars
import pyarrow
import pyarrow.parquet
from deltalake import DeltaTable, write_deltalake

# The contract that readers rely on, written down a second time: src/lake/src/schema.rs says the same in Rust.
STRING, INT, LONG, FLOAT, DOUBLE = "string", "int32", "int64", "float", "double"
EMBEDDING = "list<element: float not null>"
TABLES = {
    "corpus": {"record_id": STRING, "unit": STRING, "text": STRING, "split": STRING},
    "private embeddings": {"id": STRING, "unit": STRING, "split": STRING, "embedding": EMBEDDING},
    "loss": {"step": LONG, "split": STRING, "loss": DOUBLE},
    "comparison": {"set": STRING, "total_variation": DOUBLE},
    "comparison_bins": {"bin": INT, "set": STRING, "count": LONG, "share": DOUBLE},
    "synthetic": {
        "id": STRING,
        "shard": INT,
        "seed": LONG,
        "text": STRING,
        "tokens": INT,
        "finish_reason": STRING,
        "mean_logprob": FLOAT,
    },
    "embeddings": {"id": STRING, "embedding": EMBEDDING},
    "clusters": {"id": STRING, "bin": INT, "distance": FLOAT},
    "histogram": {"bin": INT, "noisy_count": LONG, "synthetic_count": LONG, "selected_count": LONG},
    "selected": {"id": STRING, "text": STRING, "bin": INT},
}
POLARS = {
    STRING: polars.String,
    INT: polars.Int32,
    LONG: polars.Int64,
    FLOAT: polars.Float32,
    DOUBLE: polars.Float64,
    EMBEDDING: polars.List(polars.Float32),
}
DUCKDB = {STRING: "VARCHAR", INT: "INTEGER", LONG: "BIGINT", FLOAT: "FLOAT", DOUBLE: "DOUBLE", EMBEDDING: "FLOAT[]"}


def tables(lake):
    """(which of TABLES, where) of every table in the lake."""
    for log in sorted(lake.rglob("_delta_log")):
        path = log.parent
        zone, kind = path.relative_to(lake).parts[0], path.name
        if path.parent.name == "corpora":
            kind = "corpus"
        elif zone == "private" and "embeddings" in path.parts:
            kind = "private embeddings"
        yield kind, path


def differences(who, found, expected):
    if found != expected:
        yield f"{who}: columns {found}, expected {expected}"


def check_version(path, version, expected):
    """Findings in a version, and its rows as deltalake reads them."""
    table = DeltaTable(path, version=version).to_pyarrow_table()
    found = {field.name: str(field.type) for field in table.schema}
    findings = list(differences("deltalake", found, expected))
    findings += [f"deltalake: {field.name} may be null" for field in table.schema if field.nullable]
    findings += [f"deltalake: {name} has nulls" for name in table.column_names if table[name].null_count]
    frame = polars.read_delta(str(path), version=version)
    findings += differences("polars", dict(frame.schema), {name: POLARS[kind] for name, kind in expected.items()})
    if frame.height != table.num_rows:
        findings.append(f"polars: {frame.height} rows, deltalake: {table.num_rows}")
    if not frame.equals(polars.from_arrow(table)):
        findings.append("polars: other values than deltalake")
    return findings, table.num_rows


def check_files(path, expected, rows):
    """The Parquet files of the latest version, whatever else lies in the folder."""
    files = [unquote(file.removeprefix("file://")) for file in DeltaTable(path).file_uris()]
    if not files:
        return
    read = duckdb.read_parquet(files)
    yield from differences(
        "DuckDB",
        {name: str(kind) for name, kind in zip(read.columns, read.types)},
        {name: DUCKDB[kind] for name, kind in expected.items()},
    )
    found = read.count("*").fetchall()[0][0]
    if found != rows:
        yield f"DuckDB: {found} rows, deltalake: {rows}"
    widths = set()
    for file in files if EMBEDDING in expected.values() else []:
        column = pyarrow.parquet.ParquetFile(file).read(columns=["embedding"])["embedding"]
        if not pyarrow.types.is_list(column.type) or column.type.value_type != pyarrow.float32():
            yield f"pyarrow: embedding is {column.type}, expected a list of float32"
        widths |= {len(row) for row in column.to_pylist()}
    if len(widths) > 1:
        yield f"pyarrow: embeddings of different lengths: {sorted(widths)}"


def check_table(kind, path):
    """Findings in a table, and the rows of each version."""
    if kind not in TABLES:
        return [f"a table that this check does not know; expected one of {', '.join(TABLES)}"], []
    findings, rows = [], []
    for version in range(DeltaTable(path).version() + 1):
        found, count = check_version(path, version, TABLES[kind])
        findings += found
        rows.append(count)
    if rows != sorted(rows):
        findings.append(f"rows fall from one version to the next: {rows}")
    return [*findings, *check_files(path, TABLES[kind], rows[-1])], rows


def check_lake(lake):
    """Findings in the whole lake, and rows by table and version."""
    findings, rows = [], {}
    for kind, path in tables(lake):
        found, rows[kind] = check_table(kind, path)
        findings += [f"{path.relative_to(lake)}: {line}" for line in found]
    findings += [f"{kind}: no such table" for kind in TABLES if kind not in rows]
    findings += [f"{kind}: no row" for kind, versions in rows.items() if not versions or versions[-1] == 0]
    latest = {kind: versions[-1] for kind, versions in rows.items() if versions}
    for one, other in [("corpus", "private embeddings"), ("synthetic", "embeddings"), ("synthetic", "clusters")]:
        if latest.get(one) != latest.get(other):
            findings.append(f"{one} has {latest.get(one)} rows, {other} {latest.get(other)}")
    return findings, rows


def broken(path, folder):
    """Copies of a table, each with a column of another type."""
    table = DeltaTable(path).to_pyarrow_table()
    for name in table.column_names:
        column = table[name]
        if pyarrow.types.is_list(column.type):
            other = column.cast(pyarrow.list_(pyarrow.float64()))
        elif pyarrow.types.is_floating(column.type):
            other = column.cast(pyarrow.float32() if column.type == pyarrow.float64() else pyarrow.float64())
        elif column.type == pyarrow.int64():
            other = column.cast(pyarrow.string())
        elif column.type == pyarrow.int32():
            other = column.cast(pyarrow.int64())
        else:
            other = column.cast(pyarrow.binary())
        at = table.column_names.index(name)
        copy = Path(folder) / name
        write_deltalake(str(copy), table.set_column(at, pyarrow.field(name, other.type, False), other))
        yield name, copy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lake", type=Path)
    lake = parser.parse_args().lake
    findings, rows = check_lake(lake)
    for kind, path in tables(lake):
        with tempfile.TemporaryDirectory() as folder:
            for name, copy in broken(path, folder):
                if not check_table(kind, copy)[0]:
                    findings.append(f"{kind}: a column {name} of another type was not noticed")
    for line in findings:
        print(line, file=sys.stderr)
    if findings:
        sys.exit(1)
    for kind, versions in rows.items():
        print(f"{kind}: deltalake, polars and DuckDB read {json.dumps(versions)} rows by version")


if __name__ == "__main__":
    main()
