//! Per-example LoRA gradients from one backward pass.
//!
//! The backward pass is written out rather than left to autograd. Only what LoRA needs is computed: no gradient of a
//! frozen weight, none below the first layer's projections, logits at label positions alone. An example's own gradient
//! is a batched product of what passes by anyway (Lee and Kifer 2020, arXiv 2009.03106): for `y = x·Aᵀ·Bᵀ` it is
//! `∂B = ∂yᵀ·(x·Aᵀ)` and `∂A = (∂y·B)ᵀ·x`, with the example as the batch dimension. The tests hold all of it against
//! autograd and finite differences of the plain forward pass in [`crate::decoder`].
//!
//! Examples stand one behind the other in one long row of tokens, so that the products with frozen weights are few and
//! large; the gradients of the factors, and attention by libtorch, are computed by groups of one length. Each example
//! is padded on the right. Attention is causal, so padding is never seen by a real token; its own gradient is zero
//! because it has no labels. Hence an example's loss and gradient do not depend on its company other than by rounding;
//! and since each is padded by its own length alone, and a row of a product does not depend on how many rows there are,
//! not by rounding either: on a CPU with AVX2, bit for bit. Without that, a neighbour's length would move a gradient in
//! bf16 by some percent, and one more privacy unit in the batch would move everybody's.

mod attention;
mod backward;
mod dropout;
mod loss;

use tch::{Kind, Tensor};

use crate::adapter::Lora;
use crate::cuda::{self, Sequences};
use crate::decoder::layer::Factors;
use crate::decoder::{Adapters, Decoder};
use crate::padding::Padding;
use crate::workers::{self, Shared};
use crate::{LmError, decoder, ops};

/// One training example: token ids and where the labels begin.
#[derive(Clone)]
pub struct Example {
    /// Prefix, instruction, end token: at most block_length ids.
    pub tokens: Vec<i64>,
    /// Number of leading ids that are never labels (at least 1).
    pub prefix: usize,
    /// Seed of this example's dropout masks: they must not depend on who shares the batch, or adding one privacy unit
    /// would change the gradients of others.
    pub dropout_seed: u64,
}

/// Losses and gradients of a micro-batch.
pub struct ExampleGradients {
    /// `[examples]` f32: token losses summed ÷ block length (the paper's), independent of the batch.
    pub losses: Tensor,
    /// One `[examples, …shape of the tensor]` f32 per adapter tensor, in [`Lora`]'s order.
    pub gradients: Vec<Tensor>,
}

/// `[rows]` f64: the square of each row's norm, of `[rows, n]` f32 gradients: on CPU, bit for bit whatever rows are beside it.
pub fn squared_norms(gradients: &Tensor) -> Result<Tensor, LmError> {
    ops::squares(gradients)
}

/// Loss of each example = sum of its token losses ÷ `block_length`, and its gradient for each adapter tensor.
pub fn example_gradients(
    decoder: &Decoder,
    lora: &Lora,
    examples: &[Example],
    block_length: usize,
) -> Result<ExampleGradients, LmError> {
    lora.check(&decoder.config)?;
    let scale = scale(block_length)?;
    if examples.is_empty() {
        return empty(decoder, lora);
    }
    let adapters = tch::no_grad(|| adapters(decoder, lora))?;
    let parts = in_parts(decoder, lora, &adapters, examples, |decoder, lora, adapters, examples| {
        gradients_of(
            decoder,
            lora,
            adapters,
            examples,
            Batch::new(decoder, examples, padding(decoder, adapters))?,
            scale,
        )
    })?;
    let mut gradients = join(parts)?;
    let losses = gradients.pop().unwrap_or_default();
    Ok(ExampleGradients { losses, gradients })
}

/// What the gradients of [`example_gradients`] add up to, in the adapter tensors' shapes, for less: no example's own is
/// computed.
pub fn summed_gradients(
    decoder: &Decoder,
    lora: &Lora,
    examples: &[Example],
    block_length: usize,
) -> Result<Vec<Tensor>, LmError> {
    lora.check(&decoder.config)?;
    let scale = scale(block_length)?;
    let adapters = tch::no_grad(|| adapters(decoder, lora))?;
    let parts = in_parts(decoder, lora, &adapters, examples, |decoder, lora, adapters, examples| {
        gradients_of(
            decoder,
            lora,
            adapters,
            examples,
            Batch::new(decoder, examples, padding(decoder, adapters))?.together(),
            scale,
        )
    })?;
    let mut sums: Vec<Tensor> =
        lora.tensors.iter().map(|(_, tensor)| tensor.f_zeros_like()).collect::<Result<_, _>>()?;
    for part in parts {
        for (sum, gradient) in sums.iter_mut().zip(part.tensors) {
            let _ = sum.f_add_(&gradient.f_squeeze_dim(0)?)?;
        }
    }
    Ok(sums)
}

/// What a token's loss is multiplied by.
fn scale(block_length: usize) -> Result<f64, LmError> {
    match block_length {
        0 => Err(LmError::Usage("block length 0\nhelp: give a --block-length of at least 1".into())),
        _ => Ok(1.0 / block_length as f64),
    }
}

/// Gradients for each adapter tensor, one for each of the batch's sums, then the losses of the examples.
fn gradients_of(
    decoder: &Decoder,
    lora: &Lora,
    adapters: &[Adapters],
    examples: &[Example],
    batch: Batch,
    scale: f64,
) -> Result<Vec<Tensor>, LmError> {
    let masks = dropout::Masks::new(lora.config.dropout, decoder, examples, &batch);
    let keep = batch.length() <= backward::room(decoder);
    let tape = backward::Tape::forward(decoder, adapters, &batch, &masks, keep)?;
    let (losses, gradient) = loss::with_gradient(decoder, tape.output(), &batch)?;
    let mut found = tape.backward(lora, gradient, scale)?;
    found.push(losses.f_mul_scalar(scale)?.f_to_kind(Kind::Float)?);
    Ok(found)
}

/// How many micro-batches [`fold`] works on at once.
pub fn workers(decoder: &Decoder) -> usize {
    workers::count(decoder.compute.device)
}

/// Lets all workers of the decoder's device take micro-batches from the front until none is left, each adding to a state of
/// its own that `start` makes; their states, of which there is none without micro-batches. Gradients that `work` computes
/// are not split any further.
pub fn fold<P: Send, S: Send>(
    decoder: &Decoder,
    lora: &Lora,
    micro_batches: Vec<P>,
    start: impl Fn() -> Result<S, LmError> + Sync,
    work: impl Fn(&Decoder, &Lora, &mut S, P) -> Result<(), LmError> + Sync,
) -> Result<Vec<S>, LmError> {
    let device = decoder.compute.device;
    let (decoder, lora) = (Shared::new(decoder), Shared::new(lora));
    workers::fold(device, micro_batches, start, |state, part| work(decoder.get(), lora.get(), state, part))
}

/// Sum of token losses and number of label tokens of each example, without gradient: `(Vec<f64>, Vec<u64>)`.
pub fn token_losses(decoder: &Decoder, lora: &Lora, examples: &[Example]) -> Result<(Vec<f64>, Vec<u64>), LmError> {
    lora.check(&decoder.config)?;
    if examples.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let adapters = tch::no_grad(|| adapters(decoder, lora))?;
    let parts = in_parts(decoder, lora, &adapters, examples, |decoder, _, adapters, examples| {
        let batch = Batch::new(decoder, examples, padding(decoder, adapters))?;
        let masks = dropout::Masks::new(0.0, decoder, examples, &batch);
        let hidden = backward::output(decoder, adapters, &batch, &masks)?;
        Ok(vec![loss::without_gradient(decoder, &hidden, &batch)?])
    })?;
    let losses = join(parts)?.pop().unwrap_or_default().f_to_device(tch::Device::Cpu)?;
    Ok((Vec::<f64>::try_from(losses)?, examples.iter().map(|example| labels(example).len() as u64).collect()))
}

/// Splits examples over the workers, and gives each its part: the longest first, so that parts are padded little.
fn in_parts(
    decoder: &Decoder,
    lora: &Lora,
    adapters: &Vec<Adapters>,
    examples: &[Example],
    work: impl Fn(&Decoder, &Lora, &[Adapters], &[Example]) -> Result<Vec<Tensor>, LmError> + Sync,
) -> Result<Vec<Part>, LmError> {
    let (decoder, lora, adapters) = (Shared::new(decoder), Shared::new(lora), Shared::new(adapters));
    let shares = shares(examples, workers::count(decoder.get().compute.device));
    workers::each(shares, |indices| {
        let mine: Vec<Example> = indices.iter().map(|&index| examples[index].clone()).collect();
        let tensors = tch::no_grad(|| work(decoder.get(), lora.get(), adapters.get(), &mine))?;
        Ok(Part { indices, tensors })
    })
}

/// What one worker found for its examples.
struct Part {
    indices: Vec<usize>,
    tensors: Vec<Tensor>,
}

/// Indices of examples by falling length, cut into at most `count` runs of about equal work.
fn shares(examples: &[Example], count: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(examples[index].tokens.len()), index));
    let length = |index: usize| examples[index].tokens.len().max(1);
    let total: usize = order.iter().map(|&index| length(index)).sum();
    let mut shares = vec![Vec::new(); count.max(1)];
    let mut before = 0;
    for index in order {
        // The middle of an example decides to whom it belongs.
        let share = (2 * before + length(index)) * shares.len() / (2 * total);
        shares[share].push(index);
        before += length(index);
    }
    shares.retain(|share| !share.is_empty());
    shares
}

/// Joins the parts' tensors along their first dimension, in the order of the examples.
fn join(mut parts: Vec<Part>) -> Result<Vec<Tensor>, LmError> {
    if parts.len() == 1 && parts[0].indices.is_sorted() {
        return Ok(parts.remove(0).tensors);
    }
    let order: Vec<usize> = parts.iter().flat_map(|part| part.indices.iter().copied()).collect();
    let mut places = vec![0i64; order.len()];
    for (place, &index) in order.iter().enumerate() {
        places[index] = place as i64;
    }
    let joined = concatenate(parts.into_iter().map(|part| part.tensors).collect())?;
    if order.is_sorted() {
        return Ok(joined);
    }
    let places = Tensor::f_from_slice(&places)?;
    joined.iter().map(|whole| Ok(whole.f_index_select(0, &places.f_to_device(whole.device())?)?)).collect()
}

/// Joins the n-th tensors of all parts along their first dimension, for every n.
fn concatenate(mut parts: Vec<Vec<Tensor>>) -> Result<Vec<Tensor>, LmError> {
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    let count = parts.first().map_or(0, Vec::len);
    let mut columns: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
    (0..count)
        .map(|_| {
            let pieces: Vec<Tensor> = columns.iter_mut().filter_map(Iterator::next).collect();
            Ok(Tensor::f_cat(&pieces, 0)?)
        })
        .collect()
}

/// Groups indices of examples by length into micro-batches of at most `tokens` padded tokens (at least one example each).
///
/// The longest come first, so that a step that does not fit into memory fails at once.
pub fn micro_batches(lengths: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * lengths[batch[0]] <= tokens => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

/// Padded tokens of a micro-batch where nobody says: as many as a device computes at full speed, but no more than it has
/// room for without computing anything twice.
pub fn usual_tokens(decoder: &Decoder) -> usize {
    const CPU: usize = 2048;
    const GPU: i64 = 8192;
    match decoder.compute.device.is_cuda() {
        true => backward::room(decoder).clamp(1, GPU) as usize,
        false => CPU,
    }
}

/// What goes into the model: all tokens but the last, which predicts nothing and is seen by no other.
fn inputs(example: &Example) -> &[i64] {
    example.tokens.split_last().map_or(&[], |(_, inputs)| inputs)
}

/// How examples are padded: by what computes all products between rows of one example and those of another.
fn padding(decoder: &Decoder, adapters: &[Adapters]) -> Padding {
    let config = &decoder.config;
    let factors = adapters.iter().flat_map(|adapters| [&adapters.qkv, &adapters.o]).flatten();
    let widths = [config.hidden_size, config.intermediate_size, config.head_dim];
    match ops::multiplies_all(decoder.compute, factors.map(Factors::ranks).chain(widths)) {
        true => Padding::Pairs,
        false => Padding::Fours,
    }
}

/// Examples one behind the other, each padded on the right.
pub(crate) struct Batch {
    /// `[1, tokens]` i64.
    tokens: Tensor,
    /// `[tokens]` i64: the place of each token in its example.
    positions: Tensor,
    /// Neighbours of one padded length.
    groups: Vec<Group>,
    /// The examples once more, where the device has kernels that take all of them at once.
    sequences: Option<Sequences>,
    /// Tokens over which the factors' gradients are summed: those of each example of a group.
    sums: Vec<Group>,
    examples: i64,
    /// Positions in `tokens` whose next token is a label.
    rows: Vec<i64>,
    /// The label of each row.
    labels: Vec<i64>,
    /// The example of each row.
    owners: Vec<i64>,
}

/// Examples of one padded length in a [`Batch`].
#[derive(Clone, Copy)]
pub(crate) struct Group {
    /// Place of the first token.
    first: i64,
    examples: i64,
    length: i64,
}

impl Group {
    fn tokens(&self) -> i64 {
        self.examples * self.length
    }

    /// The group's part of `whole` `[1, tokens, width]`, as `[examples, length, width]`.
    fn of(&self, whole: &Tensor) -> Result<Tensor, LmError> {
        let width = whole.size3()?.2;
        Ok(whole.f_narrow(1, self.first, self.tokens())?.f_reshape([self.examples, self.length, width])?)
    }
}

impl Batch {
    fn new(decoder: &Decoder, examples: &[Example], padding: Padding) -> Result<Self, LmError> {
        let padded = |example: &Example| padding.padded(inputs(example).len());
        decoder.check_tokens(examples.iter().flat_map(|example| &example.tokens))?;
        let context = usize::try_from(decoder.config.max_positions).unwrap_or_default().max(1);
        if examples.iter().any(|example| example.tokens.len() > context) {
            return Err(LmError::Usage(format!(
                "an example is longer than the model's context of {} tokens\nhelp: lower --block-length",
                decoder.config.max_positions
            )));
        }
        let (mut tokens, mut positions, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        let (mut rows, mut ids, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for alike in examples.chunk_by(|one, other| padded(one) == padded(other)) {
            let length = padded(&alike[0]);
            groups.push(Group { first: tokens.len() as i64, examples: alike.len() as i64, length: length as i64 });
            for example in alike {
                let first = tokens.len();
                tokens.extend_from_slice(inputs(example));
                tokens.resize(first + length, 0);
                // Padding may go beyond the context: no token sees it.
                positions.extend(0..length as i64);
            }
        }
        for (owner, (example, first)) in examples.iter().zip(firsts(&groups)).enumerate() {
            for position in labels(example) {
                rows.push(first + position as i64 - 1);
                ids.push(example.tokens[position]);
                owners.push(owner as i64);
            }
        }
        let place = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(decoder.compute.device);
        let (tokens, positions) = (place(&tokens)?.f_unsqueeze(0)?, place(&positions)?);
        let (device, kind) = (decoder.compute.device, decoder.compute.kind);
        let at_once = cuda::has_attention(device, kind, decoder.config.head_dim);
        let sequences = at_once.then(|| Sequences::new(lengths(&groups), device)).transpose()?;
        let sums = groups.clone();
        Ok(Self {
            tokens,
            positions,
            groups,
            sequences,
            sums,
            examples: examples.len() as i64,
            rows,
            labels: ids,
            owners,
        })
    }

    /// The same, with one sum over all examples.
    fn together(self) -> Self {
        let sums = vec![Group { first: 0, examples: 1, length: self.length() }];
        Self { sums, ..self }
    }

    /// Padded length of each example.
    fn lengths(&self) -> Vec<usize> {
        lengths(&self.groups).map(|length| length as usize).collect()
    }

    /// Number of tokens, padding included.
    fn length(&self) -> i64 {
        self.groups.iter().map(Group::tokens).sum()
    }
}

/// The padded length of each example.
fn lengths(groups: &[Group]) -> impl Iterator<Item = i64> {
    groups.iter().flat_map(|group| (0..group.examples).map(|_| group.length))
}

/// The place of each example's first token.
fn firsts(groups: &[Group]) -> impl Iterator<Item = i64> {
    groups.iter().flat_map(|group| (0..group.examples).map(|index| group.first + index * group.length))
}

/// Positions of an example that are labels. The first token has nothing before it that could predict it.
fn labels(example: &Example) -> std::ops::Range<usize> {
    let length = example.tokens.len();
    example.prefix.max(1).min(length)..length
}

fn adapters(decoder: &Decoder, lora: &Lora) -> Result<Vec<Adapters>, LmError> {
    let layers = 0..decoder.layers.len();
    layers.map(|layer| decoder::Adapters::new(lora, layer, &decoder.config, decoder.compute.kind)).collect()
}

fn empty(decoder: &Decoder, lora: &Lora) -> Result<ExampleGradients, LmError> {
    let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Float, decoder.compute.device));
    let like = |tensor: &Tensor| {
        let mut shape = vec![0];
        shape.extend(tensor.size());
        zeros(&shape)
    };
    let gradients = lora.tensors.iter().map(|(_, tensor)| like(tensor)).collect::<Result<_, _>>()?;
    Ok(ExampleGradients { losses: zeros(&[0])?, gradients })
}

#[cfg(test)]
mod tests;
