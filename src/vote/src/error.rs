//! What can go wrong, by what the caller can do; public facts and row numbers only.

use stage::Failure;

/// Why vote stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VoteError {
    /// Flags that do not fit each other or the public input: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// An input is not as it must be: exit code 3.
    #[error("{table}: {problem}\nhelp: {help}")]
    Input {
        /// URL of the table or object.
        table: String,
        /// What is wrong, without private values.
        problem: String,
        /// What to do.
        help: &'static str,
    },
    /// An invariant of ours: exit code 1.
    #[error("{0}")]
    Bug(&'static str),
    /// Storage.
    #[error(transparent)]
    Lake(#[from] lake::LakeError),
    /// The ledger, over budget included.
    #[error(transparent)]
    Ledger(#[from] ledger::LedgerError),
    /// A mechanism with such parameters does not exist: exit code 2.
    #[error(transparent)]
    Mechanism(#[from] privacy::AccountingError),
}

impl VoteError {
    /// An input that is not as it must be.
    pub fn input(table: impl Into<String>, problem: impl Into<String>, help: &'static str) -> Self {
        Self::Input { table: table.into(), problem: problem.into(), help }
    }
}

impl From<VoteError> for Failure {
    fn from(error: VoteError) -> Self {
        match error {
            VoteError::Usage(message) => Failure::Usage(message),
            VoteError::Bug(message) => Failure::Bug(message.to_owned()),
            VoteError::Lake(error) => error.into(),
            VoteError::Ledger(error) => Failure::coded(error.exit_code(), error),
            error @ VoteError::Mechanism(_) => Failure::Usage(error.to_string()),
            error @ VoteError::Input { .. } => Failure::Input(error.to_string()),
        }
    }
}
