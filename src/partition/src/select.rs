//! First pass: which records stay. The paper's Appendix E, then the bound per privacy unit.
//!
//! Steps, in this order: first user turn, redacted, flagged, language, exact duplicates, n-gram duplicates, bound.
//! Parsing, language and fingerprints are computed by all threads. What depends on earlier records goes in the order of
//! the input, so that the result does not depend on the number of threads; it works on a batch while the next is judged.

use std::collections::BTreeSet;
use std::sync::Arc;

use rayon::prelude::*;
use serde::Serialize;

use crate::bound::{Bounds, Choice, Keys};
use crate::config::{Config, Dedup, Language};
use crate::dedup::{Fingerprint, Fingerprinter, IN_MEMORY, Seen, Verdict};
use crate::error::PartitionError;
use crate::input::Batch;
use crate::language::{is_english, names_english};
use crate::record::Record;

/// How many records each step took away, and how many stay. PRIVACY: private unless declared public.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Whole records in the inputs.
    pub read: u64,
    /// Conversations that do not open with a user turn, or with an empty one.
    pub without_user_turn: u64,
    /// Redacted.
    pub redacted: u64,
    /// Flagged by moderation.
    pub flagged: u64,
    /// In another language.
    pub other_language: u64,
    /// Equal to an earlier text.
    pub exact_duplicates: u64,
    /// Sharing an n-gram with an earlier kept text.
    pub ngram_duplicates: u64,
    /// Above the bound of their unit, or the same record again.
    pub over_bound: u64,
    /// Units that stay.
    pub units: u64,
    /// Records that stay.
    pub kept: u64,
}

/// A record that passed the steps that look at it alone.
struct Candidate {
    unit: u64,
    priority: u64,
    fingerprint: Fingerprint,
}

/// Which step took a record away.
enum Dropped {
    WithoutUserTurn,
    Redacted,
    Flagged,
    OtherLanguage,
}

/// A record with its text, as it will be written.
pub struct Kept {
    /// Position-independent id.
    pub record_id: String,
    /// Privacy unit.
    pub unit: String,
    /// First user turn.
    pub text: String,
}

impl Kept {
    /// Names a record whose text is `text`.
    pub fn new(config: &Config, source: &str, text: String) -> Self {
        let record_id = record_id(source, &text);
        let unit = config.unit_rule.unit(source, &record_id).to_owned();
        Self { record_id, unit, text }
    }
}

/// BLAKE3 of the source id and the text, 128 bits in hex: the same wherever the record stands in whichever file.
fn record_id(source: &str, text: &str) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("doppel partition record_id v1");
    hasher.update(&(source.len() as u64).to_le_bytes());
    hasher.update(source.as_bytes());
    hasher.update(text.as_bytes());
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The first pass.
pub struct Selection {
    judge: Judge,
    /// The batch that was judged last.
    judged: Judged,
    admission: Admission,
    unit_columns: BTreeSet<String>,
}

/// The steps that look at one record alone.
struct Judge {
    config: Arc<Config>,
    keys: Arc<Keys>,
    fingerprinter: Fingerprinter,
}

type Judged = Vec<Result<Result<Candidate, Dropped>, PartitionError>>;

/// The steps that compare records, and what they know of those that came so far.
struct Admission {
    dedup: Dedup,
    /// Whether each record is a unit, also where texts are equal.
    unit_is_record: bool,
    seen: Seen,
    /// Units and choices of the records that deduplication tells about at the end.
    open: Vec<(u64, Choice)>,
    bounds: Bounds,
    counts: Counts,
}

/// What the first pass found.
pub struct Selected {
    /// The records that stay, in the order of the input.
    pub choices: Vec<Choice>,
    /// What each step took.
    pub counts: Counts,
    /// Columns that name the privacy unit, one unless inputs of several shapes were joined.
    pub unit_columns: BTreeSet<String>,
}

impl Selection {
    /// At the start of the first input.
    pub fn new(config: Arc<Config>, keys: Arc<Keys>) -> Self {
        let admission = Admission {
            dedup: config.dedup,
            unit_is_record: config.unit_rule.is_record(),
            seen: Seen::new(IN_MEMORY),
            open: Vec::new(),
            bounds: Bounds::new(config.max_per_unit),
            counts: Counts::default(),
        };
        let fingerprinter = Fingerprinter::new(config.dedup, config.ngram, keys.dedup_seed());
        let judge = Judge { config, keys, fingerprinter };
        Self { judge, judged: Vec::new(), admission, unit_columns: BTreeSet::new() }
    }

    /// Takes the next batch.
    pub fn add(&mut self, batch: &Batch) -> Result<(), PartitionError> {
        if let Some(column) = batch.unit_column().filter(|column| !self.unit_columns.contains(*column)) {
            self.unit_columns.insert(column.to_owned());
        }
        let before = std::mem::take(&mut self.judged);
        let (judged, admitted) = rayon::join(|| self.judge.all(batch), || self.admission.all(before));
        self.judged = judged;
        admitted
    }

    /// What stays, in the order of the input.
    pub fn finish(mut self) -> Result<Selected, PartitionError> {
        self.admission.all(self.judged)?;
        let (choices, counts) = self.admission.finish()?;
        if counts.kept == 0 {
            let corpus = self.judge.config.corpus.clone();
            return Err(PartitionError::Empty { corpus, reason: reason(&counts) });
        }
        Ok(Selected { choices, counts, unit_columns: self.unit_columns })
    }
}

impl Judge {
    fn all(&self, batch: &Batch) -> Judged {
        (0..batch.len()).into_par_iter().map(|index| batch.read(index).map(|record| self.one(record))).collect()
    }

    fn one(&self, record: Record) -> Result<Candidate, Dropped> {
        let Record { source, text, language, redacted, flagged } = record;
        let text = text.filter(|text| !text.trim().is_empty()).ok_or(Dropped::WithoutUserTurn)?;
        if redacted {
            return Err(Dropped::Redacted);
        }
        if flagged {
            return Err(Dropped::Flagged);
        }
        let stays = match (self.config.language, language.filter(|language| !language.trim().is_empty())) {
            (Language::Any, _) => true,
            (Language::En, Some(language)) => names_english(&language),
            (Language::En, None) => is_english(&text),
        };
        if !stays {
            return Err(Dropped::OtherLanguage);
        }
        let kept = Kept::new(&self.config, &source, text);
        Ok(Candidate {
            unit: self.keys.unit(&kept.unit),
            priority: self.keys.priority(&kept.record_id),
            fingerprint: self.fingerprinter.of(&kept.text),
        })
    }
}

impl Admission {
    fn all(&mut self, judged: Judged) -> Result<(), PartitionError> {
        for verdict in judged {
            let ordinal = self.counts.read;
            self.counts.read += 1;
            match verdict? {
                Ok(candidate) => self.one(&candidate, ordinal)?,
                Err(dropped) => *self.counter(dropped) += 1,
            }
        }
        Ok(())
    }

    fn one(&mut self, candidate: &Candidate, ordinal: u64) -> Result<(), PartitionError> {
        let choice = Choice { priority: candidate.priority, ordinal };
        let unit = if self.unit_is_record { ordinal } else { candidate.unit };
        match self.seen.insert(self.dedup, &candidate.fingerprint)? {
            Verdict::Exact => self.counts.exact_duplicates += 1,
            Verdict::Ngram => self.counts.ngram_duplicates += 1,
            Verdict::New => self.offer(unit, choice),
            Verdict::Open => self.open.push((unit, choice)),
        }
        Ok(())
    }

    /// The records that stay, and what became of all.
    fn finish(mut self) -> Result<(Vec<Choice>, Counts), PartitionError> {
        let settled = std::mem::replace(&mut self.seen, Seen::new(0)).settle()?;
        for ((unit, choice), new) in std::mem::take(&mut self.open).into_iter().zip(settled) {
            match new {
                true => self.offer(unit, choice),
                false => self.counts.ngram_duplicates += 1,
            }
        }
        let mut counts = self.counts;
        counts.units = self.bounds.units() as u64;
        let choices = self.bounds.into_selection();
        counts.kept = choices.len() as u64;
        counts.over_bound -= counts.kept;
        Ok((choices, counts))
    }

    fn offer(&mut self, unit: u64, choice: Choice) {
        // Those that stay are taken off at the end.
        self.counts.over_bound += 1;
        self.bounds.offer(unit, choice);
    }

    fn counter(&mut self, dropped: Dropped) -> &mut u64 {
        match dropped {
            Dropped::WithoutUserTurn => &mut self.counts.without_user_turn,
            Dropped::Redacted => &mut self.counts.redacted,
            Dropped::Flagged => &mut self.counts.flagged,
            Dropped::OtherLanguage => &mut self.counts.other_language,
        }
    }
}

/// Why nothing stayed: with all records gone, the step that took the most says it without a number.
fn reason(counts: &Counts) -> &'static str {
    let steps = [
        (counts.without_user_turn, "most conversations do not open with a user turn"),
        (counts.redacted, "most records are redacted"),
        (counts.flagged, "most records are flagged by moderation"),
        (counts.other_language, "most texts are not in the language that --language keeps"),
    ];
    match steps.into_iter().max_by_key(|step| step.0) {
        Some((count, reason)) if count > 0 => reason,
        _ => "the input holds no record",
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use privacy::keyed::NoiseKey;

    use super::*;
    use crate::config::Args;

    /// Records of a few units, whose texts are four words in a row of 150: some equal, many that share three.
    fn selected(in_memory: usize) -> Selected {
        let flags = ["partition", "--run=r", "--private=p", "--input=i", "--corpus=c", "--max-per-unit=2", "--ngram=3"];
        let config = Arc::new(Config::new(&Args::parse_from(flags)).unwrap());
        let mut selection = Selection::new(config, Arc::new(Keys::new(&NoiseKey::new([5; 32]), "c")));
        selection.admission.seen = Seen::new(in_memory);
        for ordinal in 0..500_u64 {
            let word = ordinal * 7919 % 997 % 150;
            let text = (word..word + 4).map(|word| format!("w{word}")).collect::<Vec<_>>().join(" ");
            let fingerprint = selection.judge.fingerprinter.of(&text);
            let candidate = Candidate { unit: ordinal % 9, priority: ordinal ^ 85, fingerprint };
            selection.admission.one(&candidate, ordinal).unwrap();
        }
        selection.finish().unwrap()
    }

    #[test]
    fn the_same_records_stay_when_ngrams_go_to_disk() {
        let whole = selected(usize::MAX);
        assert!(
            whole.counts.exact_duplicates > 0 && whole.counts.ngram_duplicates > 0 && whole.counts.over_bound > 0,
            "{:?}",
            whole.counts
        );
        for in_memory in [0, 10, 40] {
            let spilled = selected(in_memory);
            assert_eq!((spilled.choices, spilled.counts), (whole.choices.clone(), whole.counts), "{in_memory}");
        }
    }
}
