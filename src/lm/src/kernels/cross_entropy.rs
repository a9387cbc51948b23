//! Cross-entropy of rows of logits, which are products of a vocabulary, and its gradient.
//!
//! The gradient of a row with respect to its logits is the probability of each token, less one for the label. To take it
//! back through the vocabulary is a tenth of a training step of SmolLM2-135M, nearly all of it for probabilities far too
//! small to matter one by one. To leave those out would bend the gradient, since they all pull the same way; so they are
//! rounded by lot ([`drawn_cross_entropy`]). "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al., ICLR
//! 2025) has the idea of what can be skipped.

use super::lanes::{self, LANES};
use super::{Element, exp, kernels, largest, sum};

/// Below this part of the probability that is not the label's, a token's is drawn by lot. By `tests/golden/lots.py`, the
/// gradient of an example is then off by 7.93 % from that in float32, and by 7.91 % where all 49,152 tokens count instead of
/// 550; four times as much gives 8.12 %, and is hardly faster.
const SMALL: f32 = 1.0 / 4096.0;

kernels! {
    /// Cross-entropy of rows of logits as wide as `vocab`; each row becomes its gradient.
    fn cross_entropy / cross_entropy_body<E: Element>(
        logits: &mut [E], vocab: usize, labels: &[i64], losses: &mut [f32],
    );
    /// Cross-entropy of a row, and the tokens that its gradient is made of.
    fn draw / draw_body<E: Element>(logits: &[E], label: usize, room: &mut Room, loss: &mut f32);
    /// Σ share · the token's row of `vocabulary`, whose rows are as wide as `out`.
    fn add_up / add_up_body<E: Element>(shares: &[Share], vocabulary: &[E], out: &mut [E]);
}

/// The same as [`cross_entropy`] of logits that are products with the rows of `vocabulary`, each as wide as those of
/// `gradient`, with respect to what they are products of.
///
/// A token with less than [`SMALL`] of the probability that is not the label's counts either that much or nothing, by lot, so
/// that the gradient stays what it is on average. A row's lots follow from the row alone: it has the same gradient
/// whatever rows are beside it, as the bound on what one record adds demands, and again when a run is repeated.
pub(crate) fn drawn_cross_entropy<E: Element>(
    logits: &[E],
    vocabulary: &[E],
    labels: &[i64],
    losses: &mut [f32],
    gradient: &mut [E],
) {
    let rows = labels.len().max(1);
    let (vocab, width) = (logits.len() / rows, gradient.len() / rows);
    let mut room = Room::new(vocab);
    let rows = logits.chunks_exact(vocab).zip(gradient.chunks_exact_mut(width)).zip(labels.iter().zip(losses));
    for ((logits, gradient), (label, loss)) in rows {
        draw(logits, *label as usize, &mut room, loss);
        add_up(&room.shares, vocabulary, gradient);
    }
}

/// One of the tokens that a row's gradient is made of, and how much of it.
#[derive(Clone, Copy)]
pub(super) struct Share {
    token: u32,
    of: f32,
}

/// What [`draw`] works in, for one row after the other.
pub(super) struct Room {
    /// exp(logit − the highest), and no more than whole vectors of them.
    powers: Vec<f32>,
    /// Of each of those vectors, bit by bit, which count.
    hits: Vec<u32>,
    shares: Vec<Share>,
}

impl Room {
    fn new(vocab: usize) -> Self {
        let vectors = vocab.div_ceil(LANES);
        Self { powers: vec![0.0; vectors * LANES], hits: vec![0; vectors], shares: Vec::new() }
    }
}

#[inline(always)]
fn cross_entropy_body<E: Element>(logits: &mut [E], vocab: usize, labels: &[i64], losses: &mut [f32]) {
    let mut powers = vec![0f32; vocab];
    for ((row, label), loss) in logits.chunks_exact_mut(vocab).zip(labels).zip(losses) {
        let best = largest(row);
        for (power, value) in powers.iter_mut().zip(&*row) {
            *power = exp(value.wide() - best);
        }
        let total = sum([&powers], |[power]| power);
        let wanted = row[*label as usize].wide();
        *loss = best + total.ln() - wanted;
        let inverse = 1.0 / total;
        for (value, power) in row.iter_mut().zip(&powers) {
            *value = E::narrow(power * inverse);
        }
        // From the unrounded probability: near 1 the rounded one has lost what matters.
        row[*label as usize] = E::narrow(exp(wanted - best) * inverse - 1.0);
    }
}

#[inline(always)]
fn draw_body<E: Element>(logits: &[E], label: usize, room: &mut Room, loss: &mut f32) {
    let Room { powers, hits, shares } = room;
    let best = largest(logits);
    for (power, value) in powers.iter_mut().zip(logits) {
        *power = exp(value.wide() - best);
    }
    let own = std::mem::replace(&mut powers[label], 0.0);
    let others = sum([&*powers], |[power]| power);
    let total = own + others;
    *loss = best + total.ln() - logits[label].wide();
    let (inverse, small) = (1.0 / total, others * SMALL);
    shares.clear();
    shares.push(Share { token: label as u32, of: -others * inverse });
    // All comparisons before any share: what comes of them cannot be foreseen, and the processor would wait each time.
    let mut lots = Lots::new([best.to_bits(), total.to_bits(), label as u32]);
    let vectors = powers.as_chunks::<LANES>().0;
    for (hits, powers) in hits.iter_mut().zip(vectors) {
        let lots = lots.next();
        let mut counts = [0f32; LANES];
        for ((counts, lot), power) in counts.iter_mut().zip(lots).zip(powers) {
            *counts = if *power > lot * small { -1.0 } else { 0.0 };
        }
        *hits = lanes::signs(&counts);
    }
    for (vector, (&hits, powers)) in hits.iter().zip(vectors).enumerate() {
        let mut hits = hits;
        while hits != 0 {
            let lane = hits.trailing_zeros() as usize % LANES;
            hits &= hits - 1;
            shares.push(Share { token: (vector * LANES + lane) as u32, of: powers[lane].max(small) * inverse });
        }
    }
}

/// Numbers from 0 to 1, evenly spread: each is the one before plus the golden ratio, less what is whole (Weyl's sequence).
struct Lots(u32);

impl Lots {
    /// 2³² · (√5 − 1) / 2.
    const STEP: u32 = 0x9e37_79b9;

    /// Those that begin anywhere, as the seed has it.
    #[inline(always)]
    fn new(seed: [u32; 3]) -> Self {
        // Products carry every bit of the seed to those above, shifts to those below.
        let mix = |state: u32, word: u32| {
            let state = (state ^ word).wrapping_mul(0x7feb_352d);
            let state = (state ^ (state >> 15)).wrapping_mul(0x846c_a68b);
            state ^ (state >> 16)
        };
        Self(seed.into_iter().fold(0, mix))
    }

    #[inline(always)]
    fn next(&mut self) -> [f32; LANES] {
        let mut lots = [0f32; LANES];
        for (lane, lot) in lots.iter_mut().enumerate() {
            let bits = self.0.wrapping_add(Self::STEP.wrapping_mul(lane as u32));
            // 24 bits are what a float32 holds; signed, which CPUs convert at once.
            *lot = (bits >> 8) as i32 as f32 * (1.0 / (1 << 24) as f32);
        }
        self.0 = self.0.wrapping_add(Self::STEP.wrapping_mul(LANES as u32));
        lots
    }
}

/// Columns that are added up at a time, in registers.
const COLUMNS: usize = 64;
/// Shares from the one that is added to the one that is fetched: rows of the vocabulary lie anywhere in memory.
const AHEAD: usize = 32;

#[inline(always)]
fn add_up_body<E: Element>(shares: &[Share], vocabulary: &[E], out: &mut [E]) {
    let width = out.len();
    let (blocks, rest) = out.as_chunks_mut::<COLUMNS>();
    let mut first = 0;
    for out in blocks {
        let mut total = [0f32; COLUMNS];
        for (index, share) in shares.iter().enumerate() {
            if let Some(ahead) = shares.get(index + AHEAD) {
                fetch::<E>(vocabulary.as_ptr().wrapping_add(ahead.token as usize * width + first));
            }
            let row = &vocabulary[share.token as usize * width + first..][..COLUMNS];
            for (total, value) in total.iter_mut().zip(row) {
                *total = share.of.mul_add(value.wide(), *total);
            }
        }
        for (out, total) in out.iter_mut().zip(total) {
            *out = E::narrow(total);
        }
        first += COLUMNS;
    }
    for (out, column) in rest.iter_mut().zip(first..) {
        let value = |share: &Share| vocabulary[share.token as usize * width + column].wide();
        *out = E::narrow(shares.iter().fold(0.0, |total, share| share.of.mul_add(value(share), total)));
    }
}

/// Asks for some columns of a row.
#[inline(always)]
fn fetch<E>(columns: *const E) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..COLUMNS * size_of::<E>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every CPU has the instruction, and it may be told to fetch what is nowhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(columns.wrapping_byte_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = columns;
}
