//! Entries as they are stored. Meanings never change; what this version does not know is refused, not skipped.
//!
//! An entry is one JSON object. Its `digest` is BLAKE3 over the object's own bytes with the digest's 64 digits replaced
//! by zeros, so that it can be checked without a canonical form of JSON; `previous` is BLAKE3 over the whole bytes of
//! the object before.

use chrono::{DateTime, Utc};
use privacy::event::Event;
use serde::{Deserialize, Serialize};

use crate::LedgerError;

/// One entry of a corpus's ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Number of the entry, from 0, without gaps.
    pub sequence: u64,
    /// Hash of the object before, in hex; none for the first.
    pub previous: Option<String>,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// Corpus name, so that an entry cannot be moved to another ledger.
    pub corpus: String,
    /// What it says.
    pub body: Body,
    /// Digest of the entry itself, in hex.
    pub digest: String,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Body {
    /// From here on, all mechanisms together may spend at most `epsilon` at `delta`; replaces earlier budgets.
    Budget {
        /// Upper bound on ε.
        epsilon: f64,
        /// δ at which ε is computed.
        delta: f64,
    },
    /// A mechanism will read the corpus: spent from now on.
    Reserve {
        /// Run id.
        run: String,
        /// Stage.
        stage: String,
        /// Version of the corpus table.
        version: i64,
        /// The privacy unit, as the corpus was partitioned by.
        unit: String,
        /// What neighbouring datasets differ by.
        adjacency: Adjacency,
        /// What the guarantee is conditioned on, such as deduplication across records.
        conditions: Vec<String>,
        /// What is spent.
        event: Event,
        /// Fingerprint of settings and inputs. PRIVACY: depends on the corpus; never printed.
        fingerprint: String,
    },
    /// The mechanism of an earlier reservation ran to its end. Says nothing about cost.
    Settle {
        /// Number of the reservation.
        reservation: u64,
    },
}

/// What neighbouring datasets differ by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Adjacency {
    /// One privacy unit is added or removed.
    AddOrRemoveOne,
}

const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

impl Entry {
    /// The bytes to store for the entry at `sequence` after an object with hash `previous`.
    pub(crate) fn seal(
        corpus: &str,
        sequence: u64,
        previous: Option<String>,
        body: Body,
    ) -> Result<Vec<u8>, LedgerError> {
        let (corpus, digest) = (corpus.to_string(), ZEROS.to_string());
        let entry = Entry { sequence, previous, at: Utc::now(), corpus, body, digest };
        // Only a float that is not finite cannot be written; events and budgets are checked before.
        let text = serde_json::to_string_pretty(&entry).map_err(|error| LedgerError::Usage(error.to_string()))?;
        let digest = blake3::hash(text.as_bytes()).to_hex();
        // The digest is the last field: the last run of zeros is its own.
        let at = text.rfind(ZEROS).unwrap_or(text.len());
        let mut sealed = text.into_bytes();
        sealed.splice(at..at + ZEROS.len(), digest.bytes());
        Ok(sealed)
    }

    /// Reads what [`Entry::seal`] wrote, and checks everything but the chain. The error says what is wrong.
    pub(crate) fn unseal(bytes: &[u8]) -> Result<Self, String> {
        let entry: Entry = serde_json::from_slice(bytes).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                format!("not an entry that this version knows: {error}")
            }
            _ => format!("not JSON: {error}"),
        })?;
        let at = bytes.windows(ZEROS.len()).rposition(|window| window == entry.digest.as_bytes());
        let at = at.ok_or("its digest is not 64 hexadecimal digits")?;
        let mut unsealed = bytes.to_vec();
        unsealed[at..at + ZEROS.len()].copy_from_slice(ZEROS.as_bytes());
        if blake3::hash(&unsealed).to_hex().as_str() != entry.digest {
            return Err("its content does not match its digest: it was changed after it was written".into());
        }
        Ok(entry)
    }
}
