//! Cross-entropy at label positions, a chunk of rows at a time: logits of the whole batch would be the largest tensor
//! of the step (49,152 columns for SmolLM2, 128,256 for Llama 3), and nothing needs them at once.

use tch::{Device, Kind, Tensor};

use super::Batch;
use crate::LmError;
use crate::decoder::Decoder;
use crate::ops;

/// Most logits that are held at a time, on CPU and on CUDA: enough rows for the product to run at full speed.
const CHUNK: i64 = 1 << 25;
const CUDA_CHUNK: i64 = 1 << 27;

/// Products have whole multiples of this many rows: kernels for one row add up in another order than those for many, and
/// how many rows there are is a matter of company.
const ROWS: i64 = 8;

/// `([examples] f64 summed token losses, [1, tokens, hidden])`: the gradient of the sum of all token losses with
/// respect to the last layer's output.
pub(super) fn with_gradient(decoder: &Decoder, hidden: &Tensor, batch: &Batch) -> Result<(Tensor, Tensor), LmError> {
    let rows = Rows::new(decoder, hidden, batch)?;
    let normed_gradient = Tensor::f_empty_like(&rows.normed)?;
    let losses = rows.chunks(decoder, |chunk, labels, first| {
        let (losses, gradient) = ops::cross_entropy(chunk, labels, &decoder.output)?;
        normed_gradient.f_narrow(0, first, gradient.size()[0])?.f_copy_(&gradient)?;
        Ok(losses)
    })?;
    let gradient =
        ops::rms_norm_backward(&normed_gradient, &rows.picked, &decoder.norm, decoder.config.rms_norm_eps, None)?;
    let width = decoder.config.hidden_size;
    let mut whole = Tensor::f_zeros([batch.length(), width], (gradient.kind(), gradient.device()))?;
    let _ = whole.f_index_copy_(0, &rows.indices.f_narrow(0, 0, rows.count)?, &gradient.f_narrow(0, 0, rows.count)?)?;
    Ok((per_example(&losses, batch)?, whole.f_unsqueeze(0)?))
}

/// `[examples]` f64: summed token losses.
pub(super) fn without_gradient(decoder: &Decoder, hidden: &Tensor, batch: &Batch) -> Result<Tensor, LmError> {
    let rows = Rows::new(decoder, hidden, batch)?;
    let losses = rows.chunks(decoder, |chunk, labels, _| {
        let log_probabilities = chunk.f_log_softmax(-1, Kind::Float)?;
        Ok(log_probabilities.f_gather(1, &labels.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?)
    })?;
    per_example(&losses, batch)
}

/// The rows that have labels, and behind them copies of the first to fill the last [`ROWS`].
struct Rows {
    /// How many have labels.
    count: i64,
    indices: Tensor,
    labels: Tensor,
    /// `[rows, hidden]`: output of the last layer.
    picked: Tensor,
    /// The same after the final norm.
    normed: Tensor,
}

impl Rows {
    fn new(decoder: &Decoder, hidden: &Tensor, batch: &Batch) -> Result<Self, LmError> {
        let count = batch.rows.len();
        let filled = |values: &[i64]| -> Result<Tensor, LmError> {
            let mut values = values.to_vec();
            values.resize(count.next_multiple_of(ROWS as usize), values.first().copied().unwrap_or_default());
            Ok(Tensor::f_from_slice(&values)?.f_to_device(hidden.device())?)
        };
        let (indices, labels) = (filled(&batch.rows)?, filled(&batch.labels)?);
        let picked = hidden.f_reshape([-1, decoder.config.hidden_size])?.f_index_select(0, &indices)?;
        let normed = ops::rms_norm(&picked, &decoder.norm, decoder.config.rms_norm_eps)?;
        Ok(Self { count: count as i64, indices, labels, picked, normed })
    }

    /// Calls `each` with `(logits, labels, first row)` of every chunk, and joins the losses that it returns for rows with labels.
    fn chunks(
        &self,
        decoder: &Decoder,
        mut each: impl FnMut(Tensor, &Tensor, i64) -> Result<Tensor, LmError>,
    ) -> Result<Tensor, LmError> {
        let total = self.normed.size()[0];
        let chunk = if self.normed.device() == Device::Cpu { CHUNK } else { CUDA_CHUNK };
        let step = (chunk / decoder.config.vocab_size / ROWS * ROWS).max(2 * ROWS);
        let mut losses = vec![Tensor::f_zeros([0], (Kind::Float, self.normed.device()))?];
        let mut first = 0;
        while first < total {
            let count = step.min(total - first);
            let logits = ops::linear(&self.normed.f_narrow(0, first, count)?, &decoder.output, None, None)?;
            losses.push(each(logits, &self.labels.f_narrow(0, first, count)?, first)?);
            first += count;
        }
        Ok(Tensor::f_cat(&losses, 0)?.f_narrow(0, 0, self.count)?)
    }
}

/// Sums the rows' losses by example.
fn per_example(losses: &Tensor, batch: &Batch) -> Result<Tensor, LmError> {
    let owners = Tensor::f_from_slice(&batch.owners)?.f_to_device(losses.device())?;
    let zeros = Tensor::f_zeros([batch.examples], (Kind::Double, losses.device()))?;
    Ok(zeros.f_index_add(0, &owners, &losses.f_to_kind(Kind::Double)?)?)
}
