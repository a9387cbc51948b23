//! Entries as they are stored. Meanings never change; what this version does not know is refused, not skipped.
//!
//! An entry is one JSON object. Its `digest` is BLAKE3 over the object's own bytes with the digest's 64 digits replaced
//! by zeros, so that it can be checked without a canonical form of JSON; `previous` is BLAKE3 over the whole bytes of
//! the object before. From the first reservation on, the digest is keyed (see [`Seal`]).

use chrono::{DateTime, Utc};
use privacy::event::Event;
use privacy::keyed::NoiseKey;
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
    /// Digest of the entry itself, in hex; keyed from the first reservation on.
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

/// How digests are made.
///
/// A plain hash can be made anew by whoever can write an entry, and the newest entry has none after it that would show
/// it. So from the first reservation on digests are keyed by a secret that follows from the noise key: to change an entry
/// unseen takes that key as well. And a key other than the one that reserved no longer opens the ledger, so that nobody
/// draws a second sample of the noise for what was paid once.
#[derive(Clone)]
pub(crate) enum Seal {
    /// Before the first reservation there is no noise key, and nothing was spent.
    Plain,
    /// By the secret that follows from the noise key.
    Keyed([u8; 32]),
}

impl Seal {
    /// The seal that follows from `key`, by a derivation apart from those of streams and hashes.
    pub(crate) fn keyed(key: &NoiseKey) -> Self {
        Self::Keyed(blake3::derive_key("doppel 2026 ledger entry digest v1", key.expose()))
    }

    fn digest(&self, bytes: &[u8]) -> String {
        let hash = match self {
            Seal::Plain => blake3::hash(bytes),
            Seal::Keyed(secret) => blake3::keyed_hash(secret, bytes),
        };
        hash.to_hex().to_string()
    }
}

const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

impl Entry {
    /// The bytes to store for the entry at `sequence` after an object with hash `previous`.
    pub(crate) fn seal(
        seal: &Seal,
        corpus: &str,
        sequence: u64,
        previous: Option<String>,
        body: Body,
    ) -> Result<Vec<u8>, LedgerError> {
        let (corpus, digest) = (corpus.to_string(), ZEROS.to_string());
        let entry = Entry { sequence, previous, at: Utc::now(), corpus, body, digest };
        // Only a float that is not finite cannot be written; events and budgets are checked before.
        let text = serde_json::to_string_pretty(&entry).map_err(|error| LedgerError::Usage(error.to_string()))?;
        let digest = seal.digest(text.as_bytes());
        // The digest is the last field: the last run of zeros is its own.
        let at = text.rfind(ZEROS).unwrap_or(text.len());
        let mut sealed = text.into_bytes();
        sealed.splice(at..at + ZEROS.len(), digest.bytes());
        Ok(sealed)
    }

    /// Reads what [`Entry::seal`] wrote; its digest and the chain are for the caller to check. The error says what is
    /// wrong.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                format!("not an entry that this version knows: {error}")
            }
            _ => format!("not JSON: {error}"),
        })
    }

    /// Whether `bytes`, which the entry was read from, are those that were sealed.
    pub(crate) fn check_digest(&self, bytes: &[u8], seal: &Seal) -> Result<(), String> {
        let at = bytes.windows(ZEROS.len()).rposition(|window| window == self.digest.as_bytes());
        let at = at.ok_or("its digest is not 64 hexadecimal digits")?;
        let mut unsealed = bytes.to_vec();
        unsealed[at..at + ZEROS.len()].copy_from_slice(ZEROS.as_bytes());
        if seal.digest(&unsealed) == self.digest {
            return Ok(());
        }
        let key = match seal {
            Seal::Plain => "",
            Seal::Keyed(_) => ", or the noise key is not the one it was written under",
        };
        Err(format!("its content does not match its digest: it was changed after it was written{key}"))
    }
}
