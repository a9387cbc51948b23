//! The command line's contract: what goes to which stream, and which exit code says what.

use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Float32Array, Int32Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use assert_cmd::Command;
use lake::{AppTransaction, Begin, Claim, Output, ReleaseRoot, StorageOptions, Zone, manifest};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::json;

/// A release root with run `demo`: table `synthetic` in two versions, and `embeddings`.
fn release() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(write(folder.path()));
    folder
}

async fn write(folder: &Path) {
    let options = StorageOptions { timeout: Duration::from_secs(30) };
    let root = ReleaseRoot::open(&folder.display().to_string(), &options).await.unwrap();
    for (chunk, (id, text, tokens)) in [("a", "one, \"two\"", 3), ("b", "three\nfour", 5)].into_iter().enumerate() {
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("id", Arc::new(StringArray::from(vec![id]))),
            ("text", Arc::new(StringArray::from(vec![text]))),
            ("tokens", Arc::new(Int32Array::from(vec![tokens]))),
        ];
        append(&root, "synthetic", RecordBatch::try_from_iter(columns).unwrap(), chunk as i64).await;
    }
    let element = Arc::new(Field::new("element", DataType::Float32, false));
    let fields = vec![Field::new("id", DataType::Utf8, false), Field::new_list("embedding", element.clone(), false)];
    let lists = ListArray::new(
        element,
        OffsetBuffer::from_lengths([2, 2]),
        Arc::new(Float32Array::from(vec![1.0, 0.0, 0.6, 0.8])),
        None,
    );
    let columns: Vec<ArrayRef> = vec![Arc::new(StringArray::from(vec!["a", "b"])), Arc::new(lists)];
    append(&root, "embeddings", RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap(), 0).await;
}

async fn append(root: &ReleaseRoot, name: &str, batch: RecordBatch, version: i64) {
    let table = root.table(&format!("runs/demo/{name}"));
    table.create(batch.schema()).await.unwrap();
    table.append(vec![batch], AppTransaction { id: format!("test/{name}"), version }).await.unwrap();
}

fn query(release: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("doppel-query").unwrap();
    for variable in ["DOPPEL_RUN", "DOPPEL_RELEASE", "DOPPEL_PRIVATE", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command.arg("--release").arg(release).args(arguments);
    command
}

#[track_caller]
fn succeeds(release: &Path, arguments: &[&str]) -> String {
    let output = query(release, arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Fails with `exit_code`, says each of `expected` on standard error, and prints no data.
#[track_caller]
fn fails(release: &Path, arguments: &[&str], exit_code: i32, expected: &[&str]) {
    let output = query(release, arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(exit_code), "{arguments:?}: {error}");
    for text in expected {
        assert!(error.contains(text), "{arguments:?}: expected {text:?} in: {error}");
    }
    assert!(output.stdout.is_empty(), "{arguments:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn every_form_of_output_carries_the_same_rows() {
    let release = release();
    let sql = "SELECT id, text, tokens FROM synthetic ORDER BY id";
    let rows = |output| succeeds(release.path(), &["--run", "demo", "--output", output, sql]);
    assert_eq!(rows("csv"), "id,text,tokens\na,\"one, \"\"two\"\"\",3\nb,\"three\nfour\",5\n");
    assert_eq!(
        rows("json"),
        "[{\"id\":\"a\",\"text\":\"one, \\\"two\\\"\",\"tokens\":3},{\"id\":\"b\",\"text\":\"three\\nfour\",\"tokens\":5}]\n"
    );
    assert!(rows("table").contains("| a  | one, \"two\" | 3      |"), "{}", rows("table"));
    let file = release.path().join("rows.parquet");
    std::fs::write(
        &file,
        query(release.path(), &["--run", "demo", "--output", "parquet", sql]).output().unwrap().stdout,
    )
    .unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(&file).unwrap()).unwrap();
    let batches: Vec<RecordBatch> = reader.build().unwrap().map(Result::unwrap).collect();
    let shown = arrow::util::pretty::pretty_format_batches(&batches).unwrap().to_string();
    assert_eq!(format!("{shown}\n"), rows("table"));
}

#[test]
fn an_interval_is_refused_where_parquet_cannot_hold_it() {
    let release = release();
    let sql = "SELECT INTERVAL '1 day' AS wait";
    fails(release.path(), &["--output", "parquet", sql], 2, &["column wait is an interval", "help:"]);
    fails(release.path(), &["--output", "parquet", "SELECT [INTERVAL '1 day'] AS w"], 2, &["column w", "help:"]);
    assert_eq!(succeeds(release.path(), &["--output", "csv", sql]), "wait\n1 days\n");
}

#[test]
fn no_rows_are_still_a_result() {
    let release = release();
    let rows = |output| {
        succeeds(release.path(), &["--run", "demo", "--output", output, "SELECT id FROM synthetic WHERE tokens > 9"])
    };
    assert_eq!(rows("csv"), "id\n");
    assert_eq!(rows("json"), "[]\n");
    assert!(rows("table").contains("| id |"));
}

#[test]
fn rows_go_to_a_file_that_appears_whole() {
    let release = release();
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("rows.csv");
    let to = file.to_str().unwrap();
    let sql = "SELECT tokens FROM synthetic ORDER BY 1";
    assert_eq!(succeeds(release.path(), &["--run", "demo", "--output", "csv", "--to", to, sql]), "");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "tokens\n3\n5\n");

    let failing = "SELECT 1 / (tokens - 5) FROM synthetic";
    fails(release.path(), &["--run", "demo", "--output", "csv", "--to", to, failing], 2, &["ivide by zero", "help:"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "tokens\n3\n5\n", "a failed query leaves the file alone");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1, "and nothing beside it");

    for (to, code) in [("/nowhere/rows", 3), ("/sys/rows", 3), ("/dev/null/rows", 2), (out.path().to_str().unwrap(), 2)]
    {
        fails(release.path(), &["--run", "demo", "--to", to, sql], code, &[to, "help:"]);
    }
    for folder in [".", "..", "/"] {
        fails(release.path(), &["--run", "demo", "--to", folder, sql], 2, &["a folder is there", "help:"]);
    }
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1, "a folder as target leaves nothing in it");
    let siblings = std::fs::read_dir(out.path().parent().unwrap()).unwrap().flatten();
    let partial =
        |name: &str| name.starts_with(out.path().file_name().unwrap().to_str().unwrap()) && name.ends_with(".partial");
    assert!(!siblings.into_iter().any(|entry| partial(&entry.file_name().to_string_lossy())), "nor beside it");
}

#[test]
fn a_file_that_is_replaced_keeps_its_permissions_and_the_links_to_it() {
    let release = release();
    let out = tempfile::tempdir().unwrap();
    let [file, link] = ["rows.csv", "latest.csv"].map(|name| out.path().join(name));
    std::fs::write(&file, "older").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o660)).unwrap();
    symlink("rows.csv", &link).unwrap();
    let sql = "SELECT tokens FROM synthetic ORDER BY 1";
    succeeds(release.path(), &["--run", "demo", "--output", "csv", "--to", link.to_str().unwrap(), sql]);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "tokens\n3\n5\n");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 2, "nothing is left beside them");
}

#[test]
fn a_named_pipe_is_written_to_and_stays() {
    let release = release();
    let out = tempfile::tempdir().unwrap();
    let pipe = out.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Open for both, so that neither side waits for the other.
    let mut reader = std::fs::File::options().read(true).write(true).open(&pipe).unwrap();
    let sql = "SELECT tokens FROM synthetic ORDER BY 1";
    succeeds(release.path(), &["--run", "demo", "--output", "csv", "--to", pipe.to_str().unwrap(), sql]);
    assert!(pipe.metadata().unwrap().file_type().is_fifo(), "a file took its place");
    let mut rows = [0; 11];
    reader.read_exact(&mut rows).unwrap();
    assert_eq!(&rows, b"tokens\n3\n5\n");
}

#[test]
fn two_columns_of_one_name_are_only_for_people() {
    let release = release();
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("rows");
    let on = "SELECT * FROM synthetic JOIN embeddings ON synthetic.id = embeddings.id";
    for output in ["csv", "json", "parquet"] {
        let arguments = ["--run", "demo", "--output", output, "--to", to.to_str().unwrap(), on];
        fails(release.path(), &arguments, 2, &["two columns have the name id", "help:", "AS", "USING (id)"]);
        assert!(!to.exists(), "{output}");
    }
    succeeds(release.path(), &["--run", "demo", on]);
    let using = "SELECT * FROM synthetic JOIN embeddings USING (id)";
    let rows = succeeds(release.path(), &["--run", "demo", "--output", "json", using]);
    assert_eq!(rows.matches("\"id\":").count(), 2, "{rows}");
}

#[test]
fn a_full_disk_behind_standard_output_may_be_tried_again() {
    let release = release();
    for output in ["table", "csv", "json", "parquet"] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let ran = std::process::Command::new(env!("CARGO_BIN_EXE_doppel-query"))
            .args(["--run", "demo", "--output", output, "SELECT * FROM synthetic", "--release"])
            .arg(release.path())
            .stdout(full)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(5), "{output}: {error}");
        assert!(error.contains("standard output") && error.contains("help:"), "{output}: {error}");
    }
}

#[test]
fn sql_comes_from_a_file_or_standard_input() {
    let release = release();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("count.sql");
    std::fs::write(&file, "-- How many?\nSELECT count(*) AS n FROM synthetic;\n").unwrap();
    let arguments = ["--run", "demo", "--output", "csv", "--file"];
    assert_eq!(succeeds(release.path(), &[&arguments[..], &[file.to_str().unwrap()]].concat()), "n\n2\n");
    let piped =
        query(release.path(), &[&arguments[..], &["-"]].concat()).write_stdin("SELECT 7 AS n").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&piped.stdout), "n\n7\n");
    fails(release.path(), &[&arguments[..], &["/nowhere.sql"]].concat(), 3, &["/nowhere.sql"]);
}

#[test]
fn older_versions_and_other_runs_have_names() {
    let release = release();
    let count = |arguments: &[&str], table: &str| {
        let sql = format!("SELECT count(*) AS n FROM {table}");
        succeeds(release.path(), &[arguments, &["--output", "csv", &sql]].concat())
    };
    assert_eq!(count(&["--run", "demo"], "synthetic"), "n\n2\n");
    assert_eq!(count(&["--run", "demo", "--at", "synthetic=1"], "synthetic"), "n\n1\n");
    assert_eq!(count(&[], "\"demo\".synthetic"), "n\n2\n");
    assert_eq!(count(&["--at", "demo.synthetic=1"], "demo.synthetic"), "n\n1\n");
    assert_eq!(count(&["--alias", "base=demo", "--at", "base.synthetic=1"], "base.synthetic"), "n\n1\n");
    fails(
        release.path(),
        &["--run", "demo", "--at", "synthetic=9", "SELECT 1 FROM synthetic"],
        3,
        &["no version 9", "the latest is 2"],
    );
}

#[test]
fn an_alias_does_not_hide_a_run() {
    let release = release();
    let sql = "SELECT count(*) FROM synthetic";
    fails(release.path(), &["--run", "base", "--alias", "base=demo", sql], 2, &["--alias base=demo", "--run", "help:"]);
    let other = ["--alias", "demo=other", "SELECT count(*) FROM demo.synthetic"];
    fails(release.path(), &other, 2, &["--alias demo=other", "the id of a run", "help:"]);
}

#[test]
fn a_pin_that_would_not_hold_is_refused() {
    let release = release();
    let fails = |flags: &[&str], expected: &[&str]| {
        fails(release.path(), &[flags, &["SELECT count(*) FROM demo.synthetic"]].concat(), 2, expected);
    };
    fails(&["--run", "demo", "--at", "embeddings=1"], &["--at demo.embeddings=1", "does not read that table", "help:"]);
    fails(&["--run", "demo", "--at", "sinthetic=1"], &["demo.sinthetic=1", "help:"]);
    fails(&["--at", "dmeo.synthetic=1"], &["dmeo.synthetic=1", "help:"]);
    fails(&["--run", "demo", "--at", "runs=1"], &["demo.runs=1", "help:"]);
    fails(&["--at", "synthetic=1"], &["of which run", "help:"]);
    fails(&["--run", "demo", "--at", "synthetic=1", "--at", "synthetic=2"], &["demo.synthetic", "twice", "help:"]);
    let alias = ["--run", "demo", "--alias", "base=demo", "--at", "synthetic=1", "--at", "base.synthetic=1"];
    fails(&alias, &["demo.synthetic", "twice"]);
}

#[test]
fn embeddings_can_be_compared() {
    let release = release();
    let sql = "SELECT round(cosine_similarity(a.embedding, b.embedding), 4) AS similarity \
               FROM embeddings a JOIN embeddings b ON a.id < b.id";
    assert_eq!(succeeds(release.path(), &["--run", "demo", "--output", "csv", sql]), "similarity\n0.6\n");
    fails(
        release.path(),
        &["--run", "demo", "--output", "csv", "SELECT * FROM embeddings"],
        2,
        &["column embedding is a list", "help:"],
    );
}

#[test]
fn only_queries_pass() {
    let release = release();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("stolen.csv");
    let target = target.to_str().unwrap();
    for sql in [
        &format!("COPY synthetic TO '{target}'"),
        &format!("EXPLAIN ANALYZE COPY synthetic TO '{target}'"),
        &format!("CREATE EXTERNAL TABLE t STORED AS CSV LOCATION '{target}'"),
        "CREATE TABLE t AS SELECT 1",
        "CREATE VIEW v AS SELECT 1",
        "SELECT * INTO t FROM synthetic",
        "EXPLAIN SELECT * INTO t FROM synthetic",
        "SELECT '1' UNION SELECT id INTO t FROM synthetic",
        "WITH x AS (SELECT id INTO t FROM synthetic) SELECT * FROM x",
        "SELECT * FROM (SELECT id INTO t FROM synthetic)",
        "SELECT (SELECT max(id) INTO t FROM synthetic)",
        "WITH x AS (SELECT 1) INSERT INTO synthetic SELECT * FROM x",
        "INSERT INTO synthetic SELECT * FROM synthetic",
        "DELETE FROM synthetic",
        "UPDATE synthetic SET tokens = 0",
        "DROP TABLE synthetic",
        "SET datafusion.execution.batch_size = 1",
    ] {
        fails(release.path(), &["--run", "demo", sql], 2, &["read-only", "help:"]);
    }
    assert!(!Path::new(target).exists());
    for sql in ["DESCRIBE synthetic", "EXPLAIN SELECT * FROM synthetic", "SHOW TABLES"] {
        succeeds(release.path(), &["--run", "demo", sql]);
    }
}

#[test]
fn other_files_are_not_tables() {
    let release = release();
    let file = release.path().join("secret.csv");
    std::fs::write(&file, "a\n1\n").unwrap();
    let sql = format!("SELECT * FROM '{}'", file.display());
    fails(release.path(), &["--run", "demo", &sql], 3, &["not the name of a table or run"]);
    fails(release.path(), &["SELECT * FROM \"../private\".corpus"], 3, &["not the name of a table or run"]);
}

#[test]
fn mistakes_are_told_with_what_was_meant() {
    let release = release();
    let run = ["--run", "demo"];
    let fails =
        |sql: &str, code, expected: &[&str]| fails(release.path(), &[&run[..], &[sql]].concat(), code, expected);
    fails("SELECT * FROM sinthetic", 3, &["did you mean synthetic?", "it has embeddings, synthetic"]);
    fails("SELECT * FROM dmeo.synthetic", 3, &["no run dmeo", "did you mean demo?"]);
    fails("SELECT token FROM synthetic", 2, &["token", "tokens"]);
    fails("SELEC 1", 2, &["not valid SQL", "SELEC"]);
    fails("SELECT 1; SELECT 2", 2, &["single SQL statement"]);
    fails("SELECT nosuch(1)", 2, &["nosuch", "help:"]);
}

#[test]
fn what_is_missing_is_named() {
    let release = release();
    fails(release.path(), &["SELECT * FROM synthetic"], 3, &["no run is named", "--run", "demo"]);
    let empty = tempfile::tempdir().unwrap();
    fails(empty.path(), &["--run", "demo", "SELECT * FROM synthetic"], 3, &["no run demo", "no tables of any run yet"]);
    let mut command = Command::cargo_bin("doppel-query").unwrap();
    let output = command.env_remove("DOPPEL_RELEASE").arg("SELECT 1").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("DOPPEL_RELEASE"));
}

#[test]
fn a_root_without_any_run_is_not_taken_for_one_that_released_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mistyped = folder.path().join("relaese");
    for sql in ["SELECT * FROM releases", "SELECT * FROM runs", "SHOW TABLES"] {
        fails(&mistyped, &[sql], 3, &["relaese", "no run is there", "help:"]);
    }
}

#[test]
fn a_run_without_tables_is_not_its_own_correction() {
    let release = release();
    std::fs::create_dir_all(release.path().join("runs/t1/adapter")).unwrap();
    std::fs::write(release.path().join("runs/t1/adapter/adapter_config.json"), "{}").unwrap();
    fails(release.path(), &["SELECT * FROM t1.synthetic"], 3, &["run t1 has no tables yet", "has tables of demo"]);
    fails(release.path(), &["SELECT * FROM t2.synthetic"], 3, &["no run t2 has tables here\n", "has tables of demo"]);
}

#[test]
fn what_a_value_does_not_allow_is_the_querys_fault() {
    let release = release();
    for (sql, expected) in [
        ("SELECT 1 / 0", "ivide by zero"),
        ("SELECT CAST('x' AS INT)", "Cannot cast string 'x'"),
        ("SELECT CAST(text AS INT) FROM synthetic", "Cannot cast string"),
        ("SELECT word_ngrams('a b c', 0)", "at least 1, found 0"),
        ("SELECT count(*) FROM synthetic WHERE text ~ '('", "regex parse error"),
        ("SELECT now() AT TIME ZONE 'Mars/X'", "Mars/X"),
    ] {
        fails(release.path(), &["--run", "demo", sql], 2, &[expected, "help:", "try_cast"]);
    }
}

#[test]
fn tables_of_all_runs_are_not_read_as_those_of_one() {
    let release = release();
    for sql in
        ["SELECT * FROM demo.releases", "SELECT 1 WHERE EXISTS (SELECT * FROM \"nosuch\".RUNS)", "DESCRIBE demo.stages"]
    {
        fails(release.path(), &["--run", "demo", sql], 2, &["tells of all runs", "help: write ", "column `run`"]);
    }
}

#[test]
fn a_query_may_be_long_but_not_deep() {
    let release = release();
    let told = |sql: &str| {
        let mut command = query(release.path(), &["--run", "demo", "--output", "csv", "--file", "-"]);
        let output = command.write_stdin(sql).output().unwrap();
        let [out, error] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), out, error)
    };
    let row = |count: usize, between: &str, term: &str| vec![term; count].join(between);
    let likes = |count| format!("SELECT count(*) FROM synthetic WHERE {}", row(count, " OR ", "text LIKE '%nosuch%'"));
    let selects = |count| row(count, " UNION ALL ", "SELECT 1");
    let many = format!("SELECT count(*) AS n FROM synthetic WHERE text IN ({})", row(12_000, ", ", "'nosuch'"));
    let (code, out, error) = told(&many);
    assert_eq!((code, out.as_str()), (Some(0), "n\n0\n"), "{error}");
    for deep in [likes(600), format!("SELECT {}", row(900, "+", "1"))] {
        let (code, out, error) = told(&deep);
        assert_eq!((code, out.lines().count()), (Some(0), 2), "{error}");
    }
    for (refused, expected) in [
        (likes(1_100), "more than 1000 expressions within each other"),
        (format!("SELECT {}", row(200_000, "+", "1")), "more than 1000 expressions within each other"),
        (selects(1_001), "more than 1000 SELECTs"),
        (many.replace("(", &format!("({}, ", row(38_001, ", ", "1"))), "more than 50000 values"),
        (selects(20_000), "more than 1000 SELECTs"),
    ] {
        let (code, out, error) = told(&refused);
        assert!(code == Some(2) && out.is_empty() && error.contains(expected), "{code:?}: {error}");
    }
}

#[test]
fn a_data_file_that_is_not_there_is_named() {
    let release = release();
    for entry in std::fs::read_dir(release.path().join("runs/demo/synthetic")).unwrap().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "parquet") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    let expected = ["runs/demo/synthetic/", ".parquet: not there, damaged or cut short", "help: restore the file"];
    fails(release.path(), &["--run", "demo", "SELECT text FROM synthetic"], 3, &expected);
}

#[test]
fn a_dropped_run_stays_on_record_as_dropped() {
    let release = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = StorageOptions { timeout: Duration::from_secs(30) };
        let root = ReleaseRoot::open(&release.path().display().to_string(), &options).await.unwrap();
        for run in ["kept", "gone"] {
            train(&root, run).await;
        }
        manifest::close(&root, "gone").await.unwrap();
    });
    for table in ["runs", "releases"] {
        let sql = format!("SELECT run, dropped FROM {table} ORDER BY run");
        assert_eq!(
            succeeds(release.path(), &["--output", "csv", &sql]),
            "run,dropped\ngone,true\nkept,false\n",
            "{table}"
        );
    }
}

/// A stage that released an adapter.
async fn train(root: &ReleaseRoot, run: &str) {
    let claim = Claim {
        run: run.into(),
        stage: "train".into(),
        shard: None,
        inputs: Vec::new(),
        config: json!({}),
        seeds: Vec::new(),
        binary: "doppel-train 0.1.0".into(),
        started: chrono::DateTime::UNIX_EPOCH,
        command: Vec::new(),
    };
    let Begin::Fresh(handle) = manifest::begin(root, claim).await.unwrap() else { panic!("{run} is there already") };
    let adapter = Output { name: "adapter".into(), path: format!("runs/{run}/adapter"), version: None };
    handle.finish(vec![adapter], json!({ "events": [{ "kind": "discrete_gaussian" }] })).await.unwrap();
}

#[test]
fn table_functions_are_not_taken_for_tables() {
    let release = release();
    let counted = succeeds(release.path(), &["--output", "csv", "SELECT count(*) AS n FROM generate_series(1, 9)"]);
    assert_eq!(counted, "n\n9\n");
}

#[test]
fn the_tables_of_all_runs_are_listed() {
    let release = release();
    let listed = succeeds(release.path(), &["--output", "csv", "SHOW TABLES"]);
    assert_eq!(listed, "run,name,version\ndemo,embeddings,1\ndemo,synthetic,2\n");
    // All rows would not be the answer to this.
    fails(release.path(), &["SHOW TABLES LIKE 'emb%'"], 2, &["SHOW TABLES"]);
}

#[test]
fn a_selection_from_another_table_is_counted_without_its_tokens() {
    let release = release();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("id", Arc::new(StringArray::from(vec!["x", "y"]))),
        ("text", Arc::new(StringArray::from(vec!["four", "three"]))),
    ];
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = StorageOptions { timeout: Duration::from_secs(30) };
        let root = ReleaseRoot::open(&release.path().display().to_string(), &options).await.unwrap();
        append(&root, "selected", RecordBatch::try_from_iter(columns).unwrap(), 0).await;
    });
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../sql/token_totals.sql");
    let totals = succeeds(release.path(), &["--run", "demo", "--file", file, "--output", "csv"]);
    assert_eq!(totals, "set,instructions,tokens,characters,mean_tokens\nsynthetic,2,8,20,4.0\nselected,2,,9,\n");
}
