//! All lanes of a vector as one, by halves: one after the other, each would wait for the one before.
//!
//! On x86-64 by instructions. What the compiler makes of the plain steps either goes through memory, which every row then
//! waits for, or has already split the loop that the lanes come from into vectors of two; the bits are the same.

/// Lanes that kernels sum up in: two vectors of AVX-512.
pub(crate) const LANES: usize = 32;

/// Σ of the lanes.
#[inline(always)]
pub(super) fn sum(lanes: &[f32; LANES]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx::sum(lanes) };
    }
    halved(lanes, |a, b| a + b)
}

/// The largest lane; NaN may be passed over.
#[inline(always)]
pub(super) fn largest(lanes: &[f32; LANES]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx::largest(lanes) };
    }
    halved(lanes, larger)
}

/// Bit by bit, whether the sign of the lane is set.
#[inline(always)]
pub(super) fn signs(lanes: &[f32; LANES]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has the instructions.
        return unsafe { avx::signs(lanes) };
    }
    plain_signs(lanes)
}

fn plain_signs(lanes: &[f32; LANES]) -> u32 {
    lanes.iter().rev().fold(0, |bits, lane| bits << 1 | lane.to_bits() >> 31)
}

/// `b` where it is larger, else `a`.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
fn halved(lanes: &[f32; LANES], both: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = both(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
mod avx {
    use std::arch::x86_64::*;

    use super::LANES;

    #[inline]
    #[target_feature(enable = "avx")]
    pub(super) fn sum(lanes: &[f32; LANES]) -> f32 {
        halved(lanes, |a, b| _mm256_add_ps(a, b), |a, b| _mm_add_ps(a, b))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub(super) fn largest(lanes: &[f32; LANES]) -> f32 {
        // The instruction gives its second operand unless the first is larger.
        halved(lanes, |a, b| _mm256_max_ps(b, a), |a, b| _mm_max_ps(b, a))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub(super) fn signs(lanes: &[f32; LANES]) -> u32 {
        [24, 16, 8, 0].into_iter().fold(0, |bits, at| {
            // SAFETY: eight lanes from each place on.
            let lanes = unsafe { _mm256_loadu_ps(lanes[at..].as_ptr()) };
            bits << 8 | _mm256_movemask_ps(lanes) as u32
        })
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn halved(
        lanes: &[f32; LANES],
        eight: impl Fn(__m256, __m256) -> __m256,
        four: impl Fn(__m128, __m128) -> __m128,
    ) -> f32 {
        // SAFETY: eight lanes from each place on.
        let [a, b, c, d] = [0, 8, 16, 24].map(|at| unsafe { _mm256_loadu_ps(lanes[at..].as_ptr()) });
        let lanes = eight(eight(a, c), eight(b, d));
        let lanes = four(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let lanes = four(lanes, _mm_movehl_ps(lanes, lanes));
        _mm_cvtss_f32(four(lanes, _mm_movehdup_ps(lanes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_joined_alike_everywhere() {
        for seed in 0..100u32 {
            let mut lanes: [f32; LANES] =
                std::array::from_fn(|lane| ((seed * 7919 + lane as u32 * 104_729) % 1000) as f32 / 7.0 - 70.0);
            if seed % 3 == 0 {
                lanes[seed as usize % LANES] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][seed as usize / 3 % 3];
            }
            assert_eq!(sum(&lanes).to_bits(), halved(&lanes, |a, b| a + b).to_bits());
            assert_eq!(largest(&lanes).to_bits(), halved(&lanes, larger).to_bits());
            assert_eq!(signs(&lanes), plain_signs(&lanes));
        }
    }
}
