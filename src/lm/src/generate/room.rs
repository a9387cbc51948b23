//! How many sequences fit into memory at a time. A long one of a large model holds gigabytes: 13 billion parameters in
//! bfloat16 take 819 kB for each token of each sequence.

use tch::{Device, Kind};

use crate::checkpoint::DecoderConfig;
use crate::decoder::Decoder;
use crate::device;

/// Rows that libtorch computes together on CPU, whatever the batch size.
const ROWS: usize = 32;
/// At most as many on CUDA, where a product of few rows costs as much as one of many.
const CUDA_ROWS: usize = 512;
/// A cache has room for a multiple of this many positions.
pub(super) const STRIDE: usize = 64;
/// Attention reads a multiple of this many of them, since its kernels want rows of a mask to begin at 32 bytes.
pub(super) const READ: usize = 16;
/// Bytes for all caches where nobody tells what there is: 256 sequences of 1,088 tokens of SmolLM2-135M take 6.4 GB.
const DEFAULT_BUDGET: usize = 8 << 30;

/// Sequences to sample at a time where nobody says.
pub(super) fn usual(device: Device) -> usize {
    if device.is_cuda() { CUDA_ROWS } else { ROWS }
}

/// Sequences of `room` tokens that fit beside the loaded model, of which there are that many copies, at least one.
pub(super) fn sequences(decoder: &Decoder, copies: usize, room: usize) -> usize {
    let known = match decoder.compute.device {
        Device::Cpu => device::physical_memory().map(|bytes| beside(decoder.bytes().saturating_mul(copies), bytes)),
        // An eighth of what is free is left for the activations of a step.
        _ => device::free_cuda_memory().map(|bytes| bytes / 8 * 7),
    };
    fitting(&decoder.config, decoder.compute.kind, room, known.unwrap_or(DEFAULT_BUDGET))
}

/// Bytes for caches on a CPU: a quarter of the machine, since shards may run side by side, but not what the weights take,
/// nor an eighth for all else. What is free right now would make a rerun's batches differ.
fn beside(weights: usize, memory: usize) -> usize {
    (memory / 4).min((memory - memory / 8).saturating_sub(weights))
}

fn fitting(config: &DecoderConfig, kind: Kind, room: usize, budget: usize) -> usize {
    let wide = (2 * config.layers * config.kv_heads * config.head_dim) as usize * kind.elt_size_in_bytes();
    let logits = config.vocab_size as usize * Kind::Float.elt_size_in_bytes();
    let bytes = room.next_multiple_of(STRIDE).saturating_mul(wide).saturating_add(logits);
    (budget / bytes.max(1)).max(1)
}

/// `(rows, tiles)` for libtorch to sample `batch` sequences at a time, of which `fit` fit into memory.
///
/// Rows are a power of two, so that little more or less free memory changes no shape, and with it no rounding.
pub(super) fn tiles(device: Device, batch: usize, fit: usize) -> (usize, usize) {
    let most = if device == Device::Cpu { ROWS } else { CUDA_ROWS };
    let rows = batch.clamp(ROWS, most).next_power_of_two().min(1 << fit.max(1).ilog2());
    (rows, (fit / rows).min(batch.div_ceil(rows)).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: Device = Device::Cuda(0);
    const GB: usize = 1_000_000_000;

    /// Layers, key-value heads, width of a head and vocabulary, as the published `config.json` of each says.
    fn config(layers: i64, kv_heads: i64, head_dim: i64, vocab_size: i64) -> DecoderConfig {
        DecoderConfig {
            hidden_size: 1,
            intermediate_size: 1,
            layers,
            heads: kv_heads,
            kv_heads,
            head_dim,
            vocab_size,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
            max_positions: 1 << 20,
            tied_embeddings: true,
            qkv_bias: false,
            eos: vec![],
        }
    }

    #[test]
    fn caches_of_large_models_fit_into_what_is_free() {
        // Llama-2-13B and -7B, 1,024 new tokens behind a prompt of 60, bfloat16, beside the weights on a card of 80 GB.
        for (config, weights, kilobytes, expected) in
            [(config(40, 40, 128, 32_000), 26, 819_200, 53), (config(32, 32, 128, 32_000), 14, 524_288, 101)]
        {
            let budget = (80 - weights) * GB / 8 * 7;
            let fit = fitting(&config, Kind::BFloat16, 1084, budget);
            assert_eq!(fit, expected);
            let (rows, tiles) = tiles(GPU, 256, fit);
            assert!(rows * tiles * 1088 * kilobytes <= budget, "{rows} rows, {tiles} tiles");
            assert!(2 * rows * tiles > fit, "{rows} rows, {tiles} tiles of {fit}");
        }
    }

    #[test]
    fn a_small_model_gets_what_the_batch_asks_for() {
        // SmolLM2-135M.
        let fit = fitting(&config(30, 3, 64, 49_152), Kind::BFloat16, 1084, DEFAULT_BUDGET);
        assert_eq!(fit, 340);
        assert_eq!(tiles(GPU, 1, fit), (32, 1));
        assert_eq!(tiles(GPU, 33, fit), (64, 1));
        assert_eq!(tiles(GPU, 256, fit), (256, 1));
        assert_eq!(tiles(GPU, usize::MAX, fit), (256, 1));
        assert_eq!(tiles(GPU, 700, 10_000), (512, 2));
    }

    #[test]
    fn on_cpu_caches_leave_room_for_the_weights() {
        // Of 64 GB, two copies of SmolLM2-135M, of Llama-2-13B and of Llama-2-70B in bfloat16.
        assert_eq!(beside(2 * 270_000_000, 64 * GB), 16 * GB);
        assert_eq!(beside(2 * 26 * GB, 64 * GB), 4 * GB);
        assert_eq!(beside(2 * 138 * GB, 64 * GB), 0);
        assert_eq!(fitting(&config(80, 8, 128, 32_000), Kind::BFloat16, 1084, 0), 1);
    }

    #[test]
    fn on_cpu_the_shape_does_not_follow_the_batch() {
        for batch in [1, 7, 32] {
            assert_eq!(tiles(Device::Cpu, batch, 1000), (32, 1));
        }
        assert_eq!(tiles(Device::Cpu, 33, 1000), (32, 2));
        assert_eq!(tiles(Device::Cpu, 100, 40), (32, 1));
    }

    #[test]
    fn what_does_not_fit_is_tried_one_at_a_time() {
        let config = config(40, 40, 128, 32_000);
        assert_eq!(fitting(&config, Kind::BFloat16, usize::MAX / STRIDE * STRIDE, 8 * GB), 1);
        assert_eq!(tiles(GPU, 32, 1), (1, 1));
    }
}
