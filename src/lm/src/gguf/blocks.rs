//! ggml's storage types and how their blocks become floats.
//!
//! Layouts are those of `ggml-common.h` and `ggml-quants.c` (`dequantize_row_*`) in llama.cpp.

use half::{bf16, f16};

/// Blocks per task when dequantising on several threads: small enough to share out, large enough not to notice.
const BLOCKS_PER_TASK: usize = 4096;

/// A storage type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q6K,
}

impl BlockType {
    const ALL: [(u32, Self); 8] = [
        (0, Self::F32),
        (1, Self::F16),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (8, Self::Q8_0),
        (12, Self::Q4K),
        (14, Self::Q6K),
        (30, Self::Bf16),
    ];

    /// The type with ggml's number.
    pub(super) fn new(number: u32) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == number).map(|(_, kind)| *kind)
    }

    /// All types, for an error.
    pub(super) fn known() -> String {
        Self::ALL.map(|(number, kind)| format!("{kind:?} ({number})")).join(", ")
    }

    /// Values and bytes of one block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of a tensor whose fastest dimension comes first; `None` unless rows are whole blocks.
    pub(super) fn bytes_of(self, dimensions: &[u64]) -> Option<usize> {
        let (values, bytes) = self.block();
        let row = usize::try_from(dimensions.first().copied().unwrap_or(1)).ok()?;
        let rows =
            dimensions.iter().skip(1).try_fold(1usize, |rows, &size| rows.checked_mul(usize::try_from(size).ok()?))?;
        let blocks = row.is_multiple_of(values).then(|| (row / values).checked_mul(rows))??;
        // The count of values must fit as well: it becomes the size of an allocation.
        blocks.checked_mul(values.max(bytes) * 4).filter(|&most| most <= isize::MAX as usize)?;
        blocks.checked_mul(bytes)
    }

    /// Turns blocks into floats, on all cores. `bytes` must be [`Self::bytes_of`] the values in `out`.
    pub(super) fn dequantise(self, bytes: &[u8], out: &mut [f32]) {
        let (values, size) = self.block();
        let tasks: Vec<_> =
            bytes.chunks(size * BLOCKS_PER_TASK).zip(out.chunks_mut(values * BLOCKS_PER_TASK)).collect();
        let tasks = std::sync::Mutex::new(tasks.into_iter());
        let next = || tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        let work = || {
            while let Some((bytes, out)) = next() {
                for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(values)) {
                    self.dequantise_block(block, out);
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let threads = threads.min(bytes.len() / (size * BLOCKS_PER_TASK) + 1);
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
    }

    fn dequantise_block(self, block: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Self::F16 => out[0] = half(block, 0),
            Self::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Self::Q4_0 => nibbles(&block[2..], out, half(block, 0), -8.0 * half(block, 0)),
            Self::Q4_1 => nibbles(&block[4..], out, half(block, 0), half(block, 2)),
            Self::Q8_0 => {
                let scale = half(block, 0);
                for (value, &quant) in out.iter_mut().zip(&block[2..]) {
                    *value = scale * f32::from(quant as i8);
                }
            }
            Self::Q4K => q4_k(block, out),
            Self::Q6K => q6_k(block, out),
        }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Two values per byte: the low halves are the first half of the block.
fn nibbles(quants: &[u8], out: &mut [f32], scale: f32, offset: f32) {
    let (low, high) = out.split_at_mut(quants.len());
    for ((&quant, low), high) in quants.iter().zip(low).zip(high) {
        *low = scale * f32::from(quant & 15) + offset;
        *high = scale * f32::from(quant >> 4) + offset;
    }
}

/// d, dmin, twelve bytes of 6-bit scales and minima, 128 bytes of nibbles: eight groups of 32.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half(block, 0), half(block, 2));
    let (packed, quants) = block[4..].split_at(12);
    for (pair, (quants, out)) in quants.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low_scale, low_minimum) = six_bits(packed, 2 * pair);
        let (high_scale, high_minimum) = six_bits(packed, 2 * pair + 1);
        let (low, high) = out.split_at_mut(32);
        for ((&quant, low), high) in quants.iter().zip(low).zip(high) {
            *low = scale * low_scale * f32::from(quant & 15) - minimum * low_minimum;
            *high = scale * high_scale * f32::from(quant >> 4) - minimum * high_minimum;
        }
    }
}

/// Scale and minimum of one group (`get_scale_min_k4`).
fn six_bits(packed: &[u8], group: usize) -> (f32, f32) {
    if group < 4 {
        return (f32::from(packed[group] & 63), f32::from(packed[group + 4] & 63));
    }
    let scale = (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4);
    let minimum = (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4);
    (f32::from(scale), f32::from(minimum))
}

/// 128 bytes of low nibbles, 64 of high bit pairs, sixteen 8-bit scales, d: two halves of 128 values.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, _) = rest.split_at(16);
    let scale = half(block, 208);
    for (part, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&low[64 * part..], &high[32 * part..], &scales[8 * part..]);
        for index in 0..32 {
            let bits = [
                (low[index] & 15) | ((high[index] & 3) << 4),
                (low[index + 32] & 15) | (((high[index] >> 2) & 3) << 4),
                (low[index] >> 4) | (((high[index] >> 4) & 3) << 4),
                (low[index + 32] >> 4) | ((high[index] >> 6) << 4),
            ];
            for (quarter, bits) in bits.into_iter().enumerate() {
                let group = f32::from(scales[2 * quarter + index / 16] as i8);
                out[32 * quarter + index] = scale * group * (f32::from(bits) - 32.0);
            }
        }
    }
}
