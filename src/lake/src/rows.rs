//! Rows in and out of data files: encoding, and reading with the types that a stage relies on.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use datafusion::error::DataFusionError;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::{ArrowWriter, ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;

use crate::error::{LakeError, explain};
use crate::schema::expected_type;
use crate::store::Store;

/// Rows of one row group: with 768 float32 a row, 50 MB.
const ROW_GROUP: usize = 16_384;

/// Rows of one batch that a scan yields.
const BATCH: usize = 4_096;

/// What else is to be done after rows were mended.
const ANEW: &str = "a run that has begun keeps the version that it read, so take another --run then";

/// Columns that a scan shall yield, in order.
#[derive(Clone, Debug)]
pub(crate) struct Wanted(Arc<Vec<Column>>);

#[derive(Debug)]
struct Column {
    field: Field,
    /// One of doppel's own columns: its type and the absence of nulls are promised to the caller.
    ours: bool,
}

/// Looks `columns` up in the schema of the table at `url`.
pub(crate) fn wanted(url: &str, schema: &Schema, columns: &[&str]) -> Result<Wanted, LakeError> {
    let column = |name: &&str| {
        let found = schema.field_with_name(name).map_err(|_| {
            let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            LakeError::Malformed(format!(
                "{url}: there is no column `{name}`; the table has {}\nhelp: point to another table, or rename a column",
                names.join(", ")
            ))
        })?;
        match expected_type(name) {
            None => Ok(Column { field: found.clone(), ours: false }),
            Some(expected) if convertible(found.data_type(), &expected) => {
                Ok(Column { field: Field::new(*name, expected, false), ours: true })
            }
            Some(expected) => Err(wrong_type(url, name, found.data_type(), &expected)),
        }
    };
    Ok(Wanted(Arc::new(columns.iter().map(column).collect::<Result<_, _>>()?)))
}

/// All columns of a table as they are, whatever their names: for rows that stay in it.
pub(crate) fn as_they_are(schema: &Schema) -> Wanted {
    let column = |field: &Arc<Field>| Column { field: field.as_ref().clone(), ours: false };
    Wanted(Arc::new(schema.fields().iter().map(column).collect()))
}

fn wrong_type(url: &str, name: &str, found: &DataType, expected: &DataType) -> LakeError {
    LakeError::Malformed(format!(
        "{url}: column `{name}` has type {}, expected {}\nhelp: write the table with that type",
        describe(found),
        describe(expected)
    ))
}

/// Type names as SQL and Delta use them.
fn describe(kind: &DataType) -> String {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "string".into(),
        DataType::Int32 => "integer (32 bits)".into(),
        DataType::Int64 => "long (64 bits)".into(),
        DataType::Float32 => "float (32 bits)".into(),
        DataType::Float64 => "double (64 bits)".into(),
        DataType::List(item) | DataType::LargeList(item) => format!("list of {}", describe(item.data_type())),
        other => other.to_string(),
    }
}

/// Whether values can be taken over without changing their meaning: other widths of the same kind can, since other
/// programs choose them freely; a value that does not fit is an error when it is met.
fn convertible(found: &DataType, expected: &DataType) -> bool {
    use DataType as T;
    match (found, expected) {
        (T::Utf8 | T::LargeUtf8 | T::Utf8View, T::Utf8 | T::LargeUtf8 | T::Utf8View) => true,
        (T::List(from) | T::LargeList(from) | T::FixedSizeList(from, _), T::List(to)) => {
            convertible(from.data_type(), to.data_type())
        }
        (T::Dictionary(_, from), to) => convertible(from, to),
        (from, to) => from == to || from.is_integer() && to.is_integer() || from.is_floating() && to.is_floating(),
    }
}

impl Wanted {
    pub fn names(&self) -> Vec<&str> {
        self.0.iter().map(|column| column.field.name().as_str()).collect()
    }

    fn schema(&self) -> SchemaRef {
        Arc::new(Schema::new(self.0.iter().map(|column| column.field.clone()).collect::<Vec<_>>()))
    }

    /// `batch`, from the object at `url`, with the wanted columns and types.
    pub fn convert(&self, url: &str, batch: &RecordBatch) -> Result<RecordBatch, LakeError> {
        let column = |column: &Column| {
            match batch.column_by_name(column.field.name()) {
                Some(found) => column.convert(url, found),
                // A column that the table got later is null in the files from before.
                None => column.convert(url, &new_null_array(column.field.data_type(), batch.num_rows())),
            }
        };
        let columns: Vec<ArrayRef> = self.0.iter().map(column).collect::<Result<_, _>>()?;
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(self.schema(), columns, &options)
            .map_err(|_| LakeError::Malformed(format!("{url}: the columns do not fit the table's schema")))
    }
}

impl Column {
    fn convert(&self, url: &str, found: &ArrayRef) -> Result<ArrayRef, LakeError> {
        let (name, wanted) = (self.field.name(), self.field.data_type());
        let nulls = found.logical_null_count() > 0
            || found.as_list_opt::<i32>().is_some_and(|list| list.values().logical_null_count() > 0);
        if self.ours && nulls {
            return Err(LakeError::Malformed(format!(
                "{url}: column `{name}` holds null, expected a value in every row\nhelp: drop or fill those rows; {ANEW}"
            )));
        }
        if found.data_type() == wanted {
            return Ok(found.clone());
        }
        if !convertible(found.data_type(), wanted) && self.ours {
            return Err(wrong_type(url, name, found.data_type(), wanted));
        }
        let options = CastOptions { safe: false, ..CastOptions::default() };
        cast_with_options(found, wanted, &options).map_err(|_| {
            LakeError::Malformed(format!(
                "{url}: column `{name}` holds a value that does not fit {}\nhelp: write the table with that type; {ANEW}",
                describe(wanted)
            ))
        })
    }
}

/// A data file: where it is, its size as the log says, and its URL for messages.
#[derive(Clone)]
pub(crate) struct File {
    pub store: Store,
    pub at: Path,
    pub size: u64,
    pub url: String,
}

impl AsyncFileReader for File {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        async move { self.store.range(&self.at, &self.url, range).await.map_err(external) }.boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move { self.store.ranges(&self.at, &self.url, ranges).await.map_err(external) }.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            // Most footers fit, so that a file costs one request for its footer and one for its columns.
            let reader =
                ParquetMetaDataReader::new().with_arrow_reader_options(options).with_prefetch_hint(Some(64 << 10));
            Ok(Arc::new(reader.load_and_finish(self, size).await?))
        }
        .boxed()
    }
}

fn external(error: LakeError) -> ParquetError {
    ParquetError::External(Box::new(error))
}

/// Opens a data file and streams its rows.
pub(crate) async fn open(
    file: File,
    wanted: Wanted,
) -> Result<BoxStream<'static, Result<RecordBatch, LakeError>>, LakeError> {
    let url = file.url.clone();
    let opening = async {
        let builder = ParquetRecordBatchStreamBuilder::new(file).await?;
        let schema = builder.schema().clone();
        let indices: Vec<usize> = wanted.names().iter().filter_map(|name| schema.index_of(name).ok()).collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), indices);
        builder.with_projection(mask).with_batch_size(BATCH).build()
    };
    let rows = decoded(&url, AssertUnwindSafe(opening).catch_unwind().await)?;
    let rows = AssertUnwindSafe(rows).catch_unwind();
    Ok(rows.map(move |batch| wanted.convert(&url, &decoded(&url, batch)?)).boxed())
}

/// What the decoder made. It panics on some files that are damaged, which makes them no less so, and is dropped then.
fn decoded<T>(url: &str, result: std::thread::Result<Result<T, ParquetError>>) -> Result<T, LakeError> {
    result.map_err(|_| damaged(url))?.map_err(|error| parquet_error(url, error))
}

/// Encodes `batches` as a Parquet file with the columns of `schema`, in that order.
pub(crate) fn encode(url: &str, schema: &SchemaRef, batches: &[RecordBatch]) -> Result<Vec<u8>, LakeError> {
    let mut encoder = Encoder::new(url, schema)?;
    for batch in batches {
        encoder.write(batch)?;
    }
    encoder.finish()
}

/// [`encode`] for rows that come one batch after the other.
pub(crate) struct Encoder {
    url: String,
    schema: SchemaRef,
    writer: ArrowWriter<Vec<u8>>,
}

impl Encoder {
    pub fn new(url: &str, schema: &SchemaRef) -> Result<Self, LakeError> {
        let writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties(schema)));
        let writer = writer.map_err(|_| not_encoded(url))?;
        Ok(Self { url: url.to_string(), schema: schema.clone(), writer })
    }

    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), LakeError> {
        self.writer.write(&fit(&self.url, &self.schema, batch)?).map_err(|_| not_encoded(&self.url))
    }

    pub fn finish(self) -> Result<Vec<u8>, LakeError> {
        self.writer.into_inner().map_err(|_| not_encoded(&self.url))
    }
}

fn not_encoded(url: &str) -> LakeError {
    LakeError::Malformed(format!("{url}: the rows cannot be encoded as Parquet"))
}

fn properties(schema: &Schema) -> WriterProperties {
    let zstd = ZstdLevel::try_new(1).map(Compression::ZSTD).unwrap_or(Compression::SNAPPY);
    let mut properties = WriterProperties::builder().set_compression(zstd).set_max_row_group_row_count(Some(ROW_GROUP));
    for field in schema.fields() {
        if let DataType::List(item) = field.data_type()
            && item.data_type().is_floating()
        {
            // Vectors repeat nothing: a dictionary or compression would only cost time.
            let path = ColumnPath::new(vec![field.name().clone(), "list".into(), item.name().clone()]);
            properties = properties
                .set_column_dictionary_enabled(path.clone(), false)
                .set_column_compression(path, Compression::UNCOMPRESSED);
        }
    }
    properties.build()
}

/// `batch` with exactly the columns of the table; anything else is a mistake of the stage that writes.
fn fit(url: &str, schema: &SchemaRef, batch: &RecordBatch) -> Result<RecordBatch, LakeError> {
    if batch.num_columns() != schema.fields().len() {
        return Err(LakeError::Malformed(format!(
            "{url}: rows with {} columns for a table with {}",
            batch.num_columns(),
            schema.fields().len()
        )));
    }
    let column = |field: &Arc<Field>| {
        let name = field.name();
        let missing = || LakeError::Malformed(format!("{url}: the rows to append have no column `{name}`"));
        let column = batch.column_by_name(name).ok_or_else(missing)?;
        if !field.is_nullable() && column.logical_null_count() > 0 {
            return Err(LakeError::Malformed(format!("{url}: the rows to append have null in column `{name}`")));
        }
        if column.data_type() == field.data_type() {
            return Ok(column.clone());
        }
        if !convertible(column.data_type(), field.data_type()) {
            return Err(wrong_type(url, name, column.data_type(), field.data_type()));
        }
        let options = CastOptions { safe: false, ..CastOptions::default() };
        cast_with_options(column, field.data_type(), &options)
            .map_err(|_| wrong_type(url, name, column.data_type(), field.data_type()))
    };
    let columns: Vec<ArrayRef> = schema.fields().iter().map(column).collect::<Result<_, _>>()?;
    RecordBatch::try_new(schema.clone(), columns)
        .map_err(|_| LakeError::Malformed(format!("{url}: the rows to append do not fit the table's schema")))
}

fn damaged(url: &str) -> LakeError {
    LakeError::Malformed(format!(
        "{url}: not a readable Parquet file; it is damaged or cut short\n\
         help: restore the file, or write the table again"
    ))
}

fn parquet_error(url: &str, error: ParquetError) -> LakeError {
    let ParquetError::External(cause) = error else { return damaged(url) };
    match cause.downcast::<LakeError>().map(|error| *error) {
        Ok(LakeError::NotFound(_)) => LakeError::Malformed(format!(
            "{url}: the data file is not there, though the table's log names it\n\
             help: restore the file, or write the table again; or, for an older version, take a newer one: doppel gc \
             removes what nothing pins"
        )),
        Ok(error) => error,
        Err(_) => damaged(url),
    }
}

/// The error of DataFusion reading the table at `url`.
pub(crate) fn engine_error(url: &str, error: &DataFusionError) -> LakeError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(storage) = error.downcast_ref::<object_store::Error>() {
            return explain(url, storage);
        }
        cause = error.source();
    }
    LakeError::Malformed(format!("{url}: the table's data files cannot be read; one is damaged or missing"))
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;

    #[tokio::test]
    async fn a_decoder_that_panics_has_met_a_damaged_file() {
        let rows = futures::stream::iter([1, 2, 3]).map(|row| match row {
            2 => panic!("as some damaged footers make it"),
            row => Ok::<i32, ParquetError>(row),
        });
        let rows = AssertUnwindSafe(rows).catch_unwind().map(|row| decoded("s3://lake/a", row));
        let found: Result<Vec<i32>, LakeError> = rows.try_collect().await;
        assert!(matches!(&found, Err(LakeError::Malformed(text)) if text.contains("damaged")), "{found:?}");
    }
}
