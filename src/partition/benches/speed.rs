//! Rate and memory of deduplication: `cargo bench -p doppel-partition --bench speed -- TEXTS [ROUNDS]`.
//!
//! TEXTS is a file with a JSON array of strings. One thread, exact texts and 10-grams: the same work as `dedup` of
//! `tests/bench/peers.py`. Each round begins with an empty table. Prints one JSON line for the rate, and one for the bytes
//! that the whole process holds for each distinct n-gram of 10 million, at the most.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Instant;

use doppel_partition::config::Dedup;
use doppel_partition::dedup::{Fingerprinter, IN_MEMORY, Seen, Verdict};

const NGRAM: usize = 10;
/// Distinct n-grams that memory is measured with, and how many of them a text has.
const MANY: usize = 10_000_000;
const EACH: usize = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let Some(file) = arguments.first() else {
        // `cargo test --benches` runs this without arguments: that it starts is all that it checks.
        return Ok(());
    };
    let before = peak_bytes();
    hold()?;
    let held = (peak_bytes() - before) / MANY as f64;
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(file)?)?;
    let bytes = texts.iter().map(String::len).sum::<usize>();
    let rounds = arguments.get(1).map_or(Ok(5), |rounds| rounds.parse())?;
    let clock = Instant::now();
    let mut kept = 0;
    for _ in 0..rounds {
        kept = dedup(&texts)?;
    }
    let rate = (rounds * bytes) as f64 / clock.elapsed().as_secs_f64() / 1e6;
    println!("{{\"rate\": {rate:.2}, \"unit\": \"MB/s\", \"texts\": {}, \"kept\": {kept}}}", texts.len());
    println!("{{\"bytes_per_ngram\": {held:.1}}}");
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

/// Remembers many n-grams, and forgets them.
fn hold() -> std::io::Result<()> {
    let fingerprinter = Fingerprinter::new(Dedup::Ngram, 1, 1);
    let mut seen = Seen::new(IN_MEMORY);
    for text in 0..MANY / EACH {
        let words: String = (0..EACH).map(|word| format!("{} ", text * EACH + word)).collect();
        seen.insert(Dedup::Ngram, &fingerprinter.of(&words))?;
    }
    Ok(())
}

/// The most memory that this process ever held.
fn peak_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    peak.unwrap_or(f64::NAN) * 1024.0
}
