//! Flags, and the configuration they mean.

use std::fmt;

use clap::{Parser, ValueEnum};
use lake::layout;
use lake::manifest::Claim;
use lm::device::{DeviceChoice, DtypeChoice};
use serde::{Deserialize, Serialize};
use stage::{Failure, Shard};

/// Turn texts into vectors with a sentence encoder.
///
/// Reads the synthetic texts of a run and writes their vectors beside them in the release zone, without any private
/// root; or reads a corpus and writes its vectors to the private zone. Killed anywhere, it goes on where it was when
/// run again; rows are written exactly once.
///
/// Exit codes: 0 done or already done; 1 a bug; 2 wrong usage; 3 an input is missing or malformed; 5 storage or
/// network, safe to retry.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "doppel-embed",
    version,
    allow_negative_numbers = true,
    after_help = "Examples:\n  doppel-embed --run demo --release ./lake/release --encoder models/all-minilm-l6-v2 --of synthetic\n  \
                  doppel-embed --run demo --private ./lake/private --encoder models/all-minilm-l6-v2 --of corpus \
                  --corpus sharegpt\n  doppel-embed --run flan --release ./lake/release --encoder models/sentence-t5-base \
                  --of synthetic --table runs/flan/candidates --shard 3/8"
)]
pub struct Args {
    /// Flags that every stage shares.
    #[command(flatten)]
    pub common: stage::Common,
    /// Encoder: URL or path of a sentence-transformers folder (BERT or T5, mean pooling).
    #[arg(long, value_name = "URL", value_hint = stage::PLACE)]
    pub encoder: String,
    /// Which texts: those of the run in the release zone, or those of a corpus in the private zone.
    #[arg(long, value_enum)]
    pub of: Of,
    /// Name of the corpus that partition wrote; with --of corpus.
    #[arg(long, value_name = "NAME", required_if_eq("of", "corpus"))]
    pub corpus: Option<String>,
    /// Table of public texts in the release zone, by its path below the root, instead of the run's `synthetic`.
    ///
    /// Needs the columns `id` and `text`. The texts are then voted on in place of sampled ones.
    #[arg(long, value_name = "PATH", conflicts_with = "corpus")]
    pub table: Option<String>,
    /// Which of N shards this is, as i/N with i from 0: shards share the rows out and may run side by side.
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Shard>,
    /// Padded tokens per batch: bounds memory and changes results by rounding only. By default 1024 on CPU, 4096 on a GPU.
    #[arg(long, value_name = "TOKENS")]
    pub batch_tokens: Option<usize>,
    /// Precision of the transformer; pooling and what follows are always float32.
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    pub dtype: DtypeChoice,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
}

/// Which texts are embedded.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Of {
    /// Public texts in the release zone.
    Synthetic,
    /// Private records.
    Corpus,
}

/// What was asked for, checked: everything here changes the result and binds the run id. The encoder is an input, by
/// its digest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Which texts.
    pub of: Of,
    /// Path of the table below its root.
    pub table: String,
    /// Precision as asked for.
    pub dtype: DtypeChoice,
    /// What a corpus's vectors are computed on and by, once it is known.
    #[serde(flatten)]
    pub arithmetic: Option<Arithmetic>,
}

/// What vectors may differ by, if only by rounding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arithmetic {
    /// Device, precision and instructions.
    pub compute: String,
    /// Name, version and commit of the binary; builds that did not tell it yet have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
}

impl Arithmetic {
    /// That of a claim, unless it is of public texts.
    pub fn of(claim: &Claim) -> Option<Self> {
        Self::deserialize(&claim.config).ok()
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.compute, self.build.as_deref().unwrap_or("an earlier build"))
    }
}

impl Args {
    /// Checks the flags and works out what follows from them; all findings are reported together.
    pub fn config(&self) -> Result<Config, Failure> {
        let mut findings = Vec::new();
        if self.batch_tokens == Some(0) {
            findings.push("--batch-tokens 0: expected at least 1".to_string());
        }
        if self.of == Of::Synthetic && self.corpus.is_some() {
            findings.push("--corpus belongs to --of corpus\nhelp: leave it out, or embed the corpus".into());
        }
        if self.of == Of::Corpus && self.table.is_some() {
            findings.push("--table belongs to --of synthetic: it names public texts\nhelp: leave it out".into());
        }
        let name = self.corpus.as_deref().unwrap_or_default();
        if name.contains(['/', '\\']) || name.starts_with('.') {
            findings.push(format!("--corpus {name}: expected a name, not a path"));
        }
        let path = self.table.as_deref().map(|path| path.trim_matches('/'));
        if path.is_some_and(|path| path.is_empty() || path.split('/').any(|part| part == ".." || part.is_empty())) {
            findings.push("--table: expected a path below the release root, such as runs/flan/candidates".into());
        }
        if !findings.is_empty() {
            return Err(Failure::Usage(findings.join("\n")));
        }
        let table = match self.of {
            Of::Corpus => layout::corpus(name),
            Of::Synthetic => path.map_or_else(|| layout::synthetic(&self.common.run), str::to_string),
        };
        Ok(Config { of: self.of, table, dtype: self.dtype, arithmetic: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
