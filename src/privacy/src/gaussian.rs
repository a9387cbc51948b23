//! Gaussian noise in float64, guarded against floating-point attacks.
//!
//! Textbook samplers in floating point leave holes: some doubles can come out only for some true values, so the low
//! bits of a "noised" value reveal what was under the noise (Mironov 2012 for Laplace noise; Jin et al. 2022 and
//! Holohan & Braghin 2021 for Gaussian). Two guards here:
//!
//! 1. *Lattice.* The sum is rounded to integer multiples of a power of two, the noise likewise, and they are added as
//!    integers. Noise rounded to a lattice and added to a value on that lattice is a function of (value + real noise),
//!    so the guarantee of the real-valued Gaussian carries over, and no low bits remain to look at. Rounding each of
//!    `d` coordinates of a *sum* can move two neighbouring sums apart by `granularity · √d`; [`Lattice`] keeps that
//!    below 2⁻²⁰ of the clip norm, and the noise is scaled for the larger sensitivity ([`Lattice::sensitivity`]). Noise
//!    too wide for the 53 bits of a float64 on that lattice gets a coarser one, by the same rule ([`Coarsening`]).
//! 2. *Combination.* Each value is half the sum of four independent Box–Muller draws from 64-bit uniforms (Holohan &
//!    Braghin 2021): eight uniforms stand behind one lattice point, so none can be solved for, and the tail reaches
//!    19 standard deviations where one draw would stop at 9.5.
//!
//! What remains is the rounding error of float64 transcendental functions, about 2⁻⁵⁰ of a standard deviation, far
//! below the lattice's spacing. Functions come from `libm`, so every machine and rank computes the same bits.

use rand_chacha::ChaCha20Rng;
use rand_core::RngCore;
use rayon::prelude::*;

use crate::keyed::{Context, NoiseKey};

/// Coordinates that one ChaCha20 stream serves; streams of different chunks are drawn in parallel.
const CHUNK: usize = 1 << 15;

/// Largest deviation of noise, in spacings of the lattice that it is drawn on.
const WIDEST: f64 = (1u64 << 40) as f64;

/// Lattice that sums and noise are rounded to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lattice {
    granularity: f64,
    slack: f64,
    clip_norm: f64,
}

impl Lattice {
    /// The coarsest power of two whose rounding moves a vector of `dimension` coordinates by at most 2⁻²⁰ · `clip_norm`.
    pub fn new(clip_norm: f64, dimension: usize) -> Self {
        let finest = clip_norm / (1u64 << 20) as f64 / (dimension.max(1) as f64).sqrt();
        let granularity = libm::exp2(libm::floor(libm::log2(finest)).max(-1000.0));
        let slack = granularity * (dimension as f64).sqrt();
        Self { granularity, slack, clip_norm }
    }

    /// Spacing of the lattice: a power of two.
    pub fn granularity(&self) -> f64 {
        self.granularity
    }

    /// L2 sensitivity of a sum after rounding to the lattice: `clip_norm` plus the slack for rounding, at most
    /// (1 + 2⁻²⁰) · `clip_norm`. Covers both a rounded sum and a sum of rounded units.
    pub fn sensitivity(&self) -> f64 {
        self.clip_norm + self.slack
    }

    /// The value of a lattice index.
    pub fn value(&self, index: i64) -> f64 {
        index as f64 * self.granularity
    }
}

/// The lattice on which noise of one deviation is drawn: every 2^`bits`-th point of the sum's.
///
/// On the sum's own lattice, noise of more than 2⁵³ spacings would have zeros for its low bits and so bare those of the
/// sum, and noise beyond i64 would stick at its end and bare all of it. So where a deviation has more than 2⁴⁰ spacings,
/// the sum is rounded to a coarser lattice first. Why no draw then reaches 2⁵³ spacings, σ being the noise multiplier:
///
/// - A draw is below 19 deviations: half the sum of four radii √(−2 ln u) with u ≥ 2⁻⁶⁵.
/// - Rounding moves two neighbouring sums of `d` coordinates apart by `spacing · √d` at most, so the noise is widened for
///   that. A spacing is below 2⁻³⁹ · σ · sensitivity (2⁻⁴⁰ of the deviation, and less than twice that for being a power of
///   two), so the factor is below 1 + 2⁻³⁹ · σ · √d, which is 2 at σ = 2²⁰ and d = 2³⁸: more than any noise multiplier that
///   [`crate::event::Event::validate`] takes, and more coordinates than fit a terabyte.
/// - Together: below 19 · 2 · 2⁴⁰ < 2⁴⁶ spacings, seven bits short of what a float64 tells apart.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Coarsening {
    bits: u32,
    /// Deviation in spacings of the coarser lattice, widened for its sensitivity.
    scale: f64,
}

impl Coarsening {
    fn new(lattice: &Lattice, deviation: f64) -> Self {
        let scale = deviation / lattice.granularity;
        let bits = libm::ceil(libm::log2(scale / WIDEST)).max(0.0);
        if bits == 0.0 {
            return Self { bits: 0, scale };
        }
        let spacing = libm::exp2(bits);
        // `slack` is √d spacings of the fine lattice.
        let widening = 1.0 + lattice.slack * spacing / lattice.sensitivity();
        Self { bits: bits as u32, scale: scale / spacing * widening }
    }

    /// Rounds `index` to the coarser lattice and adds a draw of standard noise.
    fn add(&self, index: i64, noise: f64) -> i64 {
        let rounded = (i128::from(index) + ((1i128 << self.bits) >> 1)) >> self.bits;
        let noised = (rounded + libm::rint(noise * self.scale) as i128) << self.bits;
        // What does not fit is cut after the noise was added: post-processing.
        noised.clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }
}

/// Adds Gaussian noise of standard deviation `deviation` to lattice indices, in place; wider by at most the factor that
/// a coarser lattice takes, where the noise needs one.
///
/// The noise is a function of key and context alone: the same on every rank, whatever the number of threads.
pub fn add_noise(key: &NoiseKey, context: &Context, lattice: &Lattice, deviation: f64, indices: &mut [i64]) {
    let stream = key.stream(context);
    let coarsening = Coarsening::new(lattice, deviation);
    indices.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, indices)| {
        let mut stream = stream.clone();
        stream.set_stream(chunk as u64);
        let mut pairs = indices.chunks_mut(2);
        for pair in &mut pairs {
            let noise = normal_pair(&mut stream);
            for (index, noise) in pair.iter_mut().zip(noise) {
                *index = coarsening.add(*index, noise);
            }
        }
    });
}

/// Two independent standard normal values, each half the sum of four Box–Muller draws.
fn normal_pair(stream: &mut ChaCha20Rng) -> [f64; 2] {
    let mut sums = [0.0; 2];
    for _ in 0..4 {
        // (n + ½) / 2⁶⁴ is never 0; where rounding makes it 1, the radius is 0.
        let radius_uniform = (stream.next_u64() as f64 + 0.5) * 2f64.powi(-64);
        let angle_uniform = (stream.next_u64() >> 11) as f64 * 2f64.powi(-53);
        let radius = libm::sqrt(-2.0 * libm::log(radius_uniform));
        let (sin, cos) = libm::sincos(2.0 * std::f64::consts::PI * angle_uniform);
        sums[0] += radius * cos;
        sums[1] += radius * sin;
    }
    sums.map(|sum| sum / 2.0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::event::MAX_NOISE_MULTIPLIER;

    fn draw(key: u8, context: &str, count: usize) -> Vec<f64> {
        let lattice = Lattice::new(1.0, count);
        let mut indices = vec![0; count];
        add_noise(&NoiseKey::new([key; 32]), &Context::new(context), &lattice, 1.0, &mut indices);
        indices.into_iter().map(|index| lattice.value(index)).collect()
    }

    fn normal_cdf(x: f64) -> f64 {
        0.5 * libm::erfc(-x / std::f64::consts::SQRT_2)
    }

    #[test]
    fn noise_is_standard_normal() {
        // Kolmogorov–Smirnov: P(√n · D > 2.69) ≈ 2 exp(-2 · 2.69²) = 1e-6; the key is fixed, so this cannot flake.
        let mut draws = draw(1, "ks", 400_001);
        draws.sort_by(f64::total_cmp);
        let n = draws.len() as f64;
        let distance = draws
            .iter()
            .enumerate()
            .map(|(i, &x)| {
                let cdf = normal_cdf(x);
                (cdf - i as f64 / n).max((i + 1) as f64 / n - cdf)
            })
            .fold(0.0, f64::max);
        assert!(distance * n.sqrt() < 2.69, "{}", distance * n.sqrt());
        // The tail beyond 4: expected 25.3 of 400,001; Poisson bounds at 1e-6 are 5 and 56.
        let tail = draws.iter().filter(|x| x.abs() > 4.0).count();
        assert!((5..=56).contains(&tail), "{tail}");
    }

    #[test]
    fn noise_is_independent_across_streams_and_neighbours() {
        // Correlation of n independent pairs has deviation 1/√n; 4.9 deviations: false alarm 1e-6 each.
        let n = 200_000;
        let (one, two) = (draw(1, "step 1", n), draw(1, "step 2", n));
        let correlate = |a: &[f64], b: &[f64]| {
            a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (a.len().min(b.len()) as f64).sqrt()
        };
        assert!(correlate(&one, &two).abs() < 4.9);
        for lag in [1, 2, 3, CHUNK] {
            assert!(correlate(&one[lag..], &one).abs() < 4.9, "lag {lag}");
            let squares: Vec<f64> = one.iter().map(|x| (x * x - 1.0) / std::f64::consts::SQRT_2).collect();
            assert!(correlate(&squares[lag..], &squares).abs() < 5.5, "squares, lag {lag}");
        }
    }

    #[test]
    fn noise_is_reproducible_and_never_repeats() {
        let n = 3 * CHUNK + 5;
        assert_eq!(draw(1, "a", n), draw(1, "a", n));
        let one = draw(1, "a", n);
        for (other, what) in [(draw(1, "b", n), "context"), (draw(2, "a", n), "key")] {
            let equal = one.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(equal < 5, "{what}: {equal} equal values");
        }
        // Chunks must not repeat one another.
        let first: HashSet<u64> = one[..1000].iter().map(|x| x.to_bits()).collect();
        let again = one[CHUNK..CHUNK + 1000].iter().filter(|x| first.contains(&x.to_bits())).count();
        assert!(again < 5);
    }

    #[test]
    fn lattice_bounds_sensitivity() {
        for dimension in [1, 2, 1000, 13_000_000] {
            for clip_norm in [1e-6, 0.5, 1.0, 3.7, 1e6] {
                let lattice = Lattice::new(clip_norm, dimension);
                let relative = lattice.sensitivity() / clip_norm - 1.0;
                assert!(relative > 0.0 && relative <= 2f64.powi(-20), "{dimension} {clip_norm}: {relative:e}");
                assert_eq!(lattice.granularity().log2().fract(), 0.0);
            }
        }
    }

    #[test]
    fn noise_at_the_limits_is_far_from_what_a_float_cannot_tell_apart() {
        for dimension in [1, 1000, 1 << 24, 1 << 38] {
            for noise_multiplier in [1e-9, 1.0, 50.0, MAX_NOISE_MULTIPLIER] {
                for clip_norm in [1e-10, 0.5, 1e20] {
                    let lattice = Lattice::new(clip_norm, dimension);
                    let deviation = noise_multiplier * lattice.sensitivity();
                    let Coarsening { bits, scale } = Coarsening::new(&lattice, deviation);
                    assert!(19.0 * scale < 2f64.powi(46), "{dimension} {noise_multiplier}: {scale:e}");
                    let spacing = lattice.granularity() * libm::exp2(f64::from(bits));
                    // The noise is at least what the sensitivity after rounding asks for.
                    let sensitivity = lattice.sensitivity()
                        + if bits > 0 { lattice.slack * spacing / lattice.granularity() } else { 0.0 };
                    assert!(scale * spacing >= noise_multiplier * sensitivity * (1.0 - 1e-12));
                }
            }
        }
        // The uniform next to zero gives the largest radius.
        assert!(2.0 * libm::sqrt(-2.0 * libm::log(0.5 * 2f64.powi(-64))) < 19.0);
    }

    #[test]
    fn noise_that_is_very_wide_bares_neither_the_low_bits_of_a_sum_nor_its_size() {
        let lattice = Lattice::new(1.0, 1 << 30);
        let deviation = MAX_NOISE_MULTIPLIER * lattice.sensitivity();
        let Coarsening { bits, scale } = Coarsening::new(&lattice, deviation);
        assert!(bits > 10);
        let noised = |sum: i64| {
            let mut indices = vec![sum; 10_000];
            add_noise(&NoiseKey::new([5; 32]), &Context::new("wide"), &lattice, deviation, &mut indices);
            indices
        };
        let (zero, odd, large) = (noised(0), noised((1 << (bits - 1)) - 1), noised(1 << 61));
        assert_eq!(zero, odd);
        assert!(zero.iter().all(|index| index % (1 << bits) == 0));
        assert!(zero.iter().zip(&large).all(|(zero, large)| large - zero == 1 << 61));
        // 5 deviations √(2/n) of the estimated variance.
        let variance =
            zero.iter().map(|&index| (index as f64 / libm::exp2(f64::from(bits)) / scale).powi(2)).sum::<f64>();
        assert!((variance / 1e4 - 1.0).abs() < 5.0 * (2.0f64 / 1e4).sqrt(), "{variance}");
    }

    #[test]
    fn noise_is_the_same_for_any_number_of_threads() {
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| draw(3, "threads", 5 * CHUNK + 7))
        };
        let one = with_threads(1);
        assert_eq!(one, with_threads(2));
        assert_eq!(one, with_threads(5));
    }
}
