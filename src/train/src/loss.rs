//! Validation loss, for the private zone only.

use std::sync::Arc;

use arrow::array::{Float64Array, Int64Array, RecordBatch, StringArray};
use lake::{AppTransaction, LakeError, Private, PrivateRoot, Zone, layout, schema};
use lm::LmError;
use lm::adapter::Lora;
use lm::decoder::Decoder;
use lm::gradients::{Example, micro_batches, token_losses};

use crate::step::Unit;

/// Mean loss per label token over all examples of `units`, nats; `None` without any.
pub fn mean(
    decoder: &Decoder,
    lora: &Lora,
    units: &[Unit],
    micro_batch_tokens: usize,
) -> Result<Option<Private<f64>>, LmError> {
    let examples: Vec<&Example> = units.iter().flat_map(|unit| &unit.examples).collect();
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let (mut loss, mut labels) = (0.0, 0);
    for batch in micro_batches(&lengths, micro_batch_tokens) {
        let batch: Vec<Example> = batch.into_iter().map(|index| examples[index].clone()).collect();
        let (losses, counts) = token_losses(decoder, lora, &batch)?;
        loss += losses.iter().sum::<f64>();
        labels += counts.iter().sum::<u64>();
    }
    Ok((labels > 0).then(|| Private::new(loss / labels as f64)))
}

/// Appends one row to the private `loss` table of `stage` of `run`, once for each step.
pub async fn record(
    root: &PrivateRoot,
    run: &str,
    stage: &str,
    step: u64,
    loss: &Private<f64>,
) -> Result<(), LakeError> {
    let table = root.table(&layout::loss(run, stage));
    table.create(schema::loss()).await?;
    let step = i64::try_from(step).unwrap_or(i64::MAX);
    let columns: Vec<arrow::array::ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![step])),
        Arc::new(StringArray::from(vec!["validation"])),
        Arc::new(Float64Array::from(vec![*loss.expose()])),
    ];
    let batch = RecordBatch::try_new(schema::loss(), columns)
        .map_err(|error| LakeError::Malformed(format!("{}: {error}", table.url())))?;
    let transaction = AppTransaction { id: format!("{run}/{stage}/loss/{step}"), version: 0 };
    table.append(vec![batch], transaction).await?;
    Ok(())
}
