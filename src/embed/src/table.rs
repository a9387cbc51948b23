//! Rows of a table in, vectors out, in one zone, exactly once.
//!
//! The pinned version's rows, in their stable order, are cut into chunks of [`CHUNK_ROWS`]; shard i of N takes every
//! Nth chunk from the ith on. A chunk is one commit, so a killed shard goes on at the first chunk that is not there.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float32Builder, ListBuilder, RecordBatch, StringArray};
use arrow::datatypes::{DataType, SchemaRef};
use futures::TryStreamExt;
use lake::{AppTransaction, Table, schema};
use lm::encoder::Encoder;
use stage::{Failure, PrivateProgress, Progress, Shard};

use crate::args::Of;
use crate::failure;

/// Rows of one commit: large enough to find texts of one length, small enough to lose little when killed.
const CHUNK_ROWS: usize = 2048;

impl Of {
    /// Columns to read: id and text first, then those that go along.
    pub(crate) fn columns(self) -> &'static [&'static str] {
        match self {
            Of::Synthetic => &["id", "text"],
            Of::Corpus => &["record_id", "text", "unit", "split"],
        }
    }

    fn schema(self) -> SchemaRef {
        match self {
            Of::Synthetic => schema::embeddings(),
            Of::Corpus => schema::private_embeddings(),
        }
    }
}

/// What to embed, and where to.
#[derive(Clone, Debug)]
pub struct Work {
    /// Where the texts are.
    pub source: Table,
    /// Pinned version of it.
    pub version: i64,
    /// Where the vectors go: a table of the same zone.
    pub output: Table,
    /// Whose texts.
    pub of: Of,
    /// Which part of the work.
    pub shard: Shard,
    /// Application transaction of this shard.
    pub transaction: String,
    /// Padded tokens per batch.
    pub batch_tokens: usize,
}

/// Progress of the kind that the zone allows.
#[derive(Debug)]
pub enum Meter {
    /// Counts rows.
    Public(Progress),
    /// PRIVACY: shows no counts.
    Private(PrivateProgress),
}

impl Meter {
    /// Over public texts.
    pub fn public(rows: u64) -> Self {
        Meter::Public(Progress::public("embed", "rows", rows))
    }

    /// Over private records.
    pub fn private() -> Self {
        Meter::Private(PrivateProgress::new("embed the corpus"))
    }

    fn advance(&self, rows: usize) {
        match self {
            Meter::Public(progress) => progress.advance(rows as u64),
            Meter::Private(progress) => progress.tick(),
        }
    }

    fn skip(&self, rows: usize) {
        match self {
            Meter::Public(progress) => progress.resume(rows as u64),
            Meter::Private(progress) => progress.tick(),
        }
    }
}

/// Embeds this shard's rows, but for those of earlier attempts.
pub async fn embed(work: &Work, encoder: &Encoder, meter: &Meter) -> Result<(), Failure> {
    work.output.create(work.of.schema()).await?;
    let committed = work.output.last_chunk(&work.transaction).await?;
    let mut batches = work.source.scan(work.version, work.of.columns()).await?;
    let mut chunk = Chunk::new(work);
    while let Some(batch) = batches.try_next().await? {
        let mut rest = batch;
        while rest.num_rows() > 0 {
            let taken = rest.num_rows().min(CHUNK_ROWS - chunk.rows);
            chunk.push(rest.slice(0, taken));
            rest = rest.slice(taken, rest.num_rows() - taken);
            if chunk.rows == CHUNK_ROWS {
                chunk.finish(work, committed, encoder, meter).await?;
            }
        }
    }
    chunk.finish(work, committed, encoder, meter).await
}

/// Consecutive rows of the source.
struct Chunk {
    /// Place among all chunks of the source.
    number: u64,
    rows: usize,
    /// Empty for a chunk of another shard, whose rows are only counted.
    parts: Vec<RecordBatch>,
    shard: Shard,
}

impl Chunk {
    fn new(work: &Work) -> Self {
        Self { number: 0, rows: 0, parts: Vec::new(), shard: work.shard }
    }

    fn is_ours(&self) -> bool {
        self.number % u64::from(self.shard.count) == u64::from(self.shard.index)
    }

    fn push(&mut self, part: RecordBatch) {
        self.rows += part.num_rows();
        if self.is_ours() {
            self.parts.push(part);
        }
    }

    /// Embeds and commits the chunk unless that is done or another shard's work, and goes on to the next.
    async fn finish(
        &mut self,
        work: &Work,
        committed: Option<i64>,
        encoder: &Encoder,
        meter: &Meter,
    ) -> Result<(), Failure> {
        let rows = std::mem::take(&mut self.rows);
        let parts = std::mem::take(&mut self.parts);
        let ours = self.is_ours();
        let version = (self.number / u64::from(self.shard.count)) as i64;
        self.number += 1;
        if !ours || rows == 0 {
            return Ok(());
        }
        if committed >= Some(version) {
            meter.skip(rows);
            return Ok(());
        }
        let embedded = tokio::task::block_in_place(|| vectors(work, &parts, encoder))?;
        work.output.append(vec![embedded], AppTransaction { id: work.transaction.clone(), version }).await?;
        meter.advance(rows);
        Ok(())
    }
}

/// The output rows of a chunk.
fn vectors(work: &Work, parts: &[RecordBatch], encoder: &Encoder) -> Result<RecordBatch, Failure> {
    let column = |name: &str| -> Vec<&str> {
        let place = work.of.columns().iter().position(|column| *column == name).unwrap_or_default();
        parts
            .iter()
            .flat_map(|part| part.column(place).as_string::<i32>().iter())
            .map(Option::unwrap_or_default)
            .collect()
    };
    let vectors = encoder.embed(&column("text"), work.batch_tokens).map_err(failure)?;
    let schema = work.of.schema();
    let arrays: Vec<ArrayRef> = schema
        .fields()
        .iter()
        .map(|field| match (field.name().as_str(), field.data_type()) {
            ("embedding", DataType::List(item)) => {
                let mut list = ListBuilder::new(Float32Builder::new()).with_field(item.clone());
                for vector in &vectors {
                    list.values().append_slice(vector);
                    list.append(true);
                }
                Arc::new(list.finish()) as ArrayRef
            }
            ("id", _) => Arc::new(StringArray::from_iter_values(column(work.of.columns()[0]))) as ArrayRef,
            (name, _) => Arc::new(StringArray::from_iter_values(column(name))) as ArrayRef,
        })
        .collect();
    RecordBatch::try_new(schema, arrays).map_err(|_| Failure::Bug("embed: the columns do not fit their table".into()))
}
