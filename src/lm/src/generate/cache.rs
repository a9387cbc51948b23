//! The KV cache of all slots, and one step of the decoder for them.

use tch::{Kind, Tensor};

use super::room::{READ, STRIDE, tiles};
use crate::LmError;
use crate::cuda::{self, Filled};
use crate::decoder::{Decoder, Layer};
use crate::ops::plain::{join_heads, split_heads};
use crate::ops::{self, rms_norm, swiglu};
use crate::rope::Angles;

/// Cached keys and values of `[layer]`, each `[rows, capacity, kv_heads, head_dim]`.
struct Tile {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    capacity: usize,
    /// Filled positions of each row; 0 for a free one.
    filled: Vec<i64>,
}

/// A prompt that has been computed, for the next sequence that begins with the same.
struct Prompt {
    tokens: Vec<i64>,
    /// `[1, length, kv_heads, head_dim]` of each layer.
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    /// `[1, vocab]` f32, of the last position.
    logits: Tensor,
}

/// The slots of a batch.
pub(super) struct Slots<'a> {
    decoder: &'a Decoder,
    rows: usize,
    tiles: Vec<Tile>,
    prompt: Option<Prompt>,
}

impl<'a> Slots<'a> {
    /// Slots for `batch` sequences, or for as many as memory has room for if that is fewer.
    pub(super) fn new(decoder: &'a Decoder, batch: usize, fit: usize) -> Self {
        let (rows, count) = tiles(decoder.compute.device, batch, fit);
        let tile = || Tile { keys: Vec::new(), values: Vec::new(), capacity: 0, filled: vec![0; rows] };
        Self { decoder, rows, tiles: (0..count).map(|_| tile()).collect(), prompt: None }
    }

    pub(super) fn count(&self) -> usize {
        self.rows * self.tiles.len()
    }

    /// Puts `prompt` into `slots` (in rising order), with room for `room` tokens in all; logits `[1, vocab]` f32 of its last
    /// position.
    pub(super) fn start(&mut self, slots: &[usize], prompt: &[i64], room: usize) -> Result<Tensor, LmError> {
        if self.prompt.as_ref().is_none_or(|known| known.tokens != prompt) {
            self.prompt = Some(Prompt::compute(self.decoder, prompt)?);
        }
        let Some(known) = &self.prompt else { return Err(LmError::Usage("an empty prompt".into())) };
        for slots in slots.chunk_by(|one, other| one / self.rows == other / self.rows) {
            let tile = &mut self.tiles[slots[0] / self.rows];
            let rows: Vec<usize> = slots.iter().map(|slot| slot % self.rows).collect();
            tile.reserve(self.decoder, room)?;
            tile.start(&rows, known)?;
        }
        Ok(known.logits.shallow_clone())
    }

    /// Feeds one token to each slot of `feed` (in rising order of slots); logits `[feed, vocab]` f32.
    ///
    /// Slots that are not fed are free from here on.
    pub(super) fn step(&mut self, feed: &[(usize, i64)]) -> Result<Tensor, LmError> {
        let mut logits = Vec::new();
        for (index, tile) in self.tiles.iter_mut().enumerate() {
            let slots = index * self.rows..(index + 1) * self.rows;
            let fed: Vec<(usize, i64)> = feed
                .iter()
                .filter(|(slot, _)| slots.contains(slot))
                .map(|(slot, token)| (slot % self.rows, *token))
                .collect();
            if !fed.is_empty() {
                logits.push(tile.step(self.decoder, &fed)?);
            }
        }
        Ok(Tensor::f_cat(&logits, 0)?)
    }
}

impl Tile {
    /// Makes room for sequences of `room` tokens; what is cached is copied only where the room was less.
    fn reserve(&mut self, decoder: &Decoder, room: usize) -> Result<(), LmError> {
        if room <= self.capacity {
            return Ok(());
        }
        let capacity = room.next_multiple_of(STRIDE);
        let (config, compute) = (&decoder.config, decoder.compute);
        let shape = [self.filled.len() as i64, capacity as i64, config.kv_heads, config.head_dim];
        self.keys.resize_with(decoder.layers.len(), Tensor::new);
        self.values.resize_with(decoder.layers.len(), Tensor::new);
        // One after the other, so that no more than one is there twice.
        for cache in self.keys.iter_mut().chain(&mut self.values) {
            // Zeros rather than what was in memory: a masked value still enters a product, and 0 · NaN is NaN.
            let new = Tensor::f_zeros(shape, (compute.kind, compute.device))?;
            if self.capacity > 0 {
                new.f_narrow(1, 0, self.capacity as i64)?.f_copy_(cache)?;
            }
            *cache = new;
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Copies what was computed of a prompt into some rows.
    fn start(&mut self, rows: &[usize], prompt: &Prompt) -> Result<(), LmError> {
        let length = prompt.tokens.len() as i64;
        let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let indices = Tensor::f_from_slice(&indices)?.f_to_device(prompt.logits.device())?;
        let both = self.keys.iter().zip(&prompt.keys).chain(self.values.iter().zip(&prompt.values));
        for (cache, new) in both {
            let new = new.f_expand([rows.len() as i64, -1, -1, -1], false)?;
            let _ = cache.f_narrow(1, 0, length)?.f_index_copy_(0, &indices, &new)?;
        }
        for &row in rows {
            self.filled[row] = length;
        }
        Ok(())
    }

    fn step(&mut self, decoder: &Decoder, fed: &[(usize, i64)]) -> Result<Tensor, LmError> {
        let device = decoder.compute.device;
        let rows = self.filled.len();
        let (mut tokens, mut positions) = (vec![0i64; rows], vec![0i64; rows]);
        for (row, token) in fed {
            tokens[*row] = *token;
            positions[*row] = self.filled[*row];
        }
        self.filled.fill(0);
        for (row, _) in fed {
            self.filled[*row] = positions[*row] + 1;
        }
        let tensor = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(device);
        let cells: Vec<i64> =
            positions.iter().enumerate().map(|(row, position)| (row * self.capacity) as i64 + position).collect();
        let longest = self.filled.iter().copied().max().unwrap_or(1) as usize;
        let positions = tensor(&positions)?;
        let step = Step {
            cells: tensor(&cells)?,
            angles: decoder.rope.at(&positions)?,
            seen: Seen::new(decoder, &positions, longest, self.capacity)?,
        };
        let mut hidden = decoder.embed(&tensor(&tokens)?)?;
        for (index, layer) in decoder.layers.iter().enumerate() {
            hidden = self.layer(decoder, layer, index, hidden, &step)?;
        }
        let normed = rms_norm(&hidden, &decoder.norm, decoder.config.rms_norm_eps)?;
        let logits = normed.f_linear(&decoder.output, None::<&Tensor>)?;
        if fed.len() < rows {
            let picked = tensor(&fed.iter().map(|(row, _)| *row as i64).collect::<Vec<_>>())?;
            return Ok(logits.f_index_select(0, &picked)?.f_to_kind(Kind::Float)?);
        }
        Ok(logits.f_to_kind(Kind::Float)?)
    }

    /// `[rows, hidden]` → the same shape; the input is used up.
    fn layer(
        &mut self,
        decoder: &Decoder,
        layer: &Layer,
        index: usize,
        hidden: Tensor,
        step: &Step,
    ) -> Result<Tensor, LmError> {
        let config = &decoder.config;
        let (heads, kv_heads, width) = (config.heads, config.kv_heads, config.head_dim);
        let rows = self.filled.len() as i64;
        let normed = rms_norm(&hidden, &layer.input_norm, config.rms_norm_eps)?;
        let qkv = normed.f_linear(&layer.qkv, layer.qkv_bias.as_ref())?;
        let turned = ops::rotate(qkv.f_unsqueeze(0)?, config, &step.angles)?;
        let all = turned.f_view([rows, heads + 2 * kv_heads, width])?;
        let (keys, values) = (&self.keys[index], &self.values[index]);
        for (cache, first) in [(keys, heads), (values, heads + kv_heads)] {
            let new = all.f_narrow(1, first, kv_heads)?;
            let _ = cache.f_flatten(0, 1)?.f_index_copy_(0, &step.cells, &new)?;
        }
        let attended = step.seen.attend(&all.f_narrow(1, 0, heads)?, keys, values)?;
        let middle = ops::linear_onto(hidden, &attended.f_reshape([rows, heads * width])?, &layer.o)?;
        let normed = rms_norm(&middle, &layer.post_norm, config.rms_norm_eps)?;
        let inner = swiglu(&normed.f_linear(&layer.gate_up, None::<&Tensor>)?)?;
        ops::linear_onto(middle, &inner, &layer.down)
    }
}

/// What all layers of a step share.
struct Step {
    /// `[rows]`: where each token's keys and values go, among all positions of all rows.
    cells: Tensor,
    angles: Angles,
    seen: Seen,
}

/// What each row's token sees of the cache.
enum Seen {
    /// Where the device has a kernel for rows of any lengths.
    Filled(Filled),
    /// So many positions, and what is added to their scores: 0 or -inf, `[rows, kv_heads, group, positions]`.
    Masked(i64, Tensor),
}

impl Seen {
    /// For tokens at `positions` `[rows]`, of which the furthest is number `longest`, counted from 1.
    fn new(decoder: &Decoder, positions: &Tensor, longest: usize, capacity: usize) -> Result<Self, LmError> {
        let (config, compute) = (&decoder.config, decoder.compute);
        if cuda::has_attention(compute.device, compute.kind, config.head_dim) {
            return Ok(Self::Filled(Filled::new(&positions.f_add_scalar(1)?, capacity as i64)?));
        }
        let reach = longest.next_multiple_of(READ).min(capacity) as i64;
        let columns = Tensor::f_arange(reach, (Kind::Int64, compute.device))?;
        let beyond = columns.f_unsqueeze(0)?.f_gt_tensor(&positions.f_unsqueeze(1)?)?;
        let rows = positions.size1()?;
        let zeros = Tensor::f_zeros([rows, reach], (compute.kind, compute.device))?;
        let mask = zeros.f_masked_fill(&beyond, f64::NEG_INFINITY)?.f_reshape([rows, 1, 1, reach])?;
        let group = config.heads / config.kv_heads;
        Ok(Self::Masked(reach, mask.f_expand([rows, config.kv_heads, group, reach], false)?))
    }

    /// What attention gives for queries `[rows, heads, head_dim]`, of a layer's keys and values: row by row and head by head
    /// in this order, with the heads in one dimension or, by groups that share keys, in two.
    fn attend(&self, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor, LmError> {
        let (reach, blocked) = match self {
            Self::Filled(filled) => return filled.attend(q, keys, values),
            Self::Masked(reach, blocked) => (*reach, blocked),
        };
        let (rows, heads, width) = q.size3()?;
        let kv_heads = keys.size()[2];
        // The query heads of a group stand where positions usually do: their keys are read once and never repeated.
        let q = q.f_reshape([rows, kv_heads, heads / kv_heads, width])?;
        let part = |cache: &Tensor| cache.f_narrow(1, 0, reach)?.f_transpose(1, 2);
        Ok(Tensor::f_scaled_dot_product_attention(
            &q,
            &part(keys)?,
            &part(values)?,
            Some(blocked),
            0.0,
            false,
            None,
            false,
        )?)
    }
}

impl Prompt {
    /// Alone in its batch, so that it does not depend on other prompts.
    fn compute(decoder: &Decoder, prompt: &[i64]) -> Result<Self, LmError> {
        let config = &decoder.config;
        let length = prompt.len() as i64;
        let tokens = Tensor::f_from_slice(prompt)?.f_to_device(decoder.compute.device)?.f_unsqueeze(0)?;
        let angles = decoder.rope.first(length)?;
        let mut hidden = decoder.embed(&tokens)?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for layer in &decoder.layers {
            let normed = rms_norm(&hidden, &layer.input_norm, config.rms_norm_eps)?;
            let qkv = normed.f_linear(&layer.qkv, layer.qkv_bias.as_ref())?;
            let (q, k, v) = split_heads(&ops::rotate(qkv, config, &angles)?, config)?;
            keys.push(k.f_transpose(1, 2)?);
            values.push(v.f_transpose(1, 2)?);
            let attended = ops::Attention::inference(&q, &k, &v)?;
            let middle = hidden.f_add(&join_heads(&attended)?.f_linear(&layer.o, None::<&Tensor>)?)?;
            let normed = rms_norm(&middle, &layer.post_norm, config.rms_norm_eps)?;
            let inner = swiglu(&normed.f_linear(&layer.gate_up, None::<&Tensor>)?)?;
            hidden = middle.f_add(&inner.f_linear(&layer.down, None::<&Tensor>)?)?;
        }
        let last = hidden.f_narrow(1, length - 1, 1)?.f_reshape([1, config.hidden_size])?;
        let normed = rms_norm(&last, &decoder.norm, config.rms_norm_eps)?;
        let logits = normed.f_linear(&decoder.output, None::<&Tensor>)?.f_to_kind(Kind::Float)?;
        Ok(Self { tokens: prompt.to_vec(), keys, values, logits })
    }
}
