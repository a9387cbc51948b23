//! Rate and memory of deduplication: `cargo bench -p doppel-partition --bench speed -- TEXTS [ROUNDS]`.
//!
//! TEXTS is a file with a JSON array of strings. One thread, exact texts and 10-grams, by the rule of `dedup` in
//! `tests/bench/peers.py` but with words of our own: each sign stands alone here, while NLTK keeps "n't", "..." and
//! "d=e" whole. So ours are 2.6 million words of ShareGPT's first turns and NLTK's 2.1 million, ten of ours are a shorter
//! run, and slightly fewer texts stay: 9,033 and 9,195 of 11,137. With our words, the peer keeps 9,033 too.
//!
//! Each round begins with an empty table. Prints one JSON line: the rate, and by how many MB the first round raised the
//! most that the process held.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use doppel_partition::config::Dedup;
use doppel_partition::dedup::{Fingerprinter, IN_MEMORY, Seen, Verdict};

const NGRAM: usize = 10;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let Some(file) = arguments.first() else {
        // `cargo test --benches` runs this without arguments: that it starts is all that it checks.
        return Ok(());
    };
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(file)?)?;
    let bytes = texts.iter().map(String::len).sum::<usize>();
    let rounds = arguments.get(1).map_or(Ok(5), |rounds| rounds.parse())?;
    // Forgets the peak of reading the texts.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let before = peak();
    let clock = Instant::now();
    let kept = dedup(&texts)?;
    let held = peak() - before;
    for _ in 1..rounds {
        dedup(&texts)?;
    }
    let rate = (rounds * bytes) as f64 / clock.elapsed().as_secs_f64() / 1e6;
    println!("{{\"rate\": {rate:.2}, \"unit\": \"MB/s\", \"kept\": {kept}, \"held\": {held:.1}}}");
    Ok(())
}

/// How many of the texts stay.
fn dedup(texts: &[String]) -> std::io::Result<usize> {
    let fingerprinter = Fingerprinter::new(Dedup::Ngram, NGRAM, 1);
    let mut seen = Seen::new(IN_MEMORY);
    let mut kept = 0;
    for text in texts {
        kept += usize::from(seen.insert(Dedup::Ngram, &fingerprinter.of(text))? == Verdict::New);
    }
    Ok(kept)
}

/// The most memory that this process held, in MB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    peak.unwrap_or(f64::NAN) / 1024.0
}
