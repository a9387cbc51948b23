//! What was typed, and what it means.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use serde::Serialize;

use crate::error::PartitionError;

/// Turns raw conversations into a corpus of instructions with bounded privacy units.
///
/// Keeps the first user turn of each conversation, drops what is redacted, flagged or not English, removes
/// duplicates, bounds the records of each privacy unit and splits units into train, validation and test.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "doppel-partition",
    version,
    after_help = "\
EXAMPLES
  doppel-partition --run demo --private s3://bucket/private --corpus chats \\
      --input s3://raw/sharegpt.json --unit-column id --unit-rule prefix:_

EXIT CODES
  0 done or already done; 2 wrong usage; 3 an input is missing or malformed; 5 storage failed, safe to retry

MEMORY
  Does not grow with the text of the inputs. It takes a few hundred MB for what is read and written at a time (JSON in \
pieces of 1 MiB, Parquet in 256 rows of the columns that are read, the corpus in chunks of 64 MiB of text), about 100 \
bytes for each privacy unit, and what --dedup says: below 4 GB for five million conversations of 2 KB."
)]
pub struct Args {
    /// Flags that every stage shares.
    #[command(flatten)]
    pub common: stage::Common,
    /// Where the conversations are: a path, file://, s3://, gs:// or az:// URL. Repeatable.
    ///
    /// A JSON array, JSON Lines or Parquet; told apart by their first bytes. Read in the order given, and more than once: not from
    /// a pipe.
    #[arg(long, required = true, value_name = "URL", value_hint = stage::PLACE)]
    pub input: Vec<String>,
    /// Name of the corpus to write: letters, digits, `.`, `_`, `-`; at most 100, the first a letter or digit.
    #[arg(long)]
    pub corpus: String,
    /// How a conversation is laid out.
    #[arg(long, value_enum, default_value_t = Shape::Auto)]
    pub shape: Shape,
    /// Column of the text, for `--shape text`.
    #[arg(long, value_name = "NAME")]
    pub text_column: Option<String>,
    /// Column that names the language; `language` is used where it exists.
    ///
    /// Named here, it must be in every row. A row in which it is empty is judged by a detector, as is one without
    /// `language`. Tags such as `en-GB`, `en_US` and `eng_Latn` are English.
    #[arg(long, value_name = "NAME")]
    pub language_column: Option<String>,
    /// Language to keep.
    #[arg(long, value_enum, default_value_t = Language::En)]
    pub language: Language,
    /// Column whose value names the privacy unit: `conversation_id` (lmsys) or `id` unless given.
    #[arg(long, value_name = "NAME")]
    pub unit_column: Option<String>,
    /// How the unit follows from the column: `whole`, `prefix:SEP`, or `record`.
    ///
    /// `prefix:_` takes what stands before the first `_`, so that the parts `a_0` and `a_1` of one conversation are one
    /// unit. `record` ignores the column and protects each record on its own, also where texts are equal. A row whose
    /// unit is empty is refused.
    #[arg(long, default_value = "whole", value_name = "RULE")]
    pub unit_rule: UnitRule,
    /// Most records that one unit keeps, at least 1; which ones is a keyed choice within the unit.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub max_per_unit: u32,
    /// Which duplicates to remove.
    ///
    /// Anything but `none` compares records of different units, so that the guarantee then holds for the corpus as
    /// partitioned, not for the raw data. `exact` holds 11 to 22 bytes in memory for each distinct text, 32 while the
    /// table doubles. `ngram` holds as many again for each word and sign of the texts that stay, 1.5 GiB at most: past
    /// that, 12 bytes for each word and sign of all texts go to an unnamed file in TMPDIR.
    #[arg(long, value_enum, default_value_t = Dedup::Ngram)]
    pub dedup: Dedup,
    /// Length in words of the n-grams of `--dedup ngram`.
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub ngram: usize,
    /// Shares of train, validation and test; they sum to 1.
    #[arg(long, default_value = "0.9,0.05,0.05", value_name = "T,V,T")]
    pub split: Shares,
    /// Fail when an input is cut off, instead of taking its whole records with a warning.
    #[arg(long)]
    pub strict: bool,
    /// Declare that the numbers of records and units are public, and tell them.
    ///
    /// Without it they are written to the private root only, since they are private unless the operator says otherwise.
    #[arg(long)]
    pub declare_public_counts: bool,
}

/// Layouts of a conversation.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// By the columns of the first row.
    Auto,
    /// LMSYS-Chat-1M: conversation[].role/content, language, redacted, openai_moderation.
    Lmsys,
    /// ShareGPT: conversations[].from/value.
    Sharegpt,
    /// OpenAI: messages[].role/content.
    Openai,
    /// A column of text.
    Text,
}

/// Languages that can be kept.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// English only.
    En,
    /// All.
    Any,
}

/// Which duplicates to remove.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dedup {
    /// None.
    None,
    /// Texts equal to an earlier one.
    Exact,
    /// Those, and texts that share a run of `--ngram` words with an earlier kept one.
    Ngram,
}

/// How the unit follows from the unit column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnitRule {
    /// The value itself.
    Whole,
    /// What stands before the first separator; the value itself where there is none.
    Prefix(String),
    /// Each record is its own unit.
    Record,
}

impl UnitRule {
    /// Whether the unit column is not read.
    pub fn is_record(&self) -> bool {
        matches!(self, UnitRule::Record)
    }

    /// The unit of a record with this value in the unit column and this id.
    pub fn unit<'a>(&self, source: &'a str, record_id: &'a str) -> &'a str {
        match self {
            UnitRule::Whole => source,
            UnitRule::Prefix(separator) => source.split_once(separator.as_str()).map_or(source, |(head, _)| head),
            UnitRule::Record => record_id,
        }
    }
}

impl FromStr for UnitRule {
    type Err = String;

    fn from_str(rule: &str) -> Result<Self, String> {
        match rule.split_once(':') {
            None if rule == "whole" => Ok(UnitRule::Whole),
            None if rule == "record" => Ok(UnitRule::Record),
            Some(("prefix", separator)) if !separator.is_empty() => Ok(UnitRule::Prefix(separator.to_owned())),
            _ => Err("expected `whole`, `record` or `prefix:SEP` such as `prefix:_`".to_owned()),
        }
    }
}

impl fmt::Display for UnitRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnitRule::Whole => f.write_str("whole"),
            UnitRule::Prefix(separator) => write!(f, "prefix:{separator}"),
            UnitRule::Record => f.write_str("record"),
        }
    }
}

/// Shares of the three splits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Shares {
    /// Share of units to train on and to vote with.
    pub train: f64,
    /// Share of units to watch the loss on.
    pub validation: f64,
    /// Share of units to compare with.
    pub test: f64,
}

impl FromStr for Shares {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shares = text.split(',').map(|part| part.trim().parse::<f64>()).collect::<Result<Vec<_>, _>>();
        match shares.as_deref() {
            Ok(&[train, validation, test])
                if [train, validation, test].iter().all(|share| (0.0..=1.0).contains(share))
                    && train > 0.0
                    && (train + validation + test - 1.0).abs() < 1e-9 =>
            {
                Ok(Self { train, validation, test })
            }
            _ => Err("expected three shares that sum to 1, such as 0.9,0.05,0.05, the first above 0".to_owned()),
        }
    }
}

/// Checked settings: public, and all of what changes the corpus besides the inputs and the key.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Corpus name.
    pub corpus: String,
    /// Canonical URLs of the inputs, in order: one object has one name, from whichever folder it was named.
    pub inputs: Vec<String>,
    /// Shape, perhaps [`Shape::Auto`].
    pub shape: Shape,
    /// Column of the text.
    pub text_column: Option<String>,
    /// Column of the language.
    pub language_column: Option<String>,
    /// Language to keep.
    pub language: Language,
    /// Column of the unit.
    pub unit_column: Option<String>,
    /// Rule of the unit.
    pub unit_rule: UnitRule,
    /// Most records of a unit.
    pub max_per_unit: u32,
    /// Duplicates to remove.
    pub dedup: Dedup,
    /// Words in an n-gram.
    pub ngram: usize,
    /// Shares of the splits.
    pub split: Shares,
    /// Whether an input that is cut off is an error.
    pub strict: bool,
    /// Whether counts may be told.
    pub public_counts: bool,
}

impl Config {
    /// Checks what was typed; all findings come at once.
    pub fn new(args: &Args) -> Result<Self, PartitionError> {
        let mut findings = Vec::new();
        // The ledger takes the same names: a corpus that it refuses could never get a budget.
        if stage::common::run_id(&args.corpus).is_err() {
            let expected = "1 to 100 letters, digits, `.`, `_` and `-`, the first a letter or digit";
            findings.push(format!("--corpus: expected {expected}"));
        }
        for folder in args.input.iter().filter(|input| is_folder(input)) {
            findings.push(format!("--input {folder}: is a folder; name its files, --input is repeatable"));
        }
        if args.max_per_unit == 0 {
            findings.push("--max-per-unit: expected at least 1; a unit that keeps nothing needs no corpus".to_owned());
        }
        if !(2..=1000).contains(&args.ngram) {
            findings.push("--ngram: expected 2 to 1000 words; --dedup exact compares whole texts".to_owned());
        }
        if args.text_column.is_some() && !matches!(args.shape, Shape::Auto | Shape::Text) {
            findings.push("--text-column: only with --shape text".to_owned());
        }
        if args.unit_column.is_some() && args.unit_rule.is_record() {
            findings.push("--unit-column: not with --unit-rule record, which reads no column".to_owned());
        }
        let inputs = args.input.iter().map(|input| canonical(input)).collect::<Result<Vec<_>, _>>();
        let mut named = HashSet::new();
        for again in inputs.iter().flatten().filter(|input| !named.insert(input.as_str())) {
            findings.push(format!("--input {again}: is named twice; name it once, or its records could count twice"));
        }
        if !findings.is_empty() {
            return Err(PartitionError::Usage(findings.join("\n")));
        }
        Ok(Self {
            corpus: args.corpus.clone(),
            inputs: inputs?,
            shape: args.shape,
            text_column: args.text_column.clone(),
            language_column: args.language_column.clone(),
            language: args.language,
            unit_column: args.unit_column.clone(),
            unit_rule: args.unit_rule.clone(),
            max_per_unit: args.max_per_unit,
            dedup: args.dedup,
            ngram: args.ngram,
            split: args.split,
            strict: args.strict,
            public_counts: args.declare_public_counts,
        })
    }

    /// Whether each of equal records is a unit, and so protected on its own.
    pub fn equal_records_are_units(&self) -> bool {
        self.unit_rule.is_record() && self.dedup == Dedup::None
    }

    /// What a run id is bound to: everything that changes the corpus. `--declare-public-counts` does not.
    pub fn as_json(&self) -> serde_json::Value {
        serde_json::json!({
            "corpus": self.corpus,
            "shape": self.shape,
            "text_column": self.text_column,
            "language_column": self.language_column,
            "language": self.language,
            "unit_column": self.unit_column,
            "unit_rule": self.unit_rule.to_string(),
            "max_per_unit": self.max_per_unit,
            "dedup": self.dedup,
            "ngram": self.ngram,
            "split": self.split,
            "strict": self.strict,
        })
    }
}

fn is_folder(input: &str) -> bool {
    Path::new(input.strip_prefix("file://").unwrap_or(input)).is_dir()
}

/// Storage URLs have no `..`, with which a zone could be left. An input lies in no zone: its folder may be named so.
fn canonical(input: &str) -> Result<String, lake::LakeError> {
    lake::canonical_url(without_parents(input).as_deref().unwrap_or(input))
}

/// A local path with its folder resolved; `None` for anything else, and where there is no such folder.
fn without_parents(input: &str) -> Option<String> {
    if input.contains("://") {
        return None;
    }
    let path = Path::new(input);
    let folder = path.parent()?.canonicalize().ok()?;
    folder.join(path.file_name()?).to_str().map(str::to_owned)
}
