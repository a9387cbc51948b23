//! Deduplication as in the paper's Appendix E: equal texts first, then texts that share a run of words.
//!
//! A text is dropped when it shares an n-gram of words with an earlier one that stayed here. The paper's code also drops
//! a text that repeats an n-gram within itself, and lets the n-grams of duplicates count, so that texts go which repeat
//! nothing that stays; we do neither. The bound per unit comes later: a text that it drops has counted all the same, and
//! may have taken others' texts with it. That is part of the condition that the guarantee holds for the corpus as
//! partitioned.
//!
//! Words are runs of letters and digits, and each other visible character by itself, close to the tokenizer that the
//! paper used; upper and lower case differ.
//!
//! State is one 64-bit hash for each distinct text and n-gram, in open addressing: 11 to 22 bytes each, 32 while the
//! table doubles. Past [`IN_MEMORY`] n-grams go to disk, and which texts stay is told at the end ([`spill`]). Hashes are
//! seeded from the noise key, so nobody outside can craft a text that collides with another's.

mod spill;

use std::io;

use crate::config::Dedup;
use crate::dedup::spill::Spill;

/// N-grams that are held in memory: a table of 1 GiB, 1.5 GiB while it doubles to that.
pub const IN_MEMORY: usize = (1 << 27) / 4 * 3;
/// N-grams on disk that are judged at a time, at most: half a gigabyte.
const RANGE: usize = 8 << 20;

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

    /// Whether any of these is there. Looks at all their slots first, without a branch on what is found, so that the
    /// processor waits for memory once rather than for each.
    fn contains_any(&self, hashes: &[u64]) -> bool {
        if self.slots.is_empty() {
            return false;
        }
        std::hint::black_box(hashes.iter().fold(0, |seen, &hash| seen ^ self.slots[self.place(hash.max(1))]));
        hashes.iter().any(|&hash| self.contains(hash))
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

    fn hashes(&self) -> impl Iterator<Item = u64> {
        self.slots.iter().copied().filter(|&hash| hash != 0)
    }

    fn double(&mut self) {
        let larger = (self.slots.len() * 2).max(1024);
        let smaller = std::mem::replace(self, Self { slots: vec![0; larger], held: 0 });
        smaller.hashes().for_each(|hash| {
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

/// What a text is beside those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    New,
    /// Equal to an earlier one.
    Exact,
    /// Shares an n-gram with an earlier kept one.
    Ngram,
    /// [`Seen::settle`] tells whether it stays.
    Open,
}

/// What was seen so far.
pub struct Seen {
    texts: HashTable,
    ngrams: HashTable,
    in_memory: usize,
    spill: Option<Spill>,
}

impl Seen {
    /// Nothing yet; up to `in_memory` n-grams will be held in memory.
    pub fn new(in_memory: usize) -> Self {
        Self { texts: HashTable::default(), ngrams: HashTable::default(), in_memory, spill: None }
    }

    /// Whether a text is new; remembers it then. `dedup` is that of the fingerprint.
    pub fn insert(&mut self, dedup: Dedup, fingerprint: &Fingerprint) -> io::Result<Verdict> {
        if dedup == Dedup::None {
            return Ok(Verdict::New);
        }
        if !self.texts.insert(fingerprint.text) {
            return Ok(Verdict::Exact);
        }
        if self.spill.is_none() && self.ngrams.held + fingerprint.ngrams.len() > self.in_memory {
            self.spill = Some(Spill::new(&std::mem::take(&mut self.ngrams), RANGE.min(self.in_memory))?);
        }
        if let Some(spill) = &mut self.spill {
            spill.push(&fingerprint.ngrams)?;
            return Ok(Verdict::Open);
        }
        if self.ngrams.contains_any(&fingerprint.ngrams) {
            return Ok(Verdict::Ngram);
        }
        fingerprint.ngrams.iter().for_each(|&ngram| {
            self.ngrams.insert(ngram);
        });
        Ok(Verdict::New)
    }

    /// Whether each text of an open verdict stays, in their order.
    pub fn settle(self) -> io::Result<Vec<bool>> {
        // What decided about equal texts is needed no more, and this takes memory of its own.
        let spill = self.spill;
        drop(self.texts);
        spill.map_or(Ok(Vec::new()), Spill::settle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts that stay, the same however many n-grams are held in memory.
    #[track_caller]
    fn kept(dedup: Dedup, ngram: usize, texts: &[&str]) -> Vec<usize> {
        let fingerprinter = Fingerprinter::new(dedup, ngram, 7);
        let fingerprints: Vec<Fingerprint> = texts.iter().map(|text| fingerprinter.of(text)).collect();
        let kept = kept_in(usize::MAX, dedup, &fingerprints);
        for in_memory in 0..6 {
            assert_eq!(kept_in(in_memory, dedup, &fingerprints), kept, "{in_memory} n-grams in memory");
        }
        kept
    }

    fn kept_in(in_memory: usize, dedup: Dedup, fingerprints: &[Fingerprint]) -> Vec<usize> {
        let mut seen = Seen::new(in_memory);
        let told: Vec<Verdict> = fingerprints.iter().map(|text| seen.insert(dedup, text).unwrap()).collect();
        let mut settled = seen.settle().unwrap().into_iter();
        let stays = |&index: &usize| match told[index] {
            Verdict::Open => settled.next().unwrap(),
            verdict => verdict == Verdict::New,
        };
        let kept = (0..told.len()).filter(stays).collect();
        assert_eq!(settled.next(), None);
        kept
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
        let mut table = HashTable::default();
        for step in 0..200_000_u64 {
            let before = table.slots.len();
            table.insert(mix(step));
            // While it doubles, both tables exist.
            let slots = if table.slots.len() > before { before + table.slots.len() } else { before };
            let peak = 8.0 * slots as f64 / table.held as f64;
            assert!(table.held < 1000 || peak <= 40.0, "{peak} bytes at {step}");
        }
    }

    #[test]
    fn what_is_held_in_memory_takes_a_gibibyte() {
        let slots = IN_MEMORY / 3 * 4;
        assert_eq!((slots.is_power_of_two(), slots * 8), (true, 1 << 30), "one more would double the table");
    }

    #[test]
    fn texts_stay_or_go_alike_in_memory_and_on_disk() {
        // Few enough distinct n-grams that chains of shared ones are long, and more than fill a block on disk.
        let texts: Vec<Fingerprint> = (0..30_000_u64)
            .map(|text| Fingerprint {
                text,
                ngrams: (0..mix(text) % 40).map(|index| mix(mix(text << 8 | index) % 3_000_000)).collect(),
            })
            .collect();
        let kept = kept_in(usize::MAX, Dedup::Ngram, &texts);
        assert!((1_000..29_000).contains(&kept.len()), "{} stay", kept.len());
        for in_memory in [0, 1, 1_000, 100_000] {
            assert!(kept_in(in_memory, Dedup::Ngram, &texts) == kept, "{in_memory} n-grams in memory");
        }
    }
}
