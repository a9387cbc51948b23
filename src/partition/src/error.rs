//! What can be wrong with an input, said without quoting it.
//!
//! PRIVACY: a message names the object, the row, the field, the type that was found and what was expected. It never
//! carries a value, which is also why no error of `serde_json`, `parquet` or `arrow` is shown as it is: those quote.

use stage::Failure;

/// Why partition stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PartitionError {
    /// Flags that do not go together: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A field of a record is missing or has another type.
    #[error("{object}: row {row}: field `{field}` is {found}, expected {expected}\nhelp: {help}")]
    Field {
        /// URL of the object.
        object: String,
        /// Row in the object, from 1.
        row: u64,
        /// The field, with the way to it.
        field: String,
        /// Type that was found, or `missing`.
        found: &'static str,
        /// What was expected.
        expected: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// The bytes of a record are not a JSON object.
    #[error("{object}: row {row}, byte {offset}: {problem}\nhelp: {help}")]
    Syntax {
        /// URL of the object.
        object: String,
        /// Row in the object, from 1.
        row: u64,
        /// Byte offset in the object.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// The object as a whole cannot be read.
    #[error("{object}: {problem}\nhelp: {help}")]
    Object {
        /// URL of the object.
        object: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        help: String,
    },
    /// Nothing was left to write.
    #[error(
        "corpus `{corpus}` would be empty: {reason}\n\
         help: check --shape, --language and --unit-column against the input"
    )]
    Empty {
        /// Corpus name.
        corpus: String,
        /// At which step the last record went.
        reason: &'static str,
    },
    /// The folder of temporary files does not take the n-grams that memory does not hold: exit code 5.
    #[error(
        "{folder}: n-grams that do not fit in memory cannot be kept there: {0}\n\
         help: free space there, name a larger disk with TMPDIR, or compare whole texts with --dedup exact",
        folder = std::env::temp_dir().display()
    )]
    Scratch(#[from] std::io::Error),
    /// An invariant of ours: exit code 1.
    #[error("{0}")]
    Bug(&'static str),
    /// Storage.
    #[error(transparent)]
    Lake(#[from] lake::LakeError),
    /// The noise key.
    #[error(transparent)]
    Ledger(#[from] ledger::LedgerError),
}

impl PartitionError {
    /// An input that is not the same at the second reading.
    pub(crate) fn changed(object: &str) -> Self {
        Self::Object {
            object: object.to_owned(),
            problem: "the object changed while it was being read".into(),
            help: "let its writer finish, then run again".into(),
        }
    }
}

impl From<PartitionError> for Failure {
    fn from(error: PartitionError) -> Self {
        match error {
            PartitionError::Usage(message) => Failure::Usage(message),
            PartitionError::Bug(message) => Failure::Bug(message.to_owned()),
            PartitionError::Scratch(_) => Failure::Transient(error.to_string()),
            PartitionError::Lake(error) => error.into(),
            PartitionError::Ledger(error) => Failure::coded(error.exit_code(), error),
            other => Failure::Input(other.to_string()),
        }
    }
}
