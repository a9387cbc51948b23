//! Reads a split of the corpus as tokenised units.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray};
use futures::TryStreamExt;
use lake::{Private, Table};
use lm::gradients::Example;
use lm::template::Prompt;
use lm::tokenizer::Tokenizer;
use stage::{Failure, progress::PrivateProgress};

use crate::step::Unit;

/// Units of each split, in the order of their ids.
pub struct Splits {
    /// Units to train on.
    pub train: Vec<Unit>,
    /// Units to measure on.
    pub validation: Vec<Unit>,
}

/// How a text becomes an example.
pub struct Encoding<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What stands before and after an instruction.
    pub prompt: &'a Prompt,
    /// Longest example, tokens.
    pub block_length: usize,
    /// Public seed of dropout.
    pub seed: u64,
}

/// Reads `version` of the corpus table and tokenises its train and validation splits.
pub async fn read(table: &Table, version: i64, encoding: &Encoding<'_>) -> Result<Splits, Failure> {
    let progress = PrivateProgress::new("read the corpus");
    let mut splits: [BTreeMap<String, Vec<Example>>; 2] = Default::default();
    let mut batches = table.scan(version, &["unit", "text", "split"]).await?;
    while let Some(batch) = batches.try_next().await? {
        let column = |index: usize| batch.column(index).as_string::<i32>();
        let (units, texts, names) = (column(0), column(1), column(2));
        for (index, name) in ["train", "validation"].iter().enumerate() {
            let rows: Vec<usize> = (0..names.len()).filter(|&row| names.value(row) == *name).collect();
            let texts: Vec<Private<&str>> = rows.iter().map(|&row| Private::new(texts.value(row))).collect();
            for (row, example) in rows.iter().zip(encoding.examples(&texts)?) {
                splits[index].entry(units.value(*row).to_string()).or_default().push(example);
            }
        }
        progress.tick();
    }
    let [train, validation] =
        splits.map(|split| split.into_iter().map(|(id, examples)| encoding.unit(id, examples)).collect::<Vec<_>>());
    Ok(Splits { train, validation })
}

impl Encoding<'_> {
    /// Prompt, instruction, end token; the instruction is cut so that the whole fits the block.
    fn examples(&self, texts: &[Private<&str>]) -> Result<Vec<Example>, Failure> {
        let texts: Vec<&str> = texts.iter().map(|text| *text.expose()).collect();
        let ids = self.tokenizer.encode_batch(&texts, false).map_err(|error| crate::run::failure(&error))?;
        Ok(ids.into_iter().map(|ids| self.example(ids)).collect())
    }

    fn example(&self, ids: Vec<i64>) -> Example {
        let prefix = self.prompt.prefix.len();
        let mut tokens = self.prompt.prefix.clone();
        tokens.extend(ids);
        tokens.push(self.prompt.end);
        // A text that was cut has no end token: the model must not learn that texts stop at the block's length.
        tokens.truncate(self.block_length);
        Example { tokens, prefix, dropout_seed: 0 }
    }

    /// Dropout masks follow from the unit and the record's place in it: another unit's presence must not move them,
    /// or adding one unit would change the gradients of all.
    fn unit(&self, id: String, mut examples: Vec<Example>) -> Unit {
        for (place, example) in examples.iter_mut().enumerate() {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.seed.to_le_bytes()).update(&(place as u64).to_le_bytes()).update(id.as_bytes());
            let bytes = hasher.finalize();
            example.dropout_seed = u64::from_le_bytes(std::array::from_fn(|index| bytes.as_bytes()[index]));
        }
        Unit { id, examples }
    }
}
