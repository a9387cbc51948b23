//! Deduplication as in the paper's Appendix E: equal texts first, then texts that share a run of words.
//!
//! A text is dropped when it shares an n-gram of words with an earlier *kept* one. The paper's code also drops a text
//! that repeats an n-gram within itself, and lets the n-grams of dropped texts count; both make the outcome depend on
//! texts that are not in the corpus, so we do neither. Words are runs of letters and digits, and each other visible
//! character by itself, close to the tokenizer that the paper used; upper and lower case differ.
//!
//! State is one 64-bit hash for each distinct text and n-gram, in open addressing: 11 to 22 bytes each, 32 while the
//! table doubles. Hashes are seeded from the noise key, so nobody outside can craft a text that collides with another's.

use crate::config::Dedup;

/// A set of hashes that are already well mixed, in open addressing with linear probing.
///
/// The place of a hash is its leading bits, so hashes stay in order when the table doubles, and that is one pass through
/// memory. The standard set takes two cache misses for each look-up where this takes one, and look-ups are all the time
/// that deduplication takes.
#[derive(Default)]
struct HashTable {
    /// 0 is a free slot; a hash of 0 is kept as 1.
    slots: Vec<u64>,
    held: usize,
}

impl HashTable {
    fn place(&self, hash: u64) -> usize {
        (hash >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    fn contains(&self, hash: u64) -> bool {
        if self.slots.is_empty() {
            return false;
        }
        let hash = hash.max(1);
        let mut place = self.place(hash);
        while self.slots[place] != 0 {
            if self.slots[place] == hash {
                return true;
            }
            place = (place + 1) & (self.slots.len() - 1);
        }
        false
    }

    /// Adds a hash; `false` when it was there.
    fn insert(&mut self, hash: u64) -> bool {
        // At most three quarters full, so that probes stay short.
        if self.held * 4 >= self.slots.len() * 3 {
            self.double();
        }
        let hash = hash.max(1);
        let mut place = self.place(hash);
        while self.slots[place] != 0 {
            if self.slots[place] == hash {
                return false;
            }
            place = (place + 1) & (self.slots.len() - 1);
        }
        self.slots[place] = hash;
        self.held += 1;
        true
    }

    fn double(&mut self) {
        let larger = (self.slots.len() * 2).max(1024);
        let slots = std::mem::replace(&mut self.slots, vec![0; larger]);
        self.held = 0;
        slots.into_iter().filter(|&hash| hash != 0).for_each(|hash| {
            self.insert(hash);
        });
    }
}

/// What deduplication looks at in a text, computed apart so that threads can share the work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    text: u64,
    ngrams: Vec<u64>,
}

/// Computes fingerprints.
#[derive(Clone, Copy, Debug)]
pub struct Fingerprinter {
    dedup: Dedup,
    ngram: usize,
    seed: u64,
    /// `BASE` to the power of `ngram`: what a word that leaves the window weighs.
    leaving: u64,
}

/// Odd multiplier of the rolling polynomial, so that it is invertible modulo 2⁶⁴.
const BASE: u64 = 0x9E37_79B9_7F4A_7C15;

impl Fingerprinter {
    /// For n-grams of `ngram` words; `seed` is secret.
    pub fn new(dedup: Dedup, ngram: usize, seed: u64) -> Self {
        Self { dedup, ngram, seed, leaving: (0..ngram).fold(1_u64, |power, _| power.wrapping_mul(BASE)) }
    }

    /// The fingerprint of `text`; empty where nothing is compared.
    pub fn of(&self, text: &str) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        if self.dedup != Dedup::None {
            fingerprint.text = hash(self.seed, text.as_bytes());
        }
        if self.dedup == Dedup::Ngram {
            self.ngrams(text.as_bytes(), &mut fingerprint.ngrams);
        }
        fingerprint
    }

    /// Rolls a window of `ngram` words over the text.
    fn ngrams(&self, text: &[u8], out: &mut Vec<u64>) {
        let mut window = vec![0_u64; self.ngram];
        let (mut rolling, mut words, mut oldest) = (0_u64, 0_usize, 0_usize);
        let mut push = |word: u64| {
            rolling = rolling.wrapping_mul(BASE).wrapping_add(word);
            rolling = rolling.wrapping_sub(window[oldest].wrapping_mul(self.leaving));
            window[oldest] = word;
            oldest = if oldest + 1 == self.ngram { 0 } else { oldest + 1 };
            words += 1;
            if words >= self.ngram {
                out.push(mix(rolling ^ self.seed));
            }
        };
        let mut at = 0;
        while at < text.len() {
            match CLASSES[text[at] as usize] {
                Class::Space => at += 1,
                Class::Sign => {
                    push(mix(self.seed ^ u64::from(text[at])));
                    at += 1;
                }
                Class::Word => {
                    let mut word = self.seed;
                    while at < text.len() && CLASSES[text[at] as usize] == Class::Word {
                        word = (word ^ u64::from(text[at])).wrapping_mul(FNV_PRIME);
                        at += 1;
                    }
                    push(mix(word));
                }
            }
        }
    }
}

const FNV_PRIME: u64 = 0x0000_0100_0000_01B3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Word,
    Sign,
}

/// Bytes of other alphabets count as letters: a word boundary inside them only makes n-grams longer.
const CLASSES: [Class; 256] = {
    let mut classes = [Class::Word; 256];
    let mut byte = 0;
    while byte < 128 {
        let ascii = byte as u8;
        if ascii <= b' ' || ascii == 127 {
            classes[byte] = Class::Space;
        } else if !ascii.is_ascii_alphanumeric() {
            classes[byte] = Class::Sign;
        }
        byte += 1;
    }
    classes
};

/// The finaliser of SplitMix64: every input bit moves every output bit.
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    hash ^ (hash >> 31)
}

/// Seeded hash of a whole text, eight bytes at a time.
fn hash(seed: u64, text: &[u8]) -> u64 {
    let (chunks, rest) = text.as_chunks::<8>();
    let state = chunks
        .iter()
        .fold(mix(seed ^ text.len() as u64), |state, chunk| mix(state ^ u64::from_le_bytes(*chunk)).wrapping_add(BASE));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(state ^ u64::from_le_bytes(last))
}

/// Why a text is a duplicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duplicate {
    /// Equal to an earlier one.
    Exact,
    /// Shares an n-gram with an earlier kept one.
    Ngram,
}

/// What was seen so far.
#[derive(Default)]
pub struct Seen {
    texts: HashTable,
    ngrams: HashTable,
}

impl Seen {
    /// Whether a text is new; remembers it then. `dedup` is that of the fingerprint.
    pub fn insert(&mut self, dedup: Dedup, fingerprint: &Fingerprint) -> Result<(), Duplicate> {
        if dedup == Dedup::None {
            return Ok(());
        }
        if !self.texts.insert(fingerprint.text) {
            return Err(Duplicate::Exact);
        }
        if fingerprint.ngrams.iter().any(|&ngram| self.ngrams.contains(ngram)) {
            return Err(Duplicate::Ngram);
        }
        fingerprint.ngrams.iter().for_each(|&ngram| {
            self.ngrams.insert(ngram);
        });
        Ok(())
    }

    /// Bytes that the tables take for each hash that they hold.
    pub fn bytes_per_hash(&self) -> f64 {
        let slots = self.texts.slots.len() + self.ngrams.slots.len();
        8.0 * slots as f64 / (self.texts.held + self.ngrams.held).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(dedup: Dedup, ngram: usize, texts: &[&str]) -> Vec<usize> {
        let fingerprinter = Fingerprinter::new(dedup, ngram, 7);
        let mut seen = Seen::default();
        let new = |text: &str| seen.insert(dedup, &fingerprinter.of(text)).is_ok();
        let flags: Vec<bool> = texts.iter().copied().map(new).collect();
        (0..texts.len()).filter(|&index| flags[index]).collect()
    }

    #[test]
    fn none_keeps_all_and_exact_keeps_one_of_each() {
        let texts = ["a b", "a b", "a  b", "A b"];
        assert_eq!(kept(Dedup::None, 10, &texts), [0, 1, 2, 3]);
        assert_eq!(kept(Dedup::Exact, 10, &texts), [0, 2, 3]);
    }

    #[test]
    fn a_shared_run_of_words_is_a_duplicate_wherever_it_stands() {
        let texts = [
            "one two three four five",
            "zero zero two three four zero",
            "two three, four",
            "two three four",
            "two three",
            "Two three four",
        ];
        assert_eq!(kept(Dedup::Ngram, 3, &texts), [0, 2, 4, 5]);
    }

    #[test]
    fn n_grams_of_a_dropped_text_do_not_count() {
        assert_eq!(kept(Dedup::Ngram, 3, &["a b c", "a b c d e", "c d e"]), [0, 2]);
    }

    #[test]
    fn a_text_may_repeat_itself() {
        assert_eq!(kept(Dedup::Ngram, 2, &["ha ha ha ha ha"]), [0]);
    }

    #[test]
    fn the_rolling_window_equals_hashing_each_window_anew() {
        let words = ["w", "x", "yy", "z", "w", "x", "yy", "q"];
        let whole = Fingerprinter::new(Dedup::Ngram, 3, 11).of(&words.join(" ")).ngrams;
        let each: Vec<u64> = words
            .windows(3)
            .flat_map(|window| Fingerprinter::new(Dedup::Ngram, 3, 11).of(&window.join("\n")).ngrams)
            .collect();
        assert_eq!(whole, each);
        assert_eq!(whole[0], whole[4], "the same three words");
    }

    #[test]
    fn the_table_holds_what_was_inserted_and_nothing_else() {
        let mut table = HashTable::default();
        // Neighbours in the table, the last slots, zero, and many.
        let hashes: Vec<u64> = (0..2000).chain((0..2000).map(|i| u64::MAX - i)).chain((0..50_000).map(mix)).collect();
        let distinct: std::collections::HashSet<u64> = hashes.iter().map(|&hash| hash.max(1)).collect();
        let new = hashes.iter().filter(|&&hash| table.insert(hash)).count();
        assert_eq!(new, distinct.len());
        assert!(hashes.iter().all(|&hash| table.contains(hash)));
        assert!((60_000..70_000).all(|i| table.contains(mix(i)) == distinct.contains(&mix(i))));
    }

    #[test]
    fn a_hash_takes_at_most_forty_bytes_while_the_table_doubles() {
        let mut seen = Seen::default();
        for step in 0..200_000_u64 {
            let before = seen.bytes_per_hash();
            seen.ngrams.insert(mix(step));
            let now = seen.bytes_per_hash();
            // While it doubles, both tables exist.
            let peak = if now > before { before + now } else { now };
            assert!(seen.ngrams.held < 1000 || peak <= 40.0, "{peak} bytes at {step}");
        }
    }
}
