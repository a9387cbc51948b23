//! Records from Parquet: only the columns and leaves that a layout reads, page by page.
//!
//! The decoder that fetches by itself takes the columns of a whole row group, and other programs write row groups of a
//! million rows. This one is handed [`Blocks`], so that memory depends on how many columns are read, not on how long
//! they are.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Schema};
use bytes::Bytes;
use futures::future::BoxFuture;
use lake::{ByteStream, LakeError};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};
use parquet::schema::types::SchemaDescriptor;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::{Batch, Content, Event, Stop, field, no_layout};
use crate::config::Config;
use crate::error::PartitionError;
use crate::record::{FieldProblem, Layout, MODERATION, REDACTED, Record, Speaker, TWICE};

/// Rows of a batch: with long conversations, some megabytes.
const BATCH_ROWS: usize = 256;
/// Bytes that are fetched at a time.
const BLOCK: u64 = 2 << 20;
/// Blocks that are held: one for each leaf that a layout may read.
const BLOCKS_HELD: usize = 6;

/// Sends the records of a Parquet object, batch by batch. Blocks, so it needs a thread of its own.
pub(super) fn feed(url: &str, content: ByteStream, config: &Config, sender: &mpsc::Sender<Event>) -> Result<(), Stop> {
    let blocks = Blocks::new(content);
    let builder = blocks.decode(url, || ParquetRecordBatchReaderBuilder::try_new(blocks.clone()))?;
    let layout = Arc::new(find_layout(builder.schema(), config).map_err(|problem| no_layout(url, problem))?);
    let mask = projection(builder.parquet_schema(), &layout);
    let mut batches = blocks.decode(url, || builder.with_projection(mask).with_batch_size(BATCH_ROWS).build())?;
    let mut first_row = 0;
    while let Some(batch) = blocks.decode(url, || batches.next().transpose())? {
        let rows = Rows::new(&batch, layout.clone()).map_err(|problem| field(url, first_row, problem))?;
        let batch = Batch { object: Arc::from(url), first_row, content: Content::Rows(rows) };
        first_row += batch.len() as u64;
        sender.blocking_send(Event::Batch(batch)).map_err(|_| Stop::NobodyListens)?;
    }
    Ok(())
}

fn find_layout(schema: &Schema, config: &Config) -> Result<Layout, String> {
    let has = |name: &str| schema.field_with_name(name).is_ok();
    let layout = Layout::resolve(config, has)?;
    let is_double = |column: &&str| schema.fields().iter().filter(|field| field.name() == column).count() > 1;
    if let Some(column) = layout.columns().into_iter().find(is_double) {
        return Err(format!("there is more than one column `{column}`, and nothing says which is meant"));
    }
    let needed = [Some(&layout.body), layout.unit.as_ref()];
    let Some(column) = needed.into_iter().flatten().find(|column| !has(column)).cloned() else {
        return Ok(layout);
    };
    let names = schema.fields().iter().map(|field| field.name().as_str()).collect::<Vec<_>>().join(", ");
    Err(format!("there is no column `{column}`; its columns are {names}"))
}

/// A Parquet object as its decoder reads it: the blocks where its columns are, and no more.
#[derive(Clone)]
struct Blocks(Arc<Inner>);

/// What [`ByteStream`] reads ranges with.
type ReadRange = Arc<dyn Fn(Range<u64>) -> BoxFuture<'static, Result<Bytes, LakeError>> + Send + Sync>;

struct Inner {
    size: u64,
    range: ReadRange,
    runtime: Handle,
    /// By their offset, the last one used at the end.
    held: Mutex<VecDeque<(u64, Bytes)>>,
    /// Why a block could not be read: the decoder would only tell that it could not.
    fault: Mutex<Option<LakeError>>,
}

impl Blocks {
    fn new(content: ByteStream) -> Self {
        Self(Arc::new(Inner {
            size: content.size,
            range: content.range,
            runtime: Handle::current(),
            held: Mutex::default(),
            fault: Mutex::default(),
        }))
    }

    /// Lets the decoder work on these blocks. It panics on some files that are damaged, which makes them no less so.
    ///
    /// PRIVACY: what the decoder says is not repeated, since it may quote what it could not read.
    fn decode<T, E>(&self, url: &str, work: impl FnOnce() -> Result<T, E>) -> Result<T, PartitionError> {
        if let Ok(Ok(decoded)) = catch_unwind(AssertUnwindSafe(work)) {
            return Ok(decoded);
        }
        Err(match locked(&self.0.fault).take() {
            Some(fault) => fault.into(),
            None => PartitionError::Object {
                object: url.to_owned(),
                problem: "corrupt or cut off: it begins like Parquet but cannot be decoded".into(),
                help: "export it again, or check it with another Parquet reader".into(),
            },
        })
    }

    /// What stands at `at` and behind it in the same block; nothing at the end of the object.
    fn rest_of_block(&self, at: u64) -> io::Result<Bytes> {
        if at >= self.0.size {
            return Ok(Bytes::new());
        }
        let within = at % BLOCK;
        Ok(self.block(at - within)?.slice(within as usize..))
    }

    fn block(&self, start: u64) -> io::Result<Bytes> {
        let mut held = locked(&self.0.held);
        let found = held.iter().position(|(at, _)| *at == start).and_then(|place| held.remove(place));
        let block = match found {
            Some((_, block)) => block,
            None => self.fetch(start)?,
        };
        held.push_back((start, block.clone()));
        if held.len() > BLOCKS_HELD {
            held.pop_front();
        }
        Ok(block)
    }

    fn fetch(&self, start: u64) -> io::Result<Bytes> {
        let range = start..(start + BLOCK).min(self.0.size);
        self.0.runtime.block_on((self.0.range)(range)).map_err(|fault| {
            *locked(&self.0.fault) = Some(fault);
            io::Error::other("storage failed")
        })
    }
}

/// A decoder that panicked leaves nothing half-done here.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Length for Blocks {
    fn len(&self) -> u64 {
        self.0.size
    }
}

impl ChunkReader for Blocks {
    type T = Cursor;

    fn get_read(&self, start: u64) -> ParquetResult<Cursor> {
        Ok(Cursor { blocks: self.clone(), at: start, rest: Bytes::new() })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let rest = self.rest_of_block(start)?;
        if rest.len() >= length {
            return Ok(rest.slice(..length));
        }
        let mut bytes = Vec::new();
        self.get_read(start)?.take(length as u64).read_to_end(&mut bytes)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF("the object ends before its column does".into()));
        }
        Ok(bytes.into())
    }
}

/// Reads on from one place of the object.
struct Cursor {
    blocks: Blocks,
    at: u64,
    /// What is left of the block that `at` is in.
    rest: Bytes,
}

impl Read for Cursor {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = self.blocks.rest_of_block(self.at)?;
        }
        let length = into.len().min(self.rest.len());
        into[..length].copy_from_slice(&self.rest.split_to(length));
        self.at += length as u64;
        Ok(length)
    }
}

/// The leaves that `layout` reads: of turns the role and the content, of moderation the flag.
///
/// PRIVACY: a column without the leaves that it should have is read whole, so that it is refused for what it is. If it
/// were left out, flagged records would pass for unmarked ones.
pub fn projection(schema: &SchemaDescriptor, layout: &Layout) -> ProjectionMask {
    let names = |root: &str| match layout.turns {
        _ if root == MODERATION => vec!["flagged"],
        Some(fields) if root == layout.body => vec![fields.role, fields.content],
        _ => Vec::new(),
    };
    let mut read = Vec::new();
    for root in layout.columns() {
        let names = names(root);
        let leaves = schema.columns().iter().map(|column| column.path().parts()).enumerate();
        let (named, others): (Vec<_>, Vec<_>) = leaves
            .filter(|(_, path)| path.first().is_some_and(|first| first == root))
            .partition(|(_, path)| path.last().is_some_and(|leaf| names.contains(&leaf.as_str())));
        let wanted = if named.is_empty() { others } else { named };
        read.extend(wanted.into_iter().map(|(index, _)| index));
    }
    ProjectionMask::leaves(schema, read)
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
        // A column of nulls says nothing, as nulls in JSON.
        let told = |name: &str| column(name).filter(|array| *array.data_type() != DataType::Null);
        let body = column(&layout.body).ok_or_else(|| FieldProblem::new(&layout.body, "missing", "a column"))?;
        let unit = match &layout.unit {
            None => None,
            Some(name) => {
                let array = column(name).ok_or_else(|| FieldProblem::unit(name, "missing"))?;
                Some(ids(array).ok_or_else(|| FieldProblem::unit(name, kind(array.data_type())))?)
            }
        };
        let language = match &layout.language {
            None => None,
            Some(name) if layout.language_required => {
                let array = column(name).ok_or_else(|| FieldProblem::new(name, "missing", "a column of strings"))?;
                Some(strings(array, name)?)
            }
            Some(name) => told(name).map(|array| strings(array, name)).transpose()?,
        };
        Ok(Self {
            len: batch.num_rows(),
            body: find_body(body, &layout)?,
            unit,
            language,
            redacted: told(REDACTED).map(|array| booleans(array, REDACTED)).transpose()?,
            flagged: told(MODERATION).map(find_flags).transpose()?,
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
        let language = match (&self.language, &layout.language) {
            (Some(languages), Some(name)) => match value(languages, row) {
                None if layout.language_required => return Err(FieldProblem::new(name, "null", "a string")),
                language => language.map(str::to_owned),
            },
            _ => None,
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
        let array = only(&turns, name).map_err(|found| FieldProblem::new(&field, found, "a string"))?;
        strings(array, &field)
    };
    let (role, content) = (part(fields.role)?, part(fields.content)?);
    Ok(Body::Turns { lists, role, content, turns })
}

fn find_flags(array: &ArrayRef) -> Result<(Lists, BooleanArray), FieldProblem> {
    let refuse = |found| FieldProblem::new(MODERATION, found, "a list of structs with a truth value `flagged`");
    let (lists, values) = Lists::new(array).ok_or_else(|| refuse(kind(array.data_type())))?;
    let turns = values.as_struct_opt().ok_or_else(|| refuse("a list of other values"))?;
    let field = format!("{MODERATION}[].flagged");
    let flags = only(turns, "flagged").map_err(|found| FieldProblem::new(&field, found, "a truth value"))?;
    Ok((lists, booleans(flags, &field)?))
}

/// The one field of that name; `Err` is what there was instead.
fn only<'a>(structs: &'a StructArray, name: &str) -> Result<&'a ArrayRef, &'static str> {
    let fields = structs.fields().iter().zip(structs.columns());
    let mut named = fields.filter(|(field, _)| field.name() == name).map(|(_, array)| array);
    match (named.next(), named.next()) {
        (Some(array), None) => Ok(array),
        (Some(_), Some(_)) => Err(TWICE),
        (None, _) => Err("missing"),
    }
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
