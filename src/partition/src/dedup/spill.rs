//! N-grams that do not fit in memory: the same answer as in memory, by sorting.
//!
//! Whether a text stays depends on all that stayed before it, so it cannot be told while most of that is on disk. But an
//! n-gram decides nothing unless two texts have it, and such n-grams are few. So all are written down with the number of
//! their text, in parts by their leading bits; a part at a time is sorted, and what only one text has is forgotten. The
//! rest goes into ranges of texts, which are judged in order, and an n-gram that was taken is handed on from a range to
//! the next one that has it (time-forward processing: Chiang et al., SODA 1995).
//!
//! Every n-gram is written and read once, so time grows with their number, and memory holds one part or one range. The
//! files have no name: they go with the process, however it ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;

use super::HashTable;

/// Parts by leading bits: enough that a part of ten billion n-grams takes a gigabyte.
const PARTS: usize = 256;
/// Bytes that a list collects before it writes; records of 8, 12 and 16 bytes fill it.
const BLOCK: usize = 192 << 10;
/// The text that stands for all that stayed while n-grams fitted in memory. Others are numbered from 1.
const BEFORE: u32 = 0;
/// Range 0 comes after no other, so as a next range it means that there is none.
const NONE: u32 = 0;

/// N-grams of texts that wait for an answer.
pub struct Spill {
    parts: Lists,
    /// First text of each range.
    starts: Vec<u32>,
    /// N-grams in the last range.
    in_range: usize,
    /// N-grams after which a range ends.
    range: usize,
    texts: u32,
}

impl Spill {
    /// Goes on from the n-grams of the texts that stayed so far. A range has about `range` n-grams.
    pub fn new(kept: &HashTable, range: usize) -> io::Result<Self> {
        let mut spill = Self { parts: Lists::new(PARTS)?, starts: vec![1], in_range: 0, range, texts: 0 };
        for hash in kept.hashes() {
            spill.write(hash, BEFORE)?;
        }
        Ok(spill)
    }

    /// Takes the n-grams of the next text.
    pub fn push(&mut self, ngrams: &[u64]) -> io::Result<()> {
        self.texts = self.texts.checked_add(1).ok_or(io::ErrorKind::FileTooLarge)?;
        if self.in_range >= self.range {
            self.starts.push(self.texts);
            self.in_range = 0;
        }
        self.in_range += ngrams.len();
        ngrams.iter().try_for_each(|&ngram| self.write(ngram.max(1), self.texts))
    }

    /// Whether each text is new, in the order in which they came.
    pub fn settle(self) -> io::Result<Vec<bool>> {
        let Self { parts, starts, texts, .. } = self;
        let (shared, taken) = (Lists::new(starts.len())?, Lists::new(starts.len())?);
        let mut ranges = Ranges { starts, shared, taken };
        ranges.fill(parts)?;
        ranges.judge(texts)
    }

    fn write(&mut self, hash: u64, text: u32) -> io::Result<()> {
        let mut record = [0; 12];
        record[..8].copy_from_slice(&hash.to_le_bytes());
        record[8..].copy_from_slice(&text.to_le_bytes());
        self.parts.push((hash >> (64 - PARTS.trailing_zeros())) as usize, &record)
    }
}

/// What is shared, by ranges of texts.
struct Ranges {
    starts: Vec<u32>,
    /// N-gram, text, and the next range that has the n-gram: once for each range.
    shared: Lists,
    /// N-grams that were taken before the range.
    taken: Lists,
}

impl Ranges {
    /// Sorts what was written by n-gram, and keeps what two texts have.
    fn fill(&mut self, mut parts: Lists) -> io::Result<()> {
        for part in 0..PARTS {
            let mut records: Vec<(u64, u32)> =
                parts.take(part)?.as_chunks::<12>().0.iter().map(|record| (long(record, 0), word(record, 8))).collect();
            records.par_sort_unstable();
            records.dedup();
            for group in records.chunk_by(|one, other| one.0 == other.0).filter(|group| group.len() > 1) {
                self.share(group)?;
            }
        }
        Ok(())
    }

    /// Takes the texts of one n-gram, in order.
    fn share(&mut self, group: &[(u64, u32)]) -> io::Result<()> {
        let ngram = group[0].0;
        let (before, texts) = group.split_at(usize::from(group[0].1 == BEFORE));
        let ranges: Vec<u32> = texts.iter().map(|&(_, text)| self.range_of(text)).collect();
        if !before.is_empty() {
            self.taken.push(ranges[0] as usize, &ngram.to_le_bytes())?;
        }
        for (index, &(_, text)) in texts.iter().enumerate() {
            let next = ranges.get(index + 1).copied().filter(|&next| next != ranges[index]).unwrap_or(NONE);
            let mut record = [0; 16];
            record[..8].copy_from_slice(&ngram.to_le_bytes());
            record[8..12].copy_from_slice(&text.to_le_bytes());
            record[12..].copy_from_slice(&next.to_le_bytes());
            self.shared.push(ranges[index] as usize, &record)?;
        }
        Ok(())
    }

    fn range_of(&self, text: u32) -> u32 {
        self.starts.partition_point(|&start| start <= text) as u32 - 1
    }

    /// Goes through the texts from the first to the last.
    fn judge(mut self, texts: u32) -> io::Result<Vec<bool>> {
        let mut new = vec![true; texts as usize];
        for range in 0..self.starts.len() {
            let mut taken = HashTable::default();
            for ngram in self.taken.take(range)?.as_chunks::<8>().0 {
                taken.insert(long(ngram, 0));
            }
            let mut shared: Vec<(u32, u64, u32)> = self
                .shared
                .take(range)?
                .as_chunks::<16>()
                .0
                .iter()
                .map(|record| (word(record, 8), long(record, 0), word(record, 12)))
                .collect();
            shared.par_sort_unstable();
            for text in shared.chunk_by(|one, other| one.0 == other.0) {
                if text.iter().any(|&(_, ngram, _)| taken.contains(ngram)) {
                    new[text[0].0 as usize - 1] = false;
                } else {
                    text.iter().for_each(|&(_, ngram, _)| {
                        taken.insert(ngram);
                    });
                }
            }
            for (_, ngram, next) in shared {
                if next != NONE && taken.contains(ngram) {
                    self.taken.push(next as usize, &ngram.to_le_bytes())?;
                }
            }
        }
        Ok(new)
    }
}

fn long(record: &[u8], at: usize) -> u64 {
    (0..8).fold(0, |value, index| value | u64::from(record[at + index]) << (8 * index))
}

fn word(record: &[u8], at: usize) -> u32 {
    (0..4).fold(0, |value, index| value | u32::from(record[at + index]) << (8 * index))
}

/// Lists of bytes that share one unnamed file, so that there may be more of them than a process may open files.
struct Lists {
    file: File,
    written: u64,
    lists: Vec<List>,
}

#[derive(Clone, Default)]
struct List {
    /// Where its blocks begin in the file.
    blocks: Vec<u64>,
    /// What does not fill a block yet.
    rest: Vec<u8>,
}

impl Lists {
    fn new(count: usize) -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile()?, written: 0, lists: vec![List::default(); count] })
    }

    fn push(&mut self, list: usize, record: &[u8]) -> io::Result<()> {
        let List { blocks, rest } = &mut self.lists[list];
        rest.extend_from_slice(record);
        if rest.len() >= BLOCK {
            self.file.write_all_at(rest, self.written)?;
            blocks.push(self.written);
            self.written += rest.len() as u64;
            rest.clear();
        }
        Ok(())
    }

    /// All of a list, which is empty then.
    fn take(&mut self, list: usize) -> io::Result<Vec<u8>> {
        let List { blocks, rest } = std::mem::take(&mut self.lists[list]);
        let mut bytes = vec![0; blocks.len() * BLOCK];
        for (block, &at) in bytes.chunks_exact_mut(BLOCK).zip(&blocks) {
            self.file.read_exact_at(block, at)?;
        }
        bytes.extend_from_slice(&rest);
        Ok(bytes)
    }
}
