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
//!    below 2⁻²⁰ of the clip norm, and the noise is scaled for the larger sensitivity ([`Lattice::sensitivity`]).
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

    /// Nearest lattice index; a non-finite value counts as zero, and huge ones saturate.
    pub fn index(&self, value: f64) -> i64 {
        let scaled = libm::rint(value / self.granularity);
        // `as` saturates, so an absurd input cannot overflow; half the range leaves room to add noise.
        if scaled.is_finite() { (scaled as i64).clamp(i64::MIN / 2, i64::MAX / 2) } else { 0 }
    }

    /// The value of a lattice index.
    pub fn value(&self, index: i64) -> f64 {
        index as f64 * self.granularity
    }
}

/// Adds Gaussian noise of standard deviation `deviation` to lattice indices, in place.
///
/// The noise is a function of key and context alone: the same on every rank, whatever the number of threads.
pub fn add_noise(key: &NoiseKey, context: &Context, lattice: &Lattice, deviation: f64, indices: &mut [i64]) {
    let stream = key.stream(context);
    let scale = deviation / lattice.granularity;
    indices.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, indices)| {
        let mut stream = stream.clone();
        stream.set_stream(chunk as u64);
        let mut pairs = indices.chunks_mut(2);
        for pair in &mut pairs {
            let noise = normal_pair(&mut stream);
            for (index, noise) in pair.iter_mut().zip(noise) {
                *index = index.saturating_add(libm::rint(noise * scale) as i64);
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
        let lattice = Lattice::new(1.0, 10);
        assert_eq!(lattice.index(f64::NAN), 0);
        assert_eq!(lattice.index(f64::INFINITY), 0);
        assert_eq!(lattice.index(1e300), i64::MAX / 2);
        assert_eq!(lattice.value(lattice.index(0.25)), 0.25);
    }
}
