//! Failures by exit code: what the scheduler that started the stage should do next.

/// How a stage fails.
///
/// PRIVACY: a message names objects, columns, rows by number, and what was expected; never what a record says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Exit code 1: a broken invariant of ours.
    #[error("{0}\nhelp: this is a bug in doppel; please report it")]
    Bug(String),
    /// Exit code 2: wrong usage or configuration.
    #[error("{0}")]
    Usage(String),
    /// Exit code 3: an input is missing or malformed.
    #[error("{0}")]
    Input(String),
    /// Exit code 4: refused by the privacy budget.
    #[error("{0}")]
    Budget(String),
    /// Exit code 5: storage or network; safe to retry.
    #[error("{0}")]
    Transient(String),
    /// An exit code that the stage contract says nothing of: a run that a signal stopped, or whose command failed with
    /// a code of its own.
    #[error("{message}")]
    Ended {
        /// The exit code.
        code: u8,
        /// What happened.
        message: String,
    },
}

impl Failure {
    /// The failure with `code`, for errors of crates that do not know this one, such as `ledger`.
    pub fn coded(code: u8, message: impl std::fmt::Display) -> Self {
        let message = message.to_string();
        match code {
            2 => Failure::Usage(message),
            3 => Failure::Input(message),
            4 => Failure::Budget(message),
            5 => Failure::Transient(message),
            _ => Failure::Bug(message),
        }
    }

    /// The exit code, for all but [`Failure::Ended`] that of the stage contract.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Bug(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Input(_) => 3,
            Failure::Budget(_) => 4,
            Failure::Transient(_) => 5,
            Failure::Ended { code, .. } => *code,
        }
    }

    /// The kind in one word, for logs and metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Failure::Bug(_) => "bug",
            Failure::Usage(_) => "usage",
            Failure::Input(_) => "input",
            Failure::Budget(_) => "budget",
            Failure::Transient(_) => "transient",
            Failure::Ended { .. } => "ended",
        }
    }
}

impl From<lake::LakeError> for Failure {
    fn from(error: lake::LakeError) -> Self {
        Failure::coded(error.exit_code(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_failures_map_both_ways() {
        for code in 1..=5 {
            assert_eq!(Failure::coded(code, "x").exit_code(), code);
        }
        assert_eq!(Failure::coded(77, "x").exit_code(), 1);
    }

    #[test]
    fn storage_errors_keep_what_the_scheduler_should_do() {
        for (error, code) in [
            (lake::LakeError::Usage("x".into()), 2),
            (lake::LakeError::Conflict("x".into()), 2),
            (lake::LakeError::NotFound("x".into()), 3),
            (lake::LakeError::NoBucket("x".into()), 3),
            (lake::LakeError::Malformed("x".into()), 3),
            (lake::LakeError::Forbidden("x".into()), 3),
            (lake::LakeError::Transient("x".into()), 5),
        ] {
            assert_eq!(Failure::from(error).exit_code(), code);
        }
    }
}
