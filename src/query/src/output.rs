//! Rows on their way out: as a table for people, as CSV, JSON or Parquet for machines.
//!
//! CSV, JSON and Parquet stream, so memory does not grow with the result; a table is laid out by its widest cells and
//! must be held whole. A file appears under its name only when it is complete.

use std::collections::HashSet;
use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Schema};
use arrow::error::ArrowError;
use arrow::util::display::FormatOptions;
use arrow::util::pretty::pretty_format_batches_with_options;
use clap::ValueEnum;
use datafusion::execution::SendableRecordBatchStream;
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::error::QueryError;

/// Bytes of a Parquet row group, which is held in memory until it is full.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// Form of the rows.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A table for people.
    Table,
    /// CSV with a header.
    Csv,
    /// One JSON array of objects.
    Json,
    /// A Parquet file.
    Parquet,
}

/// Where the rows go, and how.
#[derive(Clone, Debug)]
pub struct Target {
    /// Form of the rows.
    pub format: Format,
    /// The file; `None` for standard output.
    pub file: Option<PathBuf>,
}

/// Writes all rows. A reader of standard output that went away, as in `… | head`, ends the work quietly.
pub async fn write(rows: SendableRecordBatchStream, target: &Target) -> Result<(), QueryError> {
    if target.format != Format::Table {
        refuse_twins(&rows.schema())?;
    }
    let Some(file) = &target.file else {
        return write_to(rows, target.format, "standard output", Box::new(io::stdout())).await;
    };
    let name = file.display().to_string();
    let failed = |fault: io::Error| QueryError::Output { target: name.clone(), fault };
    let there = std::fs::metadata(file).ok();
    if there.as_ref().is_some_and(|there| !there.is_file()) {
        // Someone is at the other end of a device or a named pipe, and a file in its place would not reach them.
        let sink = File::options().write(true).open(file).map_err(failed)?;
        return write_to(rows, target.format, &name, Box::new(sink)).await;
    }
    // Where a link leads to a file, that file is replaced, and the link stays.
    let file = file.canonicalize().unwrap_or_else(|_| file.clone());
    let partial = partial(&file);
    let sink = create(&partial, there.map(|there| there.permissions())).map_err(failed)?;
    let written = write_to(rows, target.format, &name, Box::new(sink)).await;
    let published = written.and_then(|()| std::fs::rename(&partial, &file).map_err(failed));
    if published.is_err() {
        // The first error is the one to tell; what is left of the file is of no use either way.
        let _ = std::fs::remove_file(&partial);
    }
    published
}

/// A join may give two columns one name. An object of JSON would then hold a key twice, and readers of the other forms
/// keep one of the two, or neither.
fn refuse_twins(schema: &Schema) -> Result<(), QueryError> {
    let mut names = HashSet::new();
    match schema.fields().iter().find(|field| !names.insert(field.name())) {
        None => Ok(()),
        Some(field) => Err(QueryError::Sql(format!(
            "two columns have the name {0}, which only --output table can show\n\
             help: give one another name, with AS, or write JOIN … USING ({0})",
            field.name(),
        ))),
    }
}

fn create(partial: &Path, permissions: Option<Permissions>) -> io::Result<File> {
    let sink = File::create(partial)?;
    if let Some(permissions) = permissions {
        sink.set_permissions(permissions)?;
    }
    Ok(sink)
}

fn partial(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.partial", std::process::id()));
    file.with_file_name(name)
}

async fn write_to(
    rows: SendableRecordBatchStream,
    format: Format,
    name: &str,
    sink: Box<dyn Write + Send>,
) -> Result<(), QueryError> {
    let fault = Fault::default();
    let sink = Sink { inner: BufWriter::new(sink), fault: fault.clone() };
    let written = match format {
        Format::Table => table(rows, sink).await,
        Format::Csv => csv(rows, sink).await,
        Format::Json => json(rows, sink).await,
        Format::Parquet => parquet(rows, sink).await,
    };
    match fault.take() {
        Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Some(fault) => Err(QueryError::Output { target: name.into(), fault }),
        None => written,
    }
}

async fn table(rows: SendableRecordBatchStream, mut sink: Sink) -> Result<(), QueryError> {
    let schema = rows.schema();
    let mut batches: Vec<RecordBatch> = rows.try_collect().await?;
    if batches.is_empty() {
        batches.push(RecordBatch::new_empty(schema));
    }
    let options = FormatOptions::default().with_null("NULL");
    let text = pretty_format_batches_with_options(&batches, &options).map_err(unwritable)?;
    writeln!(sink, "{text}").and_then(|()| sink.flush()).map_err(|error| unwritable(error.into()))
}

async fn csv(mut rows: SendableRecordBatchStream, mut sink: Sink) -> Result<(), QueryError> {
    if let Some(field) = rows.schema().fields().iter().find(|field| field.data_type().is_nested()) {
        return Err(QueryError::Sql(format!(
            "column {} is a {}, which CSV cannot hold\n\
             help: use --output json or parquet, or array_to_string({0}, ' ')",
            field.name(),
            plain(field.data_type()),
        )));
    }
    let mut writer = arrow::csv::Writer::new(&mut sink);
    // An empty batch first, so that a result without rows still has its header.
    writer.write(&RecordBatch::new_empty(rows.schema())).map_err(unwritable)?;
    while let Some(batch) = rows.next().await {
        writer.write(&batch?).map_err(unwritable)?;
    }
    drop(writer);
    sink.flush().map_err(|error| unwritable(error.into()))
}

async fn json(mut rows: SendableRecordBatchStream, mut sink: Sink) -> Result<(), QueryError> {
    use arrow::json::writer::{JsonArray, WriterBuilder};
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(&mut sink);
    while let Some(batch) = rows.next().await {
        writer.write(&batch?).map_err(unwritable)?;
    }
    writer.finish().map_err(unwritable)?;
    drop(writer);
    writeln!(sink).and_then(|()| sink.flush()).map_err(|error| unwritable(error.into()))
}

async fn parquet(mut rows: SendableRecordBatchStream, sink: Sink) -> Result<(), QueryError> {
    if let Some(field) = rows.schema().fields().iter().find(|field| holds_interval(field.data_type())) {
        return Err(QueryError::Sql(format!(
            "column {} is an interval, which Parquet cannot hold\n\
             help: use --output csv or json, or cast it: CAST({0} AS VARCHAR)",
            field.name(),
        )));
    }
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
        .build();
    let unwritable = |error: parquet::errors::ParquetError| QueryError::Bug(error.to_string());
    let mut writer = ArrowWriter::try_new(sink, rows.schema(), Some(properties)).map_err(unwritable)?;
    while let Some(batch) = rows.next().await {
        writer.write(&batch?).map_err(unwritable)?;
    }
    writer.close().map(|_| ()).map_err(unwritable)
}

fn holds_interval(data_type: &DataType) -> bool {
    match data_type {
        DataType::Interval(_) => true,
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::FixedSizeList(item, _)
        | DataType::Map(item, _) => holds_interval(item.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| holds_interval(field.data_type())),
        _ => false,
    }
}

fn plain(data_type: &DataType) -> &'static str {
    match data_type {
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => "list",
        DataType::Map(..) => "map",
        _ => "struct",
    }
}

/// What a writer says of rows that it cannot encode, such as times in a zone that is not known; faults of the sink are
/// told by [`Fault`].
fn unwritable(error: ArrowError) -> QueryError {
    match error {
        ArrowError::ParseError(_) | ArrowError::CastError(_) | ArrowError::InvalidArgumentError(_) => {
            QueryError::Computation(error.to_string())
        }
        error => QueryError::Bug(error.to_string()),
    }
}

/// The first fault of a sink. Encoders turn an I/O error into text; its kind is kept here.
#[derive(Clone, Default)]
struct Fault(Arc<Mutex<Option<io::Error>>>);

impl Fault {
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            if let Ok(mut first) = self.0.lock() {
                first.get_or_insert(error);
            }
            io::Error::from(kind)
        })
    }

    fn take(&self) -> Option<io::Error> {
        self.0.lock().ok()?.take()
    }
}

struct Sink {
    inner: BufWriter<Box<dyn Write + Send>>,
    fault: Fault,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes);
        self.fault.note(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.inner.flush();
        self.fault.note(flushed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::BinaryArray;
    use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
    use parquet::file::reader::{FileReader, SerializedFileReader};

    /// Bytes that do not compress, by xorshift64.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        words.take(length / 8).flatten().collect()
    }

    #[test]
    fn parquet_row_groups_are_bounded_by_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rows.parquet");
        let value = noise(ROW_GROUP_BYTES / 4);
        let column: arrow::array::ArrayRef = Arc::new(BinaryArray::from_vec(vec![value.as_slice()]));
        let batch = RecordBatch::try_from_iter([("value", column)]).unwrap();
        let rows = futures::stream::iter((0..6).map(|_| Ok(batch.clone())).collect::<Vec<_>>());
        let rows = Box::pin(RecordBatchStreamAdapter::new(batch.schema(), rows));
        let target = Target { format: Format::Parquet, file: Some(file.clone()) };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(write(rows, &target)).unwrap();

        let reader = SerializedFileReader::new(File::open(&file).unwrap()).unwrap();
        let groups = reader.metadata().row_groups();
        assert_eq!(reader.metadata().file_metadata().num_rows(), 6);
        assert!(groups.len() > 1, "one group holds all");
        for group in groups {
            assert!(group.compressed_size() <= (ROW_GROUP_BYTES + value.len()) as i64, "{}", group.compressed_size());
        }
    }
}
