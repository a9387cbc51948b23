//! Samples as rows of the table `synthetic`.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray};
use lake::schema;
use stage::Failure;

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its seed.
    pub seed: u64,
    /// Its text, special tokens left out; may be empty.
    pub text: String,
    /// Sampled tokens, the end token left out.
    pub tokens: usize,
    /// Whether an end token ended it, or the length limit.
    pub stopped: bool,
    /// Mean log-probability of its tokens.
    pub mean_logprob: f32,
}

/// Rows of the samples `chunk` of `run`, drawn by `shard`.
pub fn batch(run: &str, shard: u32, chunk: &[(u64, Sample)]) -> Result<RecordBatch, Failure> {
    // Narrowing is safe: flags bound shards and tokens.
    let of = |column: &str| -> Option<ArrayRef> {
        let samples = chunk.iter().map(|(_, sample)| sample);
        let reason = |sample: &Sample| if sample.stopped { "stop" } else { "length" };
        Some(match column {
            "id" => Arc::new(StringArray::from_iter_values(chunk.iter().map(|(index, _)| id(run, *index)))),
            "shard" => Arc::new(Int32Array::from_value(shard as i32, chunk.len())),
            "seed" => Arc::new(Int64Array::from_iter_values(samples.map(|sample| sample.seed as i64))),
            "text" => Arc::new(StringArray::from_iter_values(samples.map(|sample| sample.text.as_str()))),
            "tokens" => Arc::new(Int32Array::from_iter_values(samples.map(|sample| sample.tokens as i32))),
            "finish_reason" => Arc::new(StringArray::from_iter_values(samples.map(reason))),
            "mean_logprob" => Arc::new(Float32Array::from_iter_values(samples.map(|sample| sample.mean_logprob))),
            _ => return None,
        })
    };
    let schema = schema::synthetic();
    let columns: Option<Vec<ArrayRef>> = schema.fields().iter().map(|field| of(field.name())).collect();
    let columns =
        columns.ok_or_else(|| Failure::Bug("synthesize: the table has a column that is not filled".into()))?;
    RecordBatch::try_new(schema, columns)
        .map_err(|_| Failure::Bug("synthesize: the rows do not fit their table".into()))
}

/// A sample's id: its run, and its number in as many digits as sort well.
fn id(run: &str, index: u64) -> String {
    format!("{run}-{index:08}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fit_the_table() {
        let sample = Sample { seed: 5, text: String::new(), tokens: 0, stopped: true, mean_logprob: -0.5 };
        let rows = batch("demo", 3, &[(7, sample)]).unwrap();
        assert_eq!((rows.num_rows(), rows.schema()), (1, schema::synthetic()));
    }
}
