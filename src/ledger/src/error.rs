//! What can go wrong, by what the caller can do.

use lake::LakeError;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The reservation would exceed the budget: exit code 4. Carries the arithmetic as text.
    #[error("{0}")]
    OverBudget(String),
    /// The run id is reserved with other settings, or no budget is set, or such: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A broken chain, a gap, an unknown event: exit code 3.
    #[error("{0}")]
    Malformed(String),
    /// Storage.
    #[error(transparent)]
    Lake(#[from] LakeError),
    /// Accounting.
    #[error(transparent)]
    Accounting(#[from] privacy::AccountingError),
}

impl LedgerError {
    /// The exit code of the stage contract, for `stage::Failure::coded`: this crate does not know stages.
    pub fn exit_code(&self) -> u8 {
        match self {
            LedgerError::OverBudget(_) => 4,
            LedgerError::Malformed(_) => 3,
            LedgerError::Usage(_) | LedgerError::Accounting(_) => 2,
            LedgerError::Lake(error) => error.exit_code(),
        }
    }
}
