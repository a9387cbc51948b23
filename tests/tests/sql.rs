//! Published queries, and what `doppel query` promises, as sqllogictest files over the fixture lake.
//!
//! In `tests/sql/*.slt`, a query `@NAME` is the text of `sql/NAME.sql`, so that what is tested is what is published.
//! `DOPPEL_SLT=complete cargo test -p scenarios --test sql` fills in results; a person reads them before they are
//! committed.

use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::DataType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use doppel_query::{Options, QueryError, Session};
use futures::TryStreamExt;
use lake::ReleaseRoot;
use scenarios::{fixture, repository};
use sqllogictest::strict_column_validator;
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner, default_normalizer, default_validator};

/// The session that `doppel query --run tiny --alias base=tiny-base` opens.
struct Query(Session);

#[async_trait]
impl AsyncDB for Query {
    type Error = QueryError;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, QueryError> {
        let sql = match sql.trim().strip_prefix('@') {
            Some(name) => repository::read(&repository::root().join(format!("sql/{name}.sql"))),
            None => sql.to_string(),
        };
        let stream = self.0.query(&sql).await?;
        let types = stream.schema().fields().iter().map(|field| column_type(field.data_type())).collect();
        let batches: Vec<RecordBatch> = stream.try_collect().await?;
        Ok(DBOutput::Rows { types, rows: batches.iter().flat_map(rows).collect() })
    }

    async fn shutdown(&mut self) {}
}

fn column_type(data_type: &DataType) -> DefaultColumnType {
    match data_type {
        data_type if data_type.is_integer() => DefaultColumnType::Integer,
        data_type if data_type.is_floating() => DefaultColumnType::FloatingPoint,
        data_type if data_type.is_string() => DefaultColumnType::Text,
        _ => DefaultColumnType::Any,
    }
}

fn rows(batch: &RecordBatch) -> Vec<Vec<String>> {
    let options = FormatOptions::default().with_null("NULL");
    let columns: Vec<ArrayFormatter> = batch
        .columns()
        .iter()
        .map(|column| ArrayFormatter::try_new(column.as_ref(), &options).expect("every type has a text form"))
        .collect();
    (0..batch.num_rows()).map(|row| columns.iter().map(|column| column.value(row).to_string()).collect()).collect()
}

async fn check(root: &ReleaseRoot, file: &Path) -> Result<(), String> {
    let mut runner = Runner::new(|| async {
        let aliases = [("base".to_string(), "tiny-base".to_string())].into();
        Ok(Query(Session::new(root.clone(), Options { run: Some("tiny".into()), aliases, ..Options::default() })))
    });
    runner.with_column_validator(strict_column_validator);
    if std::env::var("DOPPEL_SLT").is_ok_and(|mode| mode == "complete") {
        let updated =
            runner.update_test_file(file, " ", default_validator, default_normalizer, strict_column_validator);
        return updated.await.map_err(|error| format!("{}: {error}", file.display()));
    }
    runner.run_file_async(file).await.map_err(|error| error.display(false).to_string())
}

#[tokio::test]
async fn queries_answer_as_written_down() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let root = fixture::write(&folder.path().display().to_string()).await.expect("the fixture is written");
    let files = repository::files("tests/sql", "slt");
    assert!(!files.is_empty(), "tests/sql holds no .slt file");
    let mut failures = Vec::new();
    for file in files {
        failures.extend(check(&root, &file).await.err());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
