//! Records from Parquet: only the columns and leaves that a layout reads, one batch of rows at a time.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::schema::types::SchemaDescriptor;

use crate::record::{FieldProblem, Layout, MODERATION, REDACTED, Record, Speaker};

/// A Parquet object in storage: its footer first, then the ranges that a projection needs.
pub struct ObjectReader {
    /// Store.
    pub store: Arc<dyn ObjectStore>,
    /// Path in the store.
    pub path: object_store::path::Path,
    /// Size of the object.
    pub size: u64,
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

impl AsyncFileReader for ObjectReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        self.store.get_range(&self.path, range).map_err(external).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move { self.store.get_ranges(&self.path, &ranges).await.map_err(external) }.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            let reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            reader.load_and_finish(self, size).await.map(Arc::new)
        }
        .boxed()
    }
}

/// The leaves that `layout` reads: of turns the role and the content, of moderation the flag.
pub fn projection(schema: &SchemaDescriptor, layout: &Layout) -> ProjectionMask {
    let wanted = |path: &[String]| {
        let (Some(root), Some(leaf)) = (path.first(), path.last()) else { return false };
        if root == MODERATION {
            return leaf == "flagged";
        }
        match layout.turns {
            Some(fields) if *root == layout.body => leaf == fields.role || leaf == fields.content,
            _ => layout.columns().contains(&root.as_str()),
        }
    };
    let leaves = schema.columns().iter().enumerate().filter(|(_, column)| wanted(column.path().parts()));
    ProjectionMask::leaves(schema, leaves.map(|(index, _)| index).collect::<Vec<_>>())
}

/// A batch of rows whose columns have been found and converted.
pub struct Rows {
    layout: Arc<Layout>,
    len: usize,
    body: Body,
    unit: Option<StringArray>,
    language: Option<StringArray>,
    redacted: Option<BooleanArray>,
    flagged: Option<(Lists, BooleanArray)>,
}

#[expect(clippy::large_enum_variant, reason = "one batch at a time: a box would only add an allocation")]
enum Body {
    Text(StringArray),
    Turns { lists: Lists, role: StringArray, content: StringArray, turns: StructArray },
}

impl Rows {
    /// Finds the columns of `layout` in `batch`; a column of another type is a [`FieldProblem`] of the whole batch.
    pub fn new(batch: &RecordBatch, layout: Arc<Layout>) -> Result<Self, FieldProblem> {
        let column = |name: &str| batch.column_by_name(name);
        let body = column(&layout.body).ok_or_else(|| FieldProblem::new(&layout.body, "missing", "a column"))?;
        let unit = match &layout.unit {
            None => None,
            Some(name) => {
                let array = column(name).ok_or_else(|| FieldProblem::unit(name, "missing"))?;
                Some(ids(array).ok_or_else(|| FieldProblem::unit(name, kind(array.data_type())))?)
            }
        };
        let language = match column(&layout.language) {
            None if layout.language_required => {
                return Err(FieldProblem::new(&layout.language, "missing", "a column of strings"));
            }
            found => found.map(|array| strings(array, &layout.language)).transpose()?,
        };
        Ok(Self {
            len: batch.num_rows(),
            body: find_body(body, &layout)?,
            unit,
            language,
            redacted: column(REDACTED).map(|array| booleans(array, REDACTED)).transpose()?,
            flagged: column(MODERATION).map(find_flags).transpose()?,
            layout,
        })
    }

    /// Where the parts of a record are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.len
    }

    /// Reads one row.
    pub fn read(&self, row: usize) -> Result<Record, FieldProblem> {
        let layout = &self.layout;
        let source = match (&self.unit, &layout.unit) {
            (Some(ids), Some(name)) => value(ids, row).ok_or_else(|| FieldProblem::unit(name, "null"))?,
            _ => "",
        };
        let language = match &self.language {
            None => None,
            Some(languages) => match value(languages, row) {
                None if layout.language_required => {
                    return Err(FieldProblem::new(&layout.language, "null", "a string"));
                }
                language => language.map(str::to_owned),
            },
        };
        Ok(Record {
            source: source.to_owned(),
            text: self.text(row)?.map(str::to_owned),
            language,
            redacted: self.redacted.as_ref().is_some_and(|redacted| is_true(redacted, row)),
            flagged: self.flagged.as_ref().is_some_and(|(lists, flags)| {
                lists.range(row).is_some_and(|mut turns| turns.any(|turn| is_true(flags, turn)))
            }),
        })
    }

    fn text(&self, row: usize) -> Result<Option<&str>, FieldProblem> {
        let field = &self.layout.body;
        let (lists, role, content, turns) = match &self.body {
            Body::Text(texts) => {
                return value(texts, row).map(Some).ok_or_else(|| FieldProblem::new(field, "null", "a string"));
            }
            Body::Turns { lists, role, content, turns } => (lists, role, content, turns),
        };
        let range = lists.range(row).ok_or_else(|| FieldProblem::new(field, "null", "an array of turns"))?;
        for (index, turn) in range.enumerate() {
            let null = |what: &str| FieldProblem::new(format!("{field}[{index}]{what}"), "null", "a string");
            if turns.is_null(turn) {
                return Err(null(""));
            }
            match Speaker::of(value(role, turn).ok_or_else(|| null(" role"))?) {
                Speaker::System => {}
                Speaker::Other => return Ok(None),
                Speaker::User => return value(content, turn).map(Some).ok_or_else(|| null(" content")),
            }
        }
        Ok(None)
    }
}

/// Where the elements of each row's list are, for both widths of offsets.
struct Lists {
    offsets: Vec<usize>,
    nulls: Option<NullBuffer>,
}

impl Lists {
    fn new(array: &ArrayRef) -> Option<(Self, ArrayRef)> {
        let nulls = array.nulls().cloned();
        if let Some(lists) = array.as_list_opt::<i32>() {
            let offsets = lists.value_offsets().iter().map(|&offset| offset as usize).collect();
            return Some((Self { offsets, nulls }, lists.values().clone()));
        }
        let lists = array.as_list_opt::<i64>()?;
        let offsets = lists.value_offsets().iter().map(|&offset| offset as usize).collect();
        Some((Self { offsets, nulls }, lists.values().clone()))
    }

    /// Elements of `row`, or `None` where it is null.
    fn range(&self, row: usize) -> Option<Range<usize>> {
        let valid = self.nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row));
        valid.then(|| self.offsets[row]..self.offsets[row + 1])
    }
}

fn find_body(array: &ArrayRef, layout: &Layout) -> Result<Body, FieldProblem> {
    let Some(fields) = layout.turns else {
        return strings(array, &layout.body).map(Body::Text);
    };
    let refuse = |found| FieldProblem::new(&layout.body, found, "a list of structs, one for each turn");
    let (lists, values) = Lists::new(array).ok_or_else(|| refuse(kind(array.data_type())))?;
    let turns = values.as_struct_opt().ok_or_else(|| refuse("a list of other values"))?.clone();
    let part = |name: &str| {
        let field = format!("{}[].{name}", layout.body);
        let array = turns.column_by_name(name).ok_or_else(|| FieldProblem::new(&field, "missing", "a string"))?;
        strings(array, &field)
    };
    let (role, content) = (part(fields.role)?, part(fields.content)?);
    Ok(Body::Turns { lists, role, content, turns })
}

fn find_flags(array: &ArrayRef) -> Result<(Lists, BooleanArray), FieldProblem> {
    let refuse = |found| FieldProblem::new(MODERATION, found, "a list of structs with a truth value `flagged`");
    let (lists, values) = Lists::new(array).ok_or_else(|| refuse(kind(array.data_type())))?;
    let turns = values.as_struct_opt().ok_or_else(|| refuse("a list of other values"))?;
    let flags = turns.column_by_name("flagged").ok_or_else(|| refuse("a list of structs without it"))?;
    Ok((lists, booleans(flags, &format!("{MODERATION}[].flagged"))?))
}

fn strings(array: &ArrayRef, field: &str) -> Result<StringArray, FieldProblem> {
    let is_text = match array.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => matches!(**values, DataType::Utf8 | DataType::LargeUtf8),
        _ => false,
    };
    as_strings(array, is_text).ok_or_else(|| FieldProblem::new(field, kind(array.data_type()), "a string"))
}

/// Ids as text: strings and integers.
fn ids(array: &ArrayRef) -> Option<StringArray> {
    match array.data_type() {
        integer if integer.is_integer() => as_strings(array, true),
        _ => strings(array, "").ok(),
    }
}

fn as_strings(array: &ArrayRef, convertible: bool) -> Option<StringArray> {
    if !convertible {
        return None;
    }
    cast(array, &DataType::Utf8).ok().and_then(|array| array.as_string_opt::<i32>().cloned())
}

fn booleans(array: &ArrayRef, field: &str) -> Result<BooleanArray, FieldProblem> {
    let problem = || FieldProblem::new(field, kind(array.data_type()), "a truth value");
    array.as_boolean_opt().cloned().ok_or_else(problem)
}

fn value(array: &StringArray, row: usize) -> Option<&str> {
    array.is_valid(row).then(|| array.value(row))
}

fn is_true(array: &BooleanArray, row: usize) -> bool {
    array.is_valid(row) && array.value(row)
}

fn kind(data_type: &DataType) -> &'static str {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "a string",
        DataType::Boolean => "a truth value",
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => "a list",
        DataType::Struct(_) => "a struct",
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "binary",
        DataType::Null => "null",
        integer if integer.is_integer() => "an integer",
        number if number.is_numeric() => "a number",
        _ => "another type",
    }
}
