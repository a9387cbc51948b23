//! The decoder for sampling on CPU, without libtorch.
//!
//! A step of sampling multiplies a few dozen rows by every weight. libtorch repacks each weight for each product and
//! waits for its threads after each of some thousand small operations; here they were packed once
//! ([`crate::decoder::packed`]), as the instructions want them, and a worker takes its sequences through the whole step
//! alone. A row is summed in the same order whatever rows are beside it, so that a sequence is bit for bit the same in
//! any company.
//!
//! The residual stream and everything elementwise are float32; the inputs of products and the cache are of the compute
//! kind.

mod attention;
mod elementwise;

use std::sync::Arc;

use crate::checkpoint::DecoderConfig;
use crate::decoder::packed::{LayerWeights, Weights};
use crate::products::Factor;
use attention::{BLOCK, attend, put_key};
use elementwise::{add, angles, gated, narrow, norm, turn};

/// Rows that go through the model together at most.
pub(super) const LARGEST: usize = 48;

/// One token of one sequence on its way through the model.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) slot: usize,
    pub(super) position: usize,
    pub(super) token: i64,
}

/// The cache and the working memory of one worker.
pub(super) struct Engine<E> {
    weights: Arc<Weights<E>>,
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
    pub(super) fn new(weights: Arc<Weights<E>>, slots: usize) -> Self {
        let config = &weights.config;
        let rows = LARGEST.max(slots);
        let products = weights.layers.iter().flat_map(|layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down]);
        let widest = products.map(|product| product.outputs).max().unwrap_or(0);
        let heads = (config.heads * config.head_dim) as usize;
        let narrow = (config.intermediate_size as usize).max(config.hidden_size as usize).max(heads) + E::GROUP;
        let layers = weights.layers.len();
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
            logits: vec![0.0; slots.max(1) * weights.output.outputs],
            prompt: None,
            weights,
        }
    }

    /// Vocabulary, and the distance between rows of logits.
    fn vocabulary(&self) -> (usize, usize) {
        (self.weights.config.vocab_size as usize, self.weights.output.outputs)
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
        self.weights.output.multiply(&self.input, rows.len(), &mut logits);
        let (vocabulary, stride) = self.vocabulary();
        for (row, logits) in logits.chunks_exact(stride).take(rows.len()).enumerate() {
            each(row, &logits[..vocabulary]);
        }
        self.logits = logits;
    }

    fn last_logits(&mut self, row: usize) {
        self.final_norm(row, 1);
        self.weights.output.multiply(&self.input, 1, &mut self.logits);
    }

    fn reserve(&mut self, room: usize) {
        if room <= self.capacity {
            return;
        }
        let config = &self.weights.config;
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
        let (heads, width) = (self.weights.config.kv_heads as usize, self.weights.config.head_dim as usize);
        let first = (slot * heads + head) * self.capacity * width;
        first..first + length * width
    }

    fn saved(&self, slot: usize, prompt: &[i64]) -> Prompt<E> {
        let heads = self.weights.config.kv_heads as usize;
        let of = |cache: &Vec<E>| -> Vec<E> {
            (0..heads).flat_map(|head| cache[self.blocks(slot, head, prompt.len())].iter().copied()).collect()
        };
        let cached = self.keys.iter().zip(&self.values).map(|(keys, values)| (of(keys), of(values))).collect();
        Prompt { tokens: prompt.to_vec(), cached, logits: self.logits[..self.vocabulary().0].to_vec() }
    }

    fn restore(&mut self, slot: usize, known: &Prompt<E>) {
        for head in 0..self.weights.config.kv_heads as usize {
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
        let weights = self.weights.clone();
        let width = weights.config.hidden_size as usize;
        let hidden = &self.hidden[first * width..(first + count) * width];
        norm(hidden, &weights.norm, weights.config.rms_norm_eps as f32, weights.output.inputs, &mut self.input);
    }

    /// Takes rows through all layers; the residual stream is left in `hidden`.
    fn forward(&mut self, rows: &[Row]) {
        let weights = self.weights.clone();
        let width = weights.config.hidden_size as usize;
        for (row, hidden) in rows.iter().zip(self.hidden.chunks_exact_mut(width)) {
            let first = row.token as usize * width;
            for (to, from) in hidden.iter_mut().zip(&weights.embedding[first..first + width]) {
                *to = from.wide();
            }
        }
        let angles: Vec<Vec<(f32, f32)>> = rows.iter().map(|row| angles(row.position, &weights.frequencies)).collect();
        for (index, layer) in weights.layers.iter().enumerate() {
            self.attention(rows, index, layer, &angles, &weights.config);
            self.feed_forward(rows.len(), layer, &weights.config);
        }
    }

    fn attention(
        &mut self,
        rows: &[Row],
        index: usize,
        layer: &LayerWeights<E>,
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

    fn feed_forward(&mut self, rows: usize, layer: &LayerWeights<E>, config: &DecoderConfig) {
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
