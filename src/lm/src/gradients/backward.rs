//! The forward pass that keeps what the backward pass needs, and the backward pass.
//!
//! Shapes: T tokens of all examples, D hidden; in a group of one length B examples, L positions; H query heads, K
//! key-value heads, R joined ranks.

use tch::{Kind, Tensor};

use super::Batch;
use super::attention::Attention;
use super::dropout::{Masks, Site};
use crate::LmError;
use crate::adapter::{Lora, Target};
use crate::checkpoint::DecoderConfig;
use crate::cuda;
use crate::decoder::layer::rows_of;
use crate::decoder::{Adapters, Decoder, Layer};
use crate::ops::{self, FeedForward, Frozen};
use crate::rope::Angles;

/// Padded tokens × layers above which, on CPU, a layer keeps its input alone and its inside is computed again on the way
/// back: a third more products for an eighth of the memory. 2¹⁸ keeps SmolLM2 at 8,192 tokens under 4 GB.
const KEEP: i64 = 1 << 18;

/// Tokens whose insides fit: on a device of its own, into half of what the weights leave.
pub(super) fn room(decoder: &Decoder) -> i64 {
    let layers = decoder.config.layers;
    match decoder.spare_memory() {
        None => KEEP / layers,
        Some(bytes) => bytes as i64 / 2 / layers / kept_bytes(decoder),
    }
}

/// Bytes that [`Inside`] takes for a token, but for the few of the adapters.
fn kept_bytes(decoder: &Decoder) -> i64 {
    let DecoderConfig { hidden_size, intermediate_size, heads, kv_heads, head_dim, .. } = decoder.config;
    let width = 2 * hidden_size + (2 * heads + 2 * kv_heads) * head_dim + 2 * intermediate_size;
    width * decoder.compute.kind.elt_size_in_bytes() as i64
}

/// The model with its adapters, the batch that goes through it, and what the forward pass kept.
pub(super) struct Tape<'a> {
    model: Model<'a>,
    layers: Vec<Kept>,
    output: Tensor,
}

/// What one layer kept.
enum Kept {
    /// Everything.
    All(Box<Inside>),
    /// Its input `[1, T, D]`.
    Input(Tensor),
}

/// The inside of a layer that its backward pass reads.
struct Inside {
    first: Half,
    /// `[1, T, 2 · inner]`.
    gate_up: Tensor,
}

/// The inside of a layer up to attention's residual.
struct Half {
    /// Input `[1, T, D]`.
    input: Tensor,
    /// What A of the adapters makes of it after the norm, `[1, T, R]`.
    qkv_low: Option<Tensor>,
    attention: Attention,
    /// What attention gave, heads joined: `[1, T, H · d]`.
    attended: Tensor,
    /// What A of the adapters makes of that, `[1, T, R]`.
    o_low: Option<Tensor>,
    /// After attention's residual: `[1, T, D]`.
    middle: Tensor,
}

impl<'a> Tape<'a> {
    /// Keeps the inside of every layer where `keep`, and else their inputs alone.
    pub(super) fn forward(
        decoder: &'a Decoder,
        adapters: &'a [Adapters],
        batch: &'a Batch,
        masks: &'a Masks,
        keep: bool,
    ) -> Result<Self, LmError> {
        let model = Model::new(decoder, adapters, batch, masks)?;
        let mut hidden = decoder.embed(&batch.tokens)?;
        let mut layers = Vec::with_capacity(decoder.layers.len());
        for index in 0..decoder.layers.len() {
            let context = model.layer(index);
            let (inside, next) = context.forward(&hidden)?;
            layers.push(if keep { Kept::All(Box::new(inside)) } else { Kept::Input(hidden) });
            hidden = next;
        }
        Ok(Self { model, layers, output: hidden })
    }

    /// Output of the last layer, `[1, T, D]`.
    pub(super) fn output(&self) -> &Tensor {
        &self.output
    }

    /// Gradients of every sum of the batch, in `lora`'s order, of the losses whose gradient with respect to [`Self::output`] is
    /// `gradient`, times `scale`. Each layer's part is dropped when it has been used.
    pub(super) fn backward(self, lora: &Lora, gradient: Tensor, scale: f64) -> Result<Vec<Tensor>, LmError> {
        let Self { model, layers, .. } = self;
        let back = model.angles.inverse()?;
        let mut gradient = gradient;
        let mut found = Vec::with_capacity(lora.tensors.len());
        for (index, kept) in layers.into_iter().enumerate().rev() {
            let context = model.layer(index);
            let inside = match kept {
                Kept::All(inside) => *inside,
                Kept::Input(input) => context.inside(&input)?,
            };
            let (below, mut tensors) = context.backward(inside, gradient, &back, lora, scale)?;
            // Layers come last to first; the whole is reversed below.
            tensors.reverse();
            found.append(&mut tensors);
            match below {
                Some(below) => gradient = below,
                None => break,
            }
        }
        found.reverse();
        Ok(found)
    }
}

/// Output of the last layer, `[1, T, D]`, where no gradient is wanted.
pub(super) fn output(
    decoder: &Decoder,
    adapters: &[Adapters],
    batch: &Batch,
    masks: &Masks,
) -> Result<Tensor, LmError> {
    let model = Model::new(decoder, adapters, batch, masks)?;
    let mut hidden = decoder.embed(&batch.tokens)?;
    for index in 0..decoder.layers.len() {
        let context = model.layer(index);
        hidden = context.forward(&hidden)?.1;
    }
    Ok(hidden)
}

/// What all layers are computed with.
struct Model<'a> {
    decoder: &'a Decoder,
    adapters: &'a [Adapters],
    batch: &'a Batch,
    masks: &'a Masks,
    angles: Angles,
}

impl<'a> Model<'a> {
    fn new(
        decoder: &'a Decoder,
        adapters: &'a [Adapters],
        batch: &'a Batch,
        masks: &'a Masks,
    ) -> Result<Self, LmError> {
        Ok(Self { decoder, adapters, batch, masks, angles: decoder.rope.at(&batch.positions)? })
    }

    fn layer(&self, index: usize) -> Context<'_> {
        let Self { decoder, adapters, batch, masks, angles } = self;
        let (config, layer, adapters) = (&decoder.config, &decoder.layers[index], &adapters[index]);
        Context { config, layer, adapters, index, angles, batch, masks }
    }
}

/// One layer and what it is computed with.
struct Context<'a> {
    config: &'a DecoderConfig,
    layer: &'a Layer,
    adapters: &'a Adapters,
    index: usize,
    angles: &'a Angles,
    batch: &'a Batch,
    masks: &'a Masks,
}

impl Context<'_> {
    /// The layer's inside and its output.
    fn forward(&self, input: &Tensor) -> Result<(Inside, Tensor), LmError> {
        let first = self.half(input)?;
        let (gate_up, output) = self.feed_forward().forward(&self.post_norm(&first)?, &first.middle)?;
        Ok((Inside { first, gate_up }, output))
    }

    /// The inside alone.
    fn inside(&self, input: &Tensor) -> Result<Inside, LmError> {
        let first = self.half(input)?;
        let gate_up = ops::linear(&self.post_norm(&first)?, &self.layer.gate_up, None, None)?;
        Ok(Inside { first, gate_up })
    }

    fn half(&self, input: &Tensor) -> Result<Half, LmError> {
        let epsilon = self.config.rms_norm_eps;
        let normed = ops::rms_norm(input, &self.layer.input_norm, epsilon)?;
        let mut qkv = ops::linear(&normed, &self.layer.qkv, self.layer.qkv_bias.as_ref(), None)?;
        let mut qkv_low = None;
        if let Some(factors) = &self.adapters.qkv {
            let low = ops::linear(&self.masks.apply(&normed, self.index, Site::Attention)?, &factors.a, None, None)?;
            qkv = ops::linear_onto(qkv, &low, &factors.b)?;
            qkv_low = Some(low);
        }
        let qkv = ops::rotate(qkv, self.config, self.angles)?;
        let (attention, attended) = Attention::forward(qkv, self.config, self.batch)?;
        let mut middle = ops::linear(&attended, &self.layer.o, None, Some(input))?;
        let mut o_low = None;
        if let Some(factors) = &self.adapters.o {
            let low = ops::linear(&self.masks.apply(&attended, self.index, Site::Output)?, &factors.a, None, None)?;
            middle = ops::linear_onto(middle, &low, &factors.b)?;
            o_low = Some(low);
        }
        Ok(Half { input: input.shallow_clone(), qkv_low, attention, attended, o_low, middle })
    }

    fn post_norm(&self, first: &Half) -> Result<Tensor, LmError> {
        ops::rms_norm(&first.middle, &self.layer.post_norm, self.config.rms_norm_eps)
    }

    fn feed_forward(&self) -> FeedForward<'_> {
        FeedForward { gate_up: &self.layer.gate_up, down: &self.layer.down }
    }

    /// `(gradient of the layer's input, gradients of its adapter tensors)`. The first layer's input gradient is not
    /// needed: nothing below it is trained.
    fn backward(
        &self,
        inside: Inside,
        gradient: Tensor,
        back: &Angles,
        lora: &Lora,
        scale: f64,
    ) -> Result<(Option<Tensor>, Vec<Tensor>), LmError> {
        let epsilon = self.config.rms_norm_eps;
        let Inside { first: Half { input, qkv_low, attention, attended, o_low, middle }, gate_up } = inside;
        // Feed-forward: ∂middle = ∂out + norm'(W_guᵀ · swiglu'(W_dᵀ · ∂out)).
        let normed = self.feed_forward().backward(&gradient, gate_up)?;
        let upper = ops::rms_norm_backward(&normed, &middle, &self.layer.post_norm, epsilon, Some(&gradient))?;
        drop((normed, middle, gradient));
        // Output projection.
        let mut through = None;
        let mut o_gradients = None;
        if let (Some(factors), Some(seen)) = (&self.adapters.o, &o_low) {
            let low = ops::matmul(&upper, &factors.b, None)?;
            let input = self.masks.apply(&attended, self.index, Site::Output)?;
            o_gradients = Some(self.factor_gradients((&input, seen), (&upper, &low))?);
            through = Some(self.masks.apply(&ops::matmul(&low, &factors.a, None)?, self.index, Site::Output)?);
        }
        let of_attended = added_to(through, &upper, &self.layer.o)?;
        drop(attended);
        // Attention and rotation.
        let joint = ops::rotate(attention.backward(&of_attended, self.config, self.batch)?, self.config, back)?;
        // Input projections.
        let normed = ops::rms_norm(&input, &self.layer.input_norm, epsilon)?;
        let mut qkv_gradients = None;
        let mut through = None;
        if let (Some(factors), Some(seen)) = (&self.adapters.qkv, &qkv_low) {
            let low = ops::matmul(&joint, &factors.b, None)?;
            let input = self.masks.apply(&normed, self.index, Site::Attention)?;
            qkv_gradients = Some(self.factor_gradients((&input, seen), (&joint, &low))?);
            through = Some(low);
        }
        let tensors = self.collect(qkv_gradients, o_gradients, lora, scale)?;
        if self.index == 0 {
            return Ok((None, tensors));
        }
        let through = match (&self.adapters.qkv, through) {
            (Some(factors), Some(low)) => {
                Some(self.masks.apply(&ops::matmul(&low, &factors.a, None)?, self.index, Site::Attention)?)
            }
            _ => None,
        };
        let of_normed = added_to(through, &joint, &self.layer.qkv)?;
        let below = ops::rms_norm_backward(&of_normed, &input, &self.layer.input_norm, epsilon, Some(&upper))?;
        Ok((Some(below), tensors))
    }

    /// `([sums, R, in], [sums, out, R])`: gradients of joined factors for every example, or for whatever the batch sums over,
    /// from the input that the adapter saw, with what A made of it, and the gradient of its output, with that times B.
    fn factor_gradients(
        &self,
        (input, input_low): (&Tensor, &Tensor),
        (output, output_low): (&Tensor, &Tensor),
    ) -> Result<(Tensor, Tensor), LmError> {
        let a = self.products(output_low, input)?;
        let b = self.products(input_low, output)?;
        Ok((a, b.f_transpose(1, 2)?))
    }

    /// `leftᵀ · right` of the tokens of each sum, `[sums, left, right]`.
    fn products(&self, left: &Tensor, right: &Tensor) -> Result<Tensor, LmError> {
        let Batch { sums, sequences, .. } = self.batch;
        if let Some(sequences) = sequences
            && sums.len() > 1
            && cuda::has_outer(sequences, left.size3()?.2, right.size3()?.2)
        {
            return cuda::outer(&left.f_squeeze_dim(0)?, &right.f_squeeze_dim(0)?, sequences);
        }
        let products = sums.iter().map(|group| ops::outer(&group.of(left)?, &group.of(right)?));
        Ok(Tensor::f_cat(&products.collect::<Result<Vec<_>, LmError>>()?, 0)?)
    }

    /// A and B gradients in float32, in the order of the targets.
    fn collect(
        &self,
        qkv: Option<(Tensor, Tensor)>,
        o: Option<(Tensor, Tensor)>,
        lora: &Lora,
        scale: f64,
    ) -> Result<Vec<Tensor>, LmError> {
        let rank = lora.config.rank;
        let finish = |tensor: Tensor, factor: f64| -> Result<Tensor, LmError> {
            let mut whole = Tensor::f_empty(tensor.size(), (Kind::Float, tensor.device()))?;
            whole.f_copy_(&tensor)?;
            Ok(whole.f_mul_scalar_(factor)?)
        };
        let mut tensors = Vec::new();
        for (position, target) in lora.config.targets.iter().enumerate() {
            let (joint, column) = match target {
                Target::O => (&o, 0),
                _ => (&qkv, position as i64 * rank),
            };
            let Some((a, b)) = joint else { continue };
            let (first, rows) = match target {
                Target::O => (0, self.config.hidden_size),
                _ => rows_of(*target, self.config),
            };
            // The scale of LoRA is in the joined B, so it is in ∂A already; ∂B still lacks it.
            tensors.push(finish(a.f_narrow(1, column, rank)?, scale)?);
            let block = b.f_narrow(1, first, rows)?.f_narrow(2, column, rank)?;
            tensors.push(finish(block, scale * lora.config.scale())?);
        }
        Ok(tensors)
    }
}

/// `x · weight`, and `rows` with it, which are used up.
fn added_to(rows: Option<Tensor>, x: &Tensor, weight: &Frozen) -> Result<Tensor, LmError> {
    match rows {
        None => ops::matmul(x, weight, None),
        Some(rows) => ops::matmul_onto(rows, x, weight),
    }
}
