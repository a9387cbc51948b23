//! The decoder for sampling on CPU, without libtorch.
//!
//! A step of sampling multiplies a few dozen rows by every weight. libtorch repacks each weight for each product and waits
//! for its threads after each of some thousand small operations; here weights are packed once, as the instructions want
//! them, and a worker takes its sequences through the whole step alone. A row is summed in the same order whatever rows
//! are beside it, so that a sequence is bit for bit the same in any company.
//!
//! The residual stream and everything elementwise are float32; the inputs of products and the cache are of the compute
//! kind.

mod attention;
mod elementwise;

use std::sync::Arc;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::LmError;
use crate::checkpoint::DecoderConfig;
use crate::decoder::Decoder;
use crate::products::{Factor, Matrix, copy, is_supported};
use attention::{BLOCK, attend, put_key};
use elementwise::{add, angles, gated, narrow, norm, turn};

/// Rows that go through the model together at most.
pub(super) const LARGEST: usize = 48;

/// A decoder's weights as the products here want them.
pub(crate) struct Model<E> {
    config: DecoderConfig,
    embedding: Vec<E>,
    layers: Vec<Layer<E>>,
    norm: Vec<f32>,
    output: Matrix<E>,
    /// RoPE's angle per position of each pair.
    frequencies: Vec<f32>,
}

struct Layer<E> {
    input_norm: Vec<f32>,
    qkv: Matrix<E>,
    bias: Vec<f32>,
    o: Matrix<E>,
    post_norm: Vec<f32>,
    gate_up: Matrix<E>,
    down: Matrix<E>,
}

/// A packed decoder of either kind.
#[derive(Clone)]
pub(crate) enum Packed {
    /// bfloat16.
    Bf16(Arc<Model<bf16>>),
    /// float32.
    F32(Arc<Model<f32>>),
}

impl Packed {
    /// Packs `decoder`; `None` where libtorch has to compute: another device, a CPU without the instructions, or widths that
    /// are not whole groups of inputs.
    pub(crate) fn new(decoder: &Decoder) -> Result<Option<Self>, LmError> {
        let config = &decoder.config;
        let even = (config.hidden_size | config.intermediate_size) % 2 == 0;
        match (decoder.compute.device, decoder.compute.kind) {
            (Device::Cpu, Kind::BFloat16) if is_supported() && even => {
                Ok(Some(Self::Bf16(Arc::new(Model::pack(decoder)?))))
            }
            (Device::Cpu, Kind::Float) if is_supported() => Ok(Some(Self::F32(Arc::new(Model::pack(decoder)?)))),
            _ => Ok(None),
        }
    }
}

impl<E: Factor> Model<E> {
    fn pack(decoder: &Decoder) -> Result<Self, LmError> {
        let config = decoder.config.clone();
        let layer = |layer: &crate::decoder::Layer| -> Result<Layer<E>, LmError> {
            Ok(Layer {
                input_norm: floats(&layer.input_norm)?,
                qkv: Matrix::pack(&layer.qkv)?,
                bias: layer.qkv_bias.as_ref().map(floats).transpose()?.unwrap_or_default(),
                o: Matrix::pack(&layer.o)?,
                post_norm: floats(&layer.post_norm)?,
                gate_up: Matrix::pack(&layer.gate_up)?,
                down: Matrix::pack(&layer.down)?,
            })
        };
        let mut embedding = vec![E::narrow(0.0); decoder.embedding.numel()];
        copy(&decoder.embedding, &mut embedding)?;
        Ok(Self {
            embedding,
            layers: decoder.layers.iter().map(layer).collect::<Result<_, _>>()?,
            norm: floats(&decoder.norm)?,
            output: Matrix::pack(&decoder.output)?,
            frequencies: floats(decoder.rope.frequencies())?,
            config,
        })
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>, LmError> {
    Ok(Vec::<f32>::try_from(tensor.f_to_kind(Kind::Float)?.f_reshape([-1i64])?)?)
}

/// One token of one sequence on its way through the model.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) slot: usize,
    pub(super) position: usize,
    pub(super) token: i64,
}

/// The cache and the working memory of one worker.
pub(super) struct Engine<E> {
    model: Arc<Model<E>>,
    slots: usize,
    capacity: usize,
    /// Of each layer: slot, key-value head, and what [`put_key`] lays out.
    keys: Vec<Vec<E>>,
    /// Of each layer: slot, key-value head, position, element.
    values: Vec<Vec<E>>,
    hidden: Vec<f32>,
    input: Vec<E>,
    wide: Vec<f32>,
    attended: Vec<f32>,
    scores: Vec<f32>,
    logits: Vec<f32>,
    prompt: Option<Prompt<E>>,
}

/// A prompt that has been computed, for the next sequence that begins with the same.
struct Prompt<E> {
    tokens: Vec<i64>,
    /// Of each layer: keys and values of every head, laid out as the engine's.
    cached: Vec<(Vec<E>, Vec<E>)>,
    logits: Vec<f32>,
}

impl<E: Factor> Engine<E> {
    pub(super) fn new(model: Arc<Model<E>>, slots: usize) -> Self {
        let config = &model.config;
        let rows = LARGEST.max(slots);
        let products = model.layers.iter().flat_map(|layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down]);
        let widest = products.map(|product| product.outputs).max().unwrap_or(0);
        let heads = (config.heads * config.head_dim) as usize;
        let narrow = (config.intermediate_size as usize).max(config.hidden_size as usize).max(heads) + E::GROUP;
        let layers = model.layers.len();
        Self {
            slots,
            capacity: 0,
            keys: (0..layers).map(|_| Vec::new()).collect(),
            values: (0..layers).map(|_| Vec::new()).collect(),
            hidden: vec![0.0; rows * config.hidden_size as usize],
            input: vec![E::narrow(0.0); rows * narrow],
            wide: vec![0.0; rows * widest],
            attended: vec![0.0; heads],
            scores: Vec::new(),
            logits: vec![0.0; slots.max(1) * model.output.outputs],
            prompt: None,
            model,
        }
    }

    /// Vocabulary, and the distance between rows of logits.
    fn vocabulary(&self) -> (usize, usize) {
        (self.model.config.vocab_size as usize, self.model.output.outputs)
    }

    /// Puts a prompt into a slot, with room for `room` tokens in all; logits of its last position.
    pub(super) fn start(&mut self, slot: usize, prompt: &[i64], room: usize) -> &[f32] {
        self.reserve(room);
        match self.prompt.take().filter(|known| known.tokens == prompt) {
            Some(known) => {
                self.restore(slot, &known);
                self.prompt = Some(known);
            }
            None => {
                let row = |(position, token): (usize, &i64)| Row { slot, position, token: *token };
                let rows: Vec<Row> = prompt.iter().enumerate().map(row).collect();
                for part in rows.chunks(LARGEST) {
                    self.forward(part);
                }
                self.last_logits((rows.len() - 1) % LARGEST);
                self.prompt = Some(self.saved(slot, prompt));
            }
        }
        self.prompt.as_ref().map_or(&[], |known| &known.logits)
    }

    /// Feeds one token to each row's sequence; `each(row, logits)` for every one.
    pub(super) fn step(&mut self, rows: &[Row], mut each: impl FnMut(usize, &[f32])) {
        self.forward(rows);
        let mut logits = std::mem::take(&mut self.logits);
        self.final_norm(0, rows.len());
        self.model.output.multiply(&self.input, rows.len(), &mut logits);
        let (vocabulary, stride) = self.vocabulary();
        for (row, logits) in logits.chunks_exact(stride).take(rows.len()).enumerate() {
            each(row, &logits[..vocabulary]);
        }
        self.logits = logits;
    }

    fn last_logits(&mut self, row: usize) {
        self.final_norm(row, 1);
        self.model.output.multiply(&self.input, 1, &mut self.logits);
    }

    fn reserve(&mut self, room: usize) {
        if room <= self.capacity {
            return;
        }
        let config = &self.model.config;
        let (heads, width) = (config.kv_heads as usize, config.head_dim as usize);
        let (old, new) = (self.capacity * width, room.next_multiple_of(BLOCK) * width);
        for cache in self.keys.iter_mut().chain(&mut self.values) {
            let mut larger = vec![E::narrow(0.0); self.slots * heads * new];
            if old > 0 {
                for (from, to) in cache.chunks_exact(old).zip(larger.chunks_exact_mut(new)) {
                    to[..old].copy_from_slice(from);
                }
            }
            *cache = larger;
        }
        self.capacity = new / width;
    }

    /// Range of the first `length` positions of a head in a layer's cache, up to a whole block.
    fn blocks(&self, slot: usize, head: usize, length: usize) -> std::ops::Range<usize> {
        self.span(slot, head, length.next_multiple_of(BLOCK))
    }

    /// The same to the position, which is what values need.
    fn span(&self, slot: usize, head: usize, length: usize) -> std::ops::Range<usize> {
        let (heads, width) = (self.model.config.kv_heads as usize, self.model.config.head_dim as usize);
        let first = (slot * heads + head) * self.capacity * width;
        first..first + length * width
    }

    fn saved(&self, slot: usize, prompt: &[i64]) -> Prompt<E> {
        let heads = self.model.config.kv_heads as usize;
        let of = |cache: &Vec<E>| -> Vec<E> {
            (0..heads).flat_map(|head| cache[self.blocks(slot, head, prompt.len())].iter().copied()).collect()
        };
        let cached = self.keys.iter().zip(&self.values).map(|(keys, values)| (of(keys), of(values))).collect();
        Prompt { tokens: prompt.to_vec(), cached, logits: self.logits[..self.vocabulary().0].to_vec() }
    }

    fn restore(&mut self, slot: usize, known: &Prompt<E>) {
        for head in 0..self.model.config.kv_heads as usize {
            let span = self.blocks(slot, head, known.tokens.len());
            let from = head * span.len()..(head + 1) * span.len();
            for (layer, (keys, values)) in known.cached.iter().enumerate() {
                self.keys[layer][span.clone()].copy_from_slice(&keys[from.clone()]);
                self.values[layer][span.clone()].copy_from_slice(&values[from.clone()]);
            }
        }
    }

    /// Rows `first..first + count` of the residual stream, normed, as the input of the vocabulary product.
    fn final_norm(&mut self, first: usize, count: usize) {
        let model = self.model.clone();
        let width = model.config.hidden_size as usize;
        let hidden = &self.hidden[first * width..(first + count) * width];
        norm(hidden, &model.norm, model.config.rms_norm_eps as f32, model.output.inputs, &mut self.input);
    }

    /// Takes rows through all layers; the residual stream is left in `hidden`.
    fn forward(&mut self, rows: &[Row]) {
        let model = self.model.clone();
        let width = model.config.hidden_size as usize;
        for (row, hidden) in rows.iter().zip(self.hidden.chunks_exact_mut(width)) {
            let first = row.token as usize * width;
            for (to, from) in hidden.iter_mut().zip(&model.embedding[first..first + width]) {
                *to = from.wide();
            }
        }
        let angles: Vec<Vec<(f32, f32)>> = rows.iter().map(|row| angles(row.position, &model.frequencies)).collect();
        for (index, layer) in model.layers.iter().enumerate() {
            self.attention(rows, index, layer, &angles, &model.config);
            self.feed_forward(rows.len(), layer, &model.config);
        }
    }

    fn attention(
        &mut self,
        rows: &[Row],
        index: usize,
        layer: &Layer<E>,
        angles: &[Vec<(f32, f32)>],
        config: &DecoderConfig,
    ) {
        let (width, head) = (config.hidden_size as usize, config.head_dim as usize);
        let (heads, kv_heads) = (config.heads as usize, config.kv_heads as usize);
        let epsilon = config.rms_norm_eps as f32;
        norm(&self.hidden[..rows.len() * width], &layer.input_norm, epsilon, layer.qkv.inputs, &mut self.input);
        layer.qkv.multiply(&self.input, rows.len(), &mut self.wide);
        let mut wide = std::mem::take(&mut self.wide);
        for ((row, values), angles) in rows.iter().zip(wide.chunks_exact_mut(layer.qkv.outputs)).zip(angles) {
            for (value, bias) in values.iter_mut().zip(&layer.bias) {
                *value += bias;
            }
            for part in values.chunks_exact_mut(head).take(heads + kv_heads) {
                turn(part, angles);
            }
            for kv in 0..kv_heads {
                let (key, value) = (&values[(heads + kv) * head..], &values[(heads + kv_heads + kv) * head..]);
                let keys = self.blocks(row.slot, kv, row.position + 1);
                put_key(&key[..head], row.position, &mut self.keys[index][keys]);
                let at = self.span(row.slot, kv, row.position).end;
                narrow(&value[..head], &mut self.values[index][at..at + head]);
            }
        }
        let group = heads / kv_heads;
        for (number, (row, values)) in rows.iter().zip(wide.chunks_exact(layer.qkv.outputs)).enumerate() {
            for kv in 0..kv_heads {
                let length = row.position + 1;
                let keys = &self.keys[index][self.blocks(row.slot, kv, length)];
                let cached = &self.values[index][self.span(row.slot, kv, length)];
                let here = kv * group * head..(kv + 1) * group * head;
                let out = &mut self.attended[here.clone()];
                attend(&values[here], keys, cached, head, &mut self.scores, out);
            }
            let target = &mut self.input[number * layer.o.inputs..(number + 1) * layer.o.inputs];
            narrow(&self.attended[..heads * head], &mut target[..heads * head]);
            target[heads * head..].fill(E::narrow(0.0));
        }
        self.wide = wide;
        layer.o.multiply(&self.input, rows.len(), &mut self.wide);
        add(&mut self.hidden, &self.wide, rows.len(), width, layer.o.outputs);
    }

    fn feed_forward(&mut self, rows: usize, layer: &Layer<E>, config: &DecoderConfig) {
        let (width, inner) = (config.hidden_size as usize, config.intermediate_size as usize);
        let epsilon = config.rms_norm_eps as f32;
        norm(&self.hidden[..rows * width], &layer.post_norm, epsilon, layer.gate_up.inputs, &mut self.input);
        layer.gate_up.multiply(&self.input, rows, &mut self.wide);
        for row in 0..rows {
            let values = &self.wide[row * layer.gate_up.outputs..];
            let target = &mut self.input[row * layer.down.inputs..(row + 1) * layer.down.inputs];
            gated(&values[..inner], &values[inner..2 * inner], target);
        }
        layer.down.multiply(&self.input, rows, &mut self.wide);
        add(&mut self.hidden, &self.wide, rows, width, layer.down.outputs);
    }
}
