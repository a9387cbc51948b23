//! Inputs: objects in storage, cut into batches of records that are not parsed yet.
//!
//! A batch is what travels from the reading task to the working threads; parsing happens there, in parallel. At most
//! [`QUEUE`] batches wait, so memory does not grow with the input.

pub mod json;
pub mod parquet;
pub mod split;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use lake::{ByteStream, LakeError, StorageOptions};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::error::PartitionError;
use crate::input::json::JsonProblem;
use crate::input::parquet::Rows;
use crate::input::split::{End, Framing, FramingProblem, Splitter};
use crate::record::{FieldProblem, Layout, Record};

/// Batches that may wait between the reader and the workers.
pub const QUEUE: usize = 2;
/// Bytes of JSON that are fetched at a time, and how many such pieces at once. Threads fetch them, each with a heap that
/// keeps some of what it once held: with larger pieces, that would be most of the memory that partition takes.
const PIECE: u64 = 1 << 20;
const IN_FLIGHT: usize = 8;
/// Bytes of JSON in a batch, about.
const BATCH_BYTES: usize = 1 << 20;

/// How an object holds its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON, by array or by lines.
    Json(Framing),
    /// Parquet.
    Parquet,
}

/// What identifies the content of an input; written down so that a later run notices that it changed.
///
/// PRIVACY: whoever guesses the content can check the guess by size, tag and digest, so these stay in the private root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Canonical URL.
    pub url: String,
    /// Size in bytes.
    pub size: u64,
    /// The store's entity tag. That of a local file follows from its time stamp and its place on the disk, so that
    /// copies and touched files differ from what they were.
    pub etag: Option<String>,
    /// BLAKE3 of the content, where it was read for that; records of earlier versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Identity {
    /// That of the object at `url` as it is now.
    pub async fn of(url: &str, storage: &StorageOptions) -> Result<Self, LakeError> {
        Ok(Self::new(url, &lake::read_stream(url, storage).await?))
    }

    fn new(url: &str, content: &ByteStream) -> Self {
        Self { url: url.to_owned(), size: content.size, etag: content.etag.clone(), digest: None }
    }

    /// Reads the whole object for its digest.
    pub async fn read_digest(&mut self, storage: &StorageOptions) -> Result<(), LakeError> {
        let mut pieces = pieces(lake::read_stream(&self.url, storage).await?);
        let mut hasher = blake3::Hasher::new();
        while let Some(bytes) = pieces.try_next().await? {
            hasher.update(&bytes);
        }
        self.digest = Some(hasher.finalize().to_hex().to_string());
        Ok(())
    }

    /// Whether both are of the same content: by their digests, else by place, size and tag.
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.digest, &other.digest) {
            (Some(one), Some(other)) => one == other,
            _ => (&self.url, self.size, &self.etag) == (&other.url, other.size, &other.etag),
        }
    }
}

/// The content in order, a few pieces ahead.
fn pieces(content: ByteStream) -> impl Stream<Item = Result<Bytes, LakeError>> + Unpin {
    let ByteStream { size, range, .. } = content;
    let ranges = (0..size).step_by(PIECE as usize).map(move |from| range(from..(from + PIECE).min(size)));
    futures::stream::iter(ranges).buffered(IN_FLIGHT)
}

/// An input that was found.
#[derive(Clone, Debug)]
pub struct Object {
    storage: StorageOptions,
    /// What identifies its content.
    pub identity: Identity,
    /// How it holds records.
    pub format: Format,
}

impl Object {
    /// Finds the object at `url` and looks at its first bytes.
    pub async fn open(url: &str, storage: &StorageOptions) -> Result<Self, PartitionError> {
        let content = lake::read_stream(url, storage).await?;
        let head = match content.size {
            0 => Default::default(),
            size => (content.range)(0..size.min(4096)).await?,
        };
        let format = sniff(&head).ok_or_else(|| PartitionError::Object {
            object: url.to_owned(),
            problem: if content.size == 0 { "the object is empty".into() } else { UNKNOWN_FORMAT.into() },
            help: "give a JSON array, JSON Lines or Parquet".into(),
        })?;
        Ok(Self { storage: storage.clone(), identity: Identity::new(url, &content), format })
    }

    /// Sends the records of this object, batch by batch; ends early, without error, when nobody receives.
    pub async fn feed(&self, config: &Arc<Config>, sender: &mpsc::Sender<Event>) -> Result<(), PartitionError> {
        let fed = match self.format {
            Format::Json(framing) => self.feed_json(framing, config, sender).await,
            Format::Parquet => self.feed_parquet(config, sender).await,
        };
        match fed {
            Err(Stop::Error(error)) => Err(error),
            Err(Stop::NobodyListens) | Ok(()) => Ok(()),
        }
    }

    /// The content, which is still what it was when the object was found.
    async fn content(&self) -> Result<ByteStream, PartitionError> {
        let url = &self.identity.url;
        let content = lake::read_stream(url, &self.storage).await?;
        if Identity::new(url, &content) == self.identity { Ok(content) } else { Err(PartitionError::changed(url)) }
    }

    async fn feed_json(&self, framing: Framing, config: &Config, sender: &mpsc::Sender<Event>) -> Result<(), Stop> {
        let url = &self.identity.url;
        let mut pieces = pieces(self.content().await?);
        let mut splitter = Splitter::new(framing);
        let mut builder = JsonBuilder::new(url, config);
        let mut start = true;
        while let Some(bytes) = pieces.try_next().await.map_err(PartitionError::Lake)? {
            let text = if start { without_byte_order_mark(&bytes) } else { &bytes };
            splitter.skip(bytes.len() - text.len());
            splitter.push(text);
            start = false;
            while let Some(record) =
                splitter.next_record().map_err(|problem| syntax(url, builder.next_row, &problem))?
            {
                let offset = splitter.offset(record.start);
                builder.add(splitter.bytes(record), offset)?;
                if builder.buffer.len() >= BATCH_BYTES {
                    send(sender, Event::Batch(builder.take()?)).await?;
                }
            }
        }
        let (mut end, rest) = splitter.finish();
        if let Some(rest) = rest {
            // A last line without a line break may be whole, or all that arrived of it.
            let offset = splitter.offset(rest.start);
            match json::keys(splitter.bytes(rest.clone())) {
                Err(JsonProblem::Syntax { cut_off: true, .. }) => end = End::CutOff,
                _ => builder.add(splitter.bytes(rest), offset)?,
            }
        }
        if !builder.records.is_empty() {
            send(sender, Event::Batch(builder.take()?)).await?;
        }
        if end == End::CutOff {
            let event = Event::CutOff { object: url.clone(), records: builder.next_row };
            send(sender, event).await?;
        }
        Ok(())
    }

    async fn feed_parquet(&self, config: &Arc<Config>, sender: &mpsc::Sender<Event>) -> Result<(), Stop> {
        let content = self.content().await?;
        let (url, config, sender) = (self.identity.url.clone(), config.clone(), sender.clone());
        let decoding = tokio::task::spawn_blocking(move || parquet::feed(&url, content, &config, &sender));
        decoding.await.unwrap_or(Err(Stop::Error(PartitionError::Bug("the reader of Parquet panicked"))))
    }
}

const UNKNOWN_FORMAT: &str = "neither a JSON array, nor JSON Lines, nor Parquet by its first bytes";

fn sniff(head: &[u8]) -> Option<Format> {
    if head.starts_with(b"PAR1") {
        return Some(Format::Parquet);
    }
    match without_byte_order_mark(head).iter().find(|byte| !byte.is_ascii_whitespace())? {
        b'[' => Some(Format::Json(Framing::Array)),
        b'{' => Some(Format::Json(Framing::Lines)),
        _ => None,
    }
}

fn without_byte_order_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// What the reader tells the workers.
#[expect(clippy::large_enum_variant, reason = "one batch at a time: a box would only add an allocation")]
pub enum Event {
    /// Records.
    Batch(Batch),
    /// The object ended too early, after so many whole records. PRIVACY: the number is private unless declared.
    CutOff {
        /// URL of the object.
        object: String,
        /// Whole records.
        records: u64,
    },
}

/// Why feeding ended early.
enum Stop {
    Error(PartitionError),
    NobodyListens,
}

impl From<PartitionError> for Stop {
    fn from(error: PartitionError) -> Self {
        Stop::Error(error)
    }
}

async fn send(sender: &mpsc::Sender<Event>, event: Event) -> Result<(), Stop> {
    sender.send(event).await.map_err(|_| Stop::NobodyListens)
}

/// Records of one object, not parsed yet.
pub struct Batch {
    object: Arc<str>,
    first_row: u64,
    content: Content,
}

#[expect(clippy::large_enum_variant, reason = "one batch at a time: a box would only add an allocation")]
enum Content {
    Json { layout: Arc<Layout>, buffer: Vec<u8>, records: Vec<(Range<usize>, u64)> },
    Rows(Rows),
}

impl Batch {
    /// Number of records.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::Json { records, .. } => records.len(),
            Content::Rows(rows) => rows.count(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// URL of the object.
    pub fn object(&self) -> &str {
        &self.object
    }

    /// Column of the privacy unit, if one is read.
    pub fn unit_column(&self) -> Option<&str> {
        match &self.content {
            Content::Json { layout, .. } => layout.unit.as_deref(),
            Content::Rows(rows) => rows.layout().unit.as_deref(),
        }
    }

    /// Parses one record.
    pub fn read(&self, index: usize) -> Result<Record, PartitionError> {
        let row = self.first_row + index as u64;
        let refuse = |problem| field(&self.object, row, problem);
        let (record, layout) = match &self.content {
            Content::Rows(rows) => (rows.read(index).map_err(refuse)?, rows.layout()),
            Content::Json { layout, buffer, records } => {
                let (range, offset) = &records[index];
                let record = json::read(&buffer[range.clone()], layout)
                    .map_err(|problem| json_problem(&self.object, row, *offset, problem))?;
                (record, &**layout)
            }
        };
        layout.check_unit(&record.source).map_err(refuse)?;
        Ok(record)
    }
}

/// Collects JSON records into a batch; learns the layout from the first one.
struct JsonBuilder<'a> {
    url: &'a str,
    config: &'a Config,
    layout: Option<Arc<Layout>>,
    next_row: u64,
    buffer: Vec<u8>,
    records: Vec<(Range<usize>, u64)>,
}

impl<'a> JsonBuilder<'a> {
    fn new(url: &'a str, config: &'a Config) -> Self {
        Self { url, config, layout: None, next_row: 0, buffer: Vec::new(), records: Vec::new() }
    }

    fn add(&mut self, record: &[u8], offset: u64) -> Result<(), PartitionError> {
        if self.layout.is_none() {
            let keys = json::keys(record).map_err(|problem| json_problem(self.url, 0, offset, problem))?;
            let layout = Layout::resolve(self.config, |name| keys.iter().any(|key| key == name));
            self.layout = Some(Arc::new(layout.map_err(|problem| no_layout(self.url, problem))?));
        }
        let start = self.buffer.len();
        self.buffer.extend_from_slice(record);
        self.records.push((start..self.buffer.len(), offset));
        self.next_row += 1;
        Ok(())
    }

    fn take(&mut self) -> Result<Batch, PartitionError> {
        let layout = self.layout.clone().ok_or(PartitionError::Bug("a batch of JSON without a layout"))?;
        let records = std::mem::take(&mut self.records);
        let first_row = self.next_row - records.len() as u64;
        let buffer = std::mem::take(&mut self.buffer);
        Ok(Batch { object: Arc::from(self.url), first_row, content: Content::Json { layout, buffer, records } })
    }
}

/// Rows are counted from 0 here, and from 1 in what is told: as the lines of a file.
fn json_problem(url: &str, row: u64, offset: u64, problem: JsonProblem) -> PartitionError {
    match problem {
        JsonProblem::Field(problem) => field(url, row, problem),
        JsonProblem::Syntax { offset: within, problem, .. } => {
            syntax(url, row, &FramingProblem { offset: offset + within, problem })
        }
    }
}

fn field(url: &str, row: u64, problem: FieldProblem) -> PartitionError {
    let FieldProblem { field, found, expected, help } = problem;
    PartitionError::Field { object: url.to_owned(), row: row + 1, field, found, expected, help }
}

fn syntax(url: &str, row: u64, problem: &FramingProblem) -> PartitionError {
    let FramingProblem { offset, problem } = *problem;
    let help = "repair the input at that byte, or export it again";
    PartitionError::Syntax { object: url.to_owned(), row: row + 1, offset, problem, help }
}

fn no_layout(url: &str, problem: String) -> PartitionError {
    PartitionError::Object {
        object: url.to_owned(),
        problem,
        help: "name the layout with --shape, the text with --text-column, the unit with --unit-column or --unit-rule \
               record, the language with --language-column"
            .into(),
    }
}
