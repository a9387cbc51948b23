//! Algorithm 2's private step: votes of units over bins, noised with the exact discrete Gaussian.

use crate::AccountingError;
use crate::discrete_gaussian::DiscreteGaussian;
use crate::event::Event;
use crate::keyed::{Context, NoiseKey};
use crate::training::Noised;

/// The voting mechanism: one vote per unit, discrete Gaussian noise of parameter `sigma`.
#[derive(Clone, Debug, PartialEq)]
pub struct VotingMechanism {
    sigma: f64,
    noise: DiscreteGaussian,
}

impl VotingMechanism {
    /// `sigma` must be finite and positive.
    pub fn new(sigma: f64) -> Result<Self, AccountingError> {
        let noise = DiscreteGaussian::new(sigma)?;
        Event::DiscreteGaussian { noise_multiplier: sigma }.validate()?;
        Ok(Self { sigma, noise })
    }

    /// The event to reserve.
    pub fn event(&self) -> Event {
        Event::DiscreteGaussian { noise_multiplier: self.sigma }
    }

    /// Noised histogram over `bins` from one `(unit, bin)` vote per record: where a unit has several records, a keyed
    /// choice independent of other units keeps one vote, so a unit's vote vector has L2 norm ≤ 1.
    ///
    /// `bins` is public and every bin gets noise, whether or not anybody voted for it. A vote for a bin that does not
    /// exist counts for nothing: to fail would itself tell something about the unit.
    pub fn release(
        &self,
        key: &NoiseKey,
        context: &Context,
        bins: usize,
        votes: &[(String, usize)],
    ) -> Noised<Vec<i64>> {
        let mut stream = key.stream(&context.clone().field("purpose", b"noise"));
        let mut counts = count_votes(key, context, bins, votes);
        for count in &mut counts {
            *count = count.saturating_add(self.noise.sample(&mut stream));
        }
        Noised(counts)
    }
}

/// One vote per unit. Guarantee: adding or removing one unit changes one count by at most 1.
fn count_votes(key: &NoiseKey, context: &Context, bins: usize, votes: &[(String, usize)]) -> Vec<i64> {
    let chooser = key.hasher(&context.clone().field("purpose", b"choice"));
    // By unit and bin, so that the choice does not depend on the order in which records were read.
    let mut sorted: Vec<&(String, usize)> = votes.iter().collect();
    sorted.sort_unstable();
    let mut counts = vec![0; bins];
    for of_unit in sorted.chunk_by(|one, next| one.0 == next.0) {
        let choice = chooser.hash(of_unit[0].0.as_bytes()) % of_unit.len() as u64;
        if let Some(count) = counts.get_mut(of_unit[choice as usize].1) {
            *count += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> NoiseKey {
        NoiseKey::new([3; 32])
    }

    fn votes(list: &[(&str, usize)]) -> Vec<(String, usize)> {
        list.iter().map(|(unit, bin)| (unit.to_string(), *bin)).collect()
    }

    #[test]
    fn every_bin_gets_noise_of_the_stated_scale() {
        let (sigma, bins) = (10.0, 20_000);
        let noised = VotingMechanism::new(sigma).unwrap().release(&key(), &Context::new("vote"), bins, &[]);
        // P(X = 0) = 0.0399 at σ = 10: 798 expected of 20,000; 937 is more than 5 deviations away.
        let zeros = noised.value().iter().filter(|&&count| count == 0).count();
        assert!(zeros < 937, "{zeros}");
        // The variance is σ² to the last digit at σ = 10; 5 deviations √(2/n) of its estimate.
        let n = bins as f64;
        let ratio = noised.value().iter().map(|&count| (count as f64).powi(2)).sum::<f64>() / (n * sigma * sigma);
        assert!((ratio - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{ratio}");
    }

    #[test]
    fn release_is_reproducible_and_fresh_when_the_context_differs() {
        let mechanism = VotingMechanism::new(10.0).unwrap();
        let votes = votes(&[("a", 0), ("b", 1), ("b", 2)]);
        let release = |digest: &[u8]| {
            let context = Context::new("vote").field("corpus", digest);
            mechanism.release(&key(), &context, 200, &votes).value().clone()
        };
        assert_eq!(release(b"one"), release(b"one"));
        let (one, two) = (release(b"one"), release(b"two"));
        // Independent noise at σ = 10 agrees in a bin with probability 0.0282; 5.6 expected of 200, at most 25.
        assert!(one.iter().zip(&two).filter(|(a, b)| a == b).count() <= 25);
    }

    #[test]
    fn order_of_records_does_not_matter() {
        let one = votes(&[("a", 0), ("a", 3), ("b", 1), ("a", 2)]);
        let two: Vec<_> = one.iter().rev().cloned().collect();
        let context = Context::new("vote");
        assert_eq!(count_votes(&key(), &context, 4, &one), count_votes(&key(), &context, 4, &two));
    }

    #[test]
    fn a_vote_outside_the_bins_counts_for_nothing() {
        let outside = votes(&[("a", 7)]);
        assert_eq!(count_votes(&key(), &Context::new("v"), 4, &outside), vec![0; 4]);
    }

    #[test]
    fn sigma_must_be_positive_and_finite() {
        for sigma in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(VotingMechanism::new(sigma).is_err(), "{sigma}");
        }
    }

    proptest! {
        #[test]
        fn one_unit_moves_the_votes_by_at_most_one(
            list in prop::collection::vec((0u8..20, 0usize..12), 0..80),
            removed in 0u8..20,
        ) {
            let with: Vec<_> = list.iter().map(|(unit, bin)| (unit.to_string(), *bin)).collect();
            let without: Vec<_> = with.iter().filter(|(unit, _)| *unit != removed.to_string()).cloned().collect();
            let context = Context::new("vote");
            // Ten bins and votes for twelve: a vote may also be void.
            let (a, b) = (count_votes(&key(), &context, 10, &with), count_votes(&key(), &context, 10, &without));
            let squares: i64 = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
            prop_assert!(squares <= 1);
        }
    }
}
