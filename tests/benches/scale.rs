//! What tests/bench/scale.py measures with: generated conversations, tables written and read by doppel's own table code,
//! and the S3 server of the tests.
//!
//! `conversations FILE ROWS WORDS`, `embeddings ROOT ROWS`, `synthetic ROOT ROWS WORDS` write; `scan ROOT` reads the
//! embeddings; `server` starts the S3 server, prints its environment as JSON and stays until standard input ends. WORDS is
//! ShareGPT's file: words are drawn as often as they stand there, so that texts are as compressible, and as varied, as
//! real ones. Whatever appends or scans prints how many seconds that took, without the start of the process.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, AsArray, Float32Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Float32Type, SchemaRef};
use futures::TryStreamExt;
use lake::{AppTransaction, ReleaseRoot, StorageOptions, Table, Zone, schema};
use scenarios::s3::{Key, S3};

/// Width of an embedding.
const WIDTH: usize = 768;
/// Rows of a commit: as many as embed writes at a time, and as large a file of texts.
const EMBEDDINGS: usize = 2_048;
const TEXTS: usize = 100_000;
/// Bytes of a conversation, about.
const CONVERSATION: usize = 2_000;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> Outcome {
    // `cargo test --benches` adds a flag and nothing else: that it starts is all that it checks.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => Ok(()),
        ["server"] => server(),
        ["conversations", file, rows, words] => conversations(Path::new(file), rows.parse()?, &Words::read(words)?),
        ["embeddings", root, rows] => append(root, "embeddings", rows.parse()?, EMBEDDINGS, embeddings),
        ["synthetic", root, rows, words] => {
            let words = Words::read(words)?;
            append(root, "synthetic", rows.parse()?, TEXTS, |from, count| synthetic(&words, from, count))
        }
        ["scan", root] => scan(root),
        other => Err(format!("{other:?}: see the head of tests/benches/scale.rs").into()),
    }
}

fn server() -> Outcome {
    let server = S3::start()?;
    let environment: serde_json::Map<_, _> =
        server.environment(Key::Both).into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    println!("{}", serde_json::json!({ "root": server.release_url("scale"), "environment": environment }));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// SplitMix64 (Steele, Lea, Flood 2014) at a place: the same numbers in whichever order they are asked for.
fn random(row: usize, draw: usize) -> u64 {
    let mut mixed = ((row as u64) << 20 | draw as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The words of real texts, in their order.
struct Words(Vec<String>);

impl Words {
    fn read(path: &str) -> Result<Self, Box<dyn Error>> {
        let mut text = Vec::new();
        File::open(path)?.take(16 << 20).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text).replace("\\n", " ");
        let plain = |word: &&str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphabetic());
        Ok(Self(text.split(' ').filter(plain).map(str::to_owned).collect()))
    }

    /// Appends words drawn for `row` until `text` has `bytes` bytes more.
    fn draw(&self, row: usize, bytes: usize, text: &mut String) {
        let (end, mut draw) = (text.len() + bytes, 0);
        while text.len() < end {
            text.push_str(&self.0[random(row, draw) as usize % self.0.len()]);
            text.push(' ');
            draw += 1;
        }
        text.pop();
    }

    /// A first turn of 50 to 3,200 bytes, its logarithm even. Of twenty, one is a popular prompt word for word, and two
    /// begin with one: the copies and templates that deduplication is there for.
    fn instruction(&self, row: usize, text: &mut String) {
        let kind = random(row, 1 << 19) % 20;
        if kind < 3 {
            // The square makes some popular prompts far more popular than others.
            let popular = (random(row, (1 << 19) + 1) % 1000).pow(2) as usize / 100;
            self.draw((1 << 40) + popular, 150, text);
            text.push(' ');
        }
        if kind > 0 {
            let bytes = 50.0 * 64_f64.powf(random(row, (1 << 19) + 2) as f64 / 2_f64.powi(64));
            self.draw(row, bytes as usize, text);
        }
    }
}

fn conversations(file: &Path, rows: usize, words: &Words) -> Outcome {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    let mut line = String::new();
    for row in 0..rows {
        line.clear();
        line.push_str(&format!("{{\"id\":\"c{row:08}_0\",\"conversations\":[{{\"from\":\"human\",\"value\":\""));
        words.instruction(row, &mut line);
        line.push_str("\"},{\"from\":\"gpt\",\"value\":\"");
        let answer = CONVERSATION.saturating_sub(line.len()).max(100);
        words.draw((1 << 41) + row, answer, &mut line);
        line.push_str("\"}]}\n");
        out.write_all(line.as_bytes())?;
    }
    Ok(out.flush()?)
}

fn run<T>(work: impl Future<Output = Result<T, Box<dyn Error>>>) -> Result<T, Box<dyn Error>> {
    tokio::runtime::Runtime::new()?.block_on(work)
}

async fn table(root: &str, name: &str) -> Result<Table, Box<dyn Error>> {
    let root = ReleaseRoot::open(root, &StorageOptions::default()).await?;
    Ok(root.table(&format!("runs/scale/{name}")))
}

/// Appends `rows` rows, `chunk` at a time. Making them is not timed.
fn append(
    root: &str,
    name: &str,
    rows: usize,
    chunk: usize,
    make: impl Fn(usize, usize) -> Result<RecordBatch, Box<dyn Error>>,
) -> Outcome {
    let seconds = run(async {
        let table = table(root, name).await?;
        let mut spent = Duration::ZERO;
        for (version, from) in (0..rows).step_by(chunk).enumerate() {
            let batch = make(from, chunk.min(rows - from))?;
            let started = Instant::now();
            table.create(batch.schema()).await?;
            let transaction = AppTransaction { id: "scale/0-of-1".into(), version: version as i64 };
            table.append(vec![batch], transaction).await?;
            spent += started.elapsed();
        }
        Ok(spent.as_secs_f64())
    })?;
    println!("{}", serde_json::json!({ "seconds": seconds, "amount": rows }));
    Ok(())
}

fn columns(schema: SchemaRef, columns: Vec<ArrayRef>) -> Result<RecordBatch, Box<dyn Error>> {
    Ok(RecordBatch::try_new(schema, columns)?)
}

fn ids(from: usize, count: usize) -> ArrayRef {
    Arc::new(StringArray::from_iter_values((from..from + count).map(|row| format!("s0-{row:08}"))))
}

/// Random bits in the mantissa, as in a real embedding: nothing compresses them.
fn embeddings(from: usize, count: usize) -> Result<RecordBatch, Box<dyn Error>> {
    let schema = schema::embeddings();
    let DataType::List(element) = schema.field(1).data_type().clone() else { return Err("no list".into()) };
    let value = |index: usize| (random(from, index) as f64 / 2_f64.powi(64) - 0.5) as f32 / 16.0;
    let values = Float32Array::from_iter_values((0..count * WIDTH).map(value));
    let lists = ListArray::new(element, OffsetBuffer::from_lengths((0..count).map(|_| WIDTH)), Arc::new(values), None);
    columns(schema, vec![ids(from, count), Arc::new(lists)])
}

fn synthetic(words: &Words, from: usize, count: usize) -> Result<RecordBatch, Box<dyn Error>> {
    let texts: Vec<String> = (from..from + count)
        .map(|row| {
            let mut text = String::new();
            words.draw(row, 30 + random(row, 1 << 19) as usize % 200, &mut text);
            text
        })
        .collect();
    let tokens: Vec<i32> = texts.iter().map(|text| text.len() as i32 / 4).collect();
    let reasons = tokens.iter().map(|&tokens| if tokens > 50 { "length" } else { "stop" });
    columns(
        schema::synthetic(),
        vec![
            ids(from, count),
            Arc::new(Int32Array::from(vec![0; count])),
            Arc::new(Int64Array::from_iter_values((from..from + count).map(|row| row as i64))),
            Arc::new(StringArray::from_iter_values(&texts)),
            Arc::new(Int32Array::from(tokens.clone())),
            Arc::new(StringArray::from_iter_values(reasons)),
            Arc::new(Float32Array::from_iter_values((from..from + count).map(|row| -(random(row, 7) as f32) / 1e19))),
        ],
    )
}

/// Reads all embeddings into memory, a batch at a time.
fn scan(root: &str) -> Outcome {
    let (rows, width, seconds) = run(async {
        let table = table(root, "embeddings").await?;
        let started = Instant::now();
        let mut batches = table.scan(table.pin().await?, &["id", "embedding"]).await?;
        let (mut rows, mut values) = (0, 0);
        while let Some(batch) = batches.try_next().await? {
            rows += batch.num_rows();
            values += batch.column(1).as_list::<i32>().values().as_primitive::<Float32Type>().len();
        }
        Ok((rows, values / rows.max(1), started.elapsed().as_secs_f64()))
    })?;
    println!("{}", serde_json::json!({ "seconds": seconds, "amount": rows, "width": width }));
    Ok(())
}
