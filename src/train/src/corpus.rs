//! Reads a split of the corpus as tokenised units.

use std::collections::{BTreeMap, HashSet};

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

/// Refuses `version` of the corpus table where its train split has fewer units than the expected batch; reads no
/// further than it must.
///
/// PRIVACY: this tells whoever starts the stage one bit about the corpus's size, as the error that was asked for; no
/// number. It comes before a run id is bound and anything reserved: afterwards the bit would be the same, and the budget
/// gone.
pub async fn check_size(table: &Table, version: i64, expected_batch_size: f64) -> Result<(), Failure> {
    let mut units = HashSet::new();
    let mut batches = table.scan(version, &["unit", "split"]).await?;
    while let Some(batch) = batches.try_next().await? {
        let (ids, splits) = (batch.column(0).as_string::<i32>(), batch.column(1).as_string::<i32>());
        let train = ids.iter().zip(splits).filter(|(_, split)| *split == Some("train"));
        units.extend(train.filter_map(|(id, _)| id.map(str::to_string)));
        if units.len() as f64 >= expected_batch_size {
            return Ok(());
        }
    }
    let (found, help) = match units.is_empty() {
        true => ("has no rows".into(), "run partition on an input with instructions"),
        false => (
            format!("has fewer units than the expected batch of {expected_batch_size}"),
            "lower --expected-batch-size and declare the units with --records; what partition counted is in the \
             private root, at runs/RUN/partition-counts.json",
        ),
    };
    Err(Failure::Input(format!("{}: version {version}: the train split {found}\nhelp: {help}", table.url())))
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
    /// Of each text the example; the instruction is cut so that the whole fits the block.
    fn examples(&self, texts: &[Private<&str>]) -> Result<Vec<Example>, Failure> {
        let texts: Vec<&str> = texts.iter().map(|text| *text.expose()).collect();
        let ids = self.tokenizer.encode_batch(&texts, false).map_err(crate::failure)?;
        Ok(ids.into_iter().map(|ids| self.example(ids)).collect())
    }

    /// Prompt, the instruction of these ids, end token.
    pub fn example(&self, ids: Vec<i64>) -> Example {
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, RecordBatch, StringArray};
    use lake::{AppTransaction, PrivateRoot, StorageOptions, Zone, schema};
    use lm::template::Template;
    use scenarios::models;

    use super::*;
    use crate::adapter::{BaselineAdapter, Training, Update};
    use crate::args::Mechanism;
    use crate::step::{Limits, sum_gradients};
    use crate::testing;

    const BLOCK: usize = 24;

    /// A corpus of `(unit, text, split)`.
    async fn corpus(folder: &Path, rows: &[(&str, &str, &str)]) -> Table {
        let root = PrivateRoot::open(folder.to_str().unwrap(), &StorageOptions::default()).await.unwrap();
        let table = root.table(&format!("corpora/{}", rows.len()));
        table.create(schema::corpus()).await.unwrap();
        let text = |of: fn(&(&str, &str, &str)) -> String| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
        };
        let columns = vec![
            text(|row| format!("{}/{}", row.0, row.1)),
            text(|row| row.0.into()),
            text(|row| row.1.into()),
            text(|row| row.2.into()),
        ];
        let batch = RecordBatch::try_new(schema::corpus(), columns).unwrap();
        table.append(vec![batch], AppTransaction { id: "test".into(), version: 0 }).await.unwrap();
        table
    }

    /// Its splits, read with a model whose tokens are characters.
    async fn splits(folder: &Path, rows: &[(&str, &str, &str)]) -> (Splits, Prompt) {
        let model = folder.join("llama");
        models::write_llama(&model, 1).unwrap();
        let checkpoint = lm::checkpoint::Checkpoint::open(&model).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        let prompt = Prompt::new(Template::None, &tokenizer, &checkpoint.decoder_config().unwrap()).unwrap();
        let table = corpus(folder, rows).await;
        let encoding = Encoding { tokenizer: &tokenizer, prompt: &prompt, block_length: BLOCK, seed: 5 };
        let splits = read(&table, table.pin().await.unwrap(), &encoding).await.unwrap();
        (splits, prompt)
    }

    #[tokio::test]
    async fn a_text_that_is_cut_has_no_end_token() {
        let folder = tempfile::tempdir().unwrap();
        let long = "far longer than the block that it has to fit into";
        let (splits, prompt) = splits(folder.path(), &[("a", "short", "train"), ("b", long, "train")]).await;
        let [short, cut] = [0, 1].map(|unit| &splits.train[unit].examples[0]);
        assert_eq!(short.tokens.len(), prompt.prefix.len() + "short".len() + 1);
        assert_eq!(short.tokens.last(), Some(&prompt.end));
        assert_eq!(cut.tokens.len(), BLOCK);
        assert!(!cut.tokens[prompt.prefix.len()..].contains(&prompt.end));
        assert!([short, cut].iter().all(|example| example.tokens.starts_with(&prompt.prefix)));
    }

    #[tokio::test]
    async fn splits_are_kept_apart_and_the_test_split_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let rows = [("a", "one", "train"), ("b", "two", "validation"), ("c", "three", "test"), ("a", "four", "train")];
        let (splits, _) = splits(folder.path(), &rows).await;
        let shape = |units: &[Unit]| -> Vec<(String, usize)> {
            units.iter().map(|unit| (unit.id.clone(), unit.examples.len())).collect()
        };
        assert_eq!(shape(&splits.train), [("a".to_string(), 2)]);
        assert_eq!(shape(&splits.validation), [("b".to_string(), 1)]);
    }

    #[tokio::test]
    async fn the_train_split_has_at_least_as_many_units_as_a_batch_expects() {
        let folder = tempfile::tempdir().unwrap();
        let told = async |rows: &[(&str, &str, &str)], expected_batch_size| {
            let table = corpus(folder.path(), rows).await;
            let found = check_size(&table, table.pin().await.unwrap(), expected_batch_size).await;
            found.err().map(|failure| failure.to_string()).unwrap_or_default()
        };
        // Two units have three records, and neither of the other splits counts.
        let rows = [
            ("a", "one", "train"),
            ("a", "two", "train"),
            ("b", "three", "train"),
            ("c", "four", "validation"),
            ("d", "five", "test"),
        ];
        assert_eq!(told(&rows[..], 2.0).await, "");
        let few = told(&rows[..4], 2.5).await;
        assert!(few.contains("fewer units than the expected batch of 2.5\nhelp: lower --expected-batch-size"), "{few}");
        let none = told(&rows[3..], 0.5).await;
        assert!(none.contains("the train split has no rows\nhelp: run partition"), "{none}");
    }

    #[tokio::test]
    async fn dropout_of_a_unit_does_not_depend_on_the_other_units() {
        let folder = tempfile::tempdir().unwrap();
        let rows = [("m", "one", "train"), ("m", "two", "train"), ("z", "one", "train"), ("a", "new", "train")];
        let (alone, _) = splits(folder.path(), &rows[..3]).await;
        let (joined, _) = splits(folder.path(), &rows).await;
        let seeds = |units: &[Unit]| -> Vec<u64> {
            units.iter().flat_map(|unit| &unit.examples).map(|example| example.dropout_seed).collect()
        };
        // The new unit comes first in order, and everybody else keeps their seeds.
        assert_eq!(joined.train[0].id, "a");
        assert_eq!(seeds(&joined.train[1..]), seeds(&alone.train));
        let mut distinct = seeds(&joined.train);
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 4, "no two examples share a mask");
    }

    #[test]
    fn each_step_has_other_dropout_masks() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, mut lora) = testing::tiny(folder.path());
        lora.config.dropout = 0.5;
        let mechanism = Mechanism::Baseline { sampling_probability: 1.0, steps: 2, expected_batch_size: 1.0 };
        let limits = Limits { block_length: 32, micro_batch_tokens: 64 };
        let units = testing::units(3);
        let units: Vec<&Unit> = units.iter().collect();
        // The first moment after one step is a tenth of the gradient.
        let gradient = |step: u64| -> Vec<f32> {
            let (_, start) = testing::tiny(folder.path());
            let mut adapter = BaselineAdapter::new(Training::new(start));
            let sum = sum_gradients(&decoder, &lora, &mechanism, &units, step, limits).unwrap();
            adapter.apply(&sum, 1.0, Update { learning_rate: 0.1, weight_decay: 0.0 }).unwrap();
            Vec::try_from(adapter.training().first[0].flatten(0, -1)).unwrap()
        };
        assert_eq!(gradient(0), gradient(0));
        assert_ne!(gradient(0), gradient(1));
    }
}
