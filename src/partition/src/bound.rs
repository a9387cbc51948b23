//! At most so many records of each privacy unit, and which split a unit goes to.
//!
//! Both depend on the unit, its own records and the key alone: other units coming or going changes neither. State is
//! one entry for each unit, whatever its number of records.

use std::collections::HashMap;

use privacy::keyed::{Context, KeyedHasher, NoiseKey};

use crate::config::Shares;

/// A record that its unit keeps so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// Keyed hash of the record's id: the smallest ones of a unit stay.
    pub priority: u64,
    /// Number of the record over all inputs.
    pub ordinal: u64,
}

/// Keeps, for each unit, the records of smallest priority.
pub struct Bounds {
    max_per_unit: usize,
    /// By priority.
    units: HashMap<u64, Vec<Choice>>,
}

impl Bounds {
    /// At most `max_per_unit` records of each unit.
    pub fn new(max_per_unit: u32) -> Self {
        Self { max_per_unit: max_per_unit as usize, units: HashMap::new() }
    }

    /// Offers a record of the unit that hashes to `unit`.
    ///
    /// A record offered twice, with the same priority, is one record: so ids stay unique within a unit.
    pub fn offer(&mut self, unit: u64, choice: Choice) {
        let kept = self.units.entry(unit).or_insert_with(|| Vec::with_capacity(1));
        if let Err(place) = kept.binary_search_by_key(&choice.priority, |other| other.priority)
            && place < self.max_per_unit
        {
            kept.truncate(self.max_per_unit - 1);
            kept.insert(place, choice);
        }
    }

    /// Number of units. PRIVACY: private unless declared.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// All that is kept, in the order of the input.
    pub fn into_selection(self) -> Vec<Choice> {
        let mut selection: Vec<Choice> = self.units.into_values().flatten().collect();
        selection.sort_unstable_by_key(|choice| choice.ordinal);
        selection
    }
}

/// Part of a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Trained on, and voting.
    Train,
    /// Watched during training.
    Validation,
    /// Compared with at the end.
    Test,
}

impl Split {
    /// As the column `split` holds it.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }
}

/// The keyed hashes of one corpus.
pub struct Keys {
    unit: KeyedHasher,
    split: KeyedHasher,
    priority: KeyedHasher,
    dedup: KeyedHasher,
}

impl Keys {
    /// Contexts bind the name of the corpus only, so that a grown input keeps every unit in its split.
    pub fn new(key: &NoiseKey, corpus: &str) -> Self {
        let hasher = |purpose| key.hasher(&Context::new(purpose).field("corpus", corpus.as_bytes()));
        Self {
            unit: hasher("partition/unit"),
            split: hasher("partition/split"),
            priority: hasher("partition/bound"),
            dedup: hasher("partition/dedup"),
        }
    }

    /// What [`Bounds`] knows a unit by.
    pub fn unit(&self, unit: &str) -> u64 {
        self.unit.hash(unit.as_bytes())
    }

    /// The priority of a record within its unit.
    pub fn priority(&self, record_id: &str) -> u64 {
        self.priority.hash(record_id.as_bytes())
    }

    /// The seed of deduplication.
    pub fn dedup_seed(&self) -> u64 {
        self.dedup.hash(b"")
    }

    /// The split of a unit.
    pub fn split(&self, unit: &str, shares: Shares) -> Split {
        let position = self.split.hash(unit.as_bytes()) as f64 / 2_f64.powi(64);
        if position < shares.train {
            Split::Train
        } else if position < shares.train + shares.validation {
            Split::Validation
        } else {
            Split::Test
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn selection(max: u32, offers: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut bounds = Bounds::new(max);
        for (ordinal, &(unit, priority)) in offers.iter().enumerate() {
            bounds.offer(unit, Choice { priority, ordinal: ordinal as u64 });
        }
        bounds.into_selection().iter().map(|choice| offers[choice.ordinal as usize]).collect()
    }

    #[test]
    fn the_smallest_priorities_of_a_unit_stay_in_input_order() {
        assert_eq!(selection(2, &[(1, 9), (2, 5), (1, 3), (1, 7), (1, 3)]), [(2, 5), (1, 3), (1, 7)]);
    }

    proptest! {
        #[test]
        fn what_a_unit_keeps_does_not_depend_on_other_units(
            offers in prop::collection::vec((0..5_u64, 0..1000_u64), 0..60), max in 1..4_u32,
        ) {
            let all = selection(max, &offers);
            for unit in 0..5 {
                let alone: Vec<_> = offers.iter().copied().filter(|offer| offer.0 == unit).collect();
                let kept: Vec<_> = all.iter().copied().filter(|offer| offer.0 == unit).collect();
                prop_assert!(kept.len() <= max as usize);
                prop_assert_eq!(kept, selection(max, &alone));
            }
        }

        #[test]
        fn what_a_unit_keeps_does_not_depend_on_order(
            offers in prop::collection::vec((0..5_u64, 0..1000_u64), 0..60), max in 1..4_u32,
        ) {
            let mut reversed = offers.clone();
            reversed.reverse();
            let sorted = |mut kept: Vec<(u64, u64)>| { kept.sort_unstable(); kept };
            prop_assert_eq!(sorted(selection(max, &offers)), sorted(selection(max, &reversed)));
        }
    }

    #[test]
    fn splits_have_their_shares_and_follow_the_unit_alone() {
        let shares = Shares { train: 0.8, validation: 0.15, test: 0.05 };
        let keys = Keys::new(&NoiseKey::new([3; 32]), "chats");
        let again = Keys::new(&NoiseKey::new([3; 32]), "chats");
        let mut counts = [0; 3];
        for index in 0..20_000 {
            let unit = format!("unit-{index}");
            let split = keys.split(&unit, shares);
            assert_eq!(split, again.split(&unit, shares));
            counts[split as usize] += 1;
        }
        // Five standard deviations: a false alarm in two million.
        for (count, share) in counts.into_iter().zip([0.8, 0.15, 0.05_f64]) {
            let deviation = (20_000.0 * share * (1.0 - share)).sqrt();
            assert!((f64::from(count) - 20_000.0 * share).abs() < 5.0 * deviation, "{counts:?}");
        }
        let other = Keys::new(&NoiseKey::new([4; 32]), "chats");
        assert!((0..100).any(|i| other.split(&format!("{i}"), shares) != keys.split(&format!("{i}"), shares)));
    }
}
