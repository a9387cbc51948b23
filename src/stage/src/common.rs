//! Flags that every stage shares, and the roots they name.

use std::time::Duration;

use clap::{Args, ValueEnum};
use lake::{PrivateRoot, ReleaseRoot, StorageOptions};

use crate::Failure;
use crate::logging::LogFormat;

/// Flags that every stage shares.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Run id: letters, digits, `.`, `_`, `-`; at most 100, the first a letter or digit.
    ///
    /// The same id with the same settings continues what was begun, or finds it done; with other settings it is refused.
    #[arg(long, env = "DOPPEL_RUN", value_name = "ID", value_parser = run_id, help_heading = "Run")]
    pub run: String,
    /// Private root: a path, file://, s3://, gs:// or az:// URL.
    ///
    /// Holds everything computed from private records without a mechanism. Credentials come from the environment.
    #[arg(long, env = "DOPPEL_PRIVATE", value_name = "URL", hide_env_values = true, help_heading = "Run")]
    pub private: Option<String>,
    /// Release root: a path, file://, s3://, gs:// or az:// URL.
    ///
    /// Holds outputs of mechanisms, and what follows from them alone. It must not be the private root, nor lie in it.
    #[arg(long, env = "DOPPEL_RELEASE", value_name = "URL", hide_env_values = true, help_heading = "Run")]
    pub release: Option<String>,
    /// Deadline of one storage operation with its retries, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, help_heading = "Run",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub storage_timeout: u64,
    /// What standard output carries at the end.
    #[arg(long, value_enum, default_value_t = Format::Text, help_heading = "Output")]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Flags that shape what standard error tells.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Verbosity {
    /// Tell more; repeat for debug (`-vv`) and trace (`-vvv`). `RUST_LOG` overrides.
    ///
    /// Where a private root is given, messages of third-party crates are reduced to their place in the source, however
    /// verbose: they may quote data.
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Output")]
    pub verbose: u8,
    /// Tell errors only, without progress.
    #[arg(short, long, conflicts_with = "verbose", help_heading = "Output")]
    pub quiet: bool,
    /// Form of the log on standard error; `auto`: text on a terminal, one JSON object per line elsewhere.
    #[arg(long, value_enum, env = "DOPPEL_LOG_FORMAT", default_value_t = LogFormat::Auto, help_heading = "Output")]
    pub log_format: LogFormat,
}

/// Format of the summary on standard output.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A sentence.
    Text,
    /// One JSON object.
    Json,
}

impl Common {
    /// Opens the private root; a missing flag is a usage failure that says what to set.
    pub async fn private_root(&self) -> Result<PrivateRoot, Failure> {
        let url = required(self.private.as_deref(), "private")?;
        Ok(PrivateRoot::open(url, &self.storage()).await?)
    }

    /// Opens the release root.
    pub async fn release_root(&self) -> Result<ReleaseRoot, Failure> {
        let url = required(self.release.as_deref(), "release")?;
        Ok(ReleaseRoot::open(url, &self.storage()).await?)
    }

    /// Both roots; the same or nested ones are refused, since the zones would mix.
    pub async fn roots(&self) -> Result<(PrivateRoot, ReleaseRoot), Failure> {
        let (private, release) = (self.private_root().await?, self.release_root().await?);
        lake::check_disjoint(&private, &release)?;
        Ok((private, release))
    }

    /// Storage options from the flags.
    pub fn storage(&self) -> StorageOptions {
        StorageOptions { timeout: Duration::from_secs(self.storage_timeout) }
    }
}

fn required<'a>(url: Option<&'a str>, zone: &str) -> Result<&'a str, Failure> {
    url.filter(|url| !url.is_empty()).ok_or_else(|| {
        Failure::Usage(format!(
            "no {zone} root is given\nhelp: pass --{zone} URL, or set DOPPEL_{}; a path, file://, s3://, gs:// or az://",
            zone.to_uppercase()
        ))
    })
}

/// Checks a run id: it becomes a part of object paths on every store, and of file names.
pub fn run_id(id: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts_well = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && id.len() <= 100 && id.chars().all(allowed) {
        Ok(id.to_string())
    } else {
        Err("a run id has 1 to 100 letters, digits, `.`, `_` or `-`, and begins with a letter or digit".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_ids_are_safe_as_a_part_of_a_path() {
        for id in ["demo", "2026-11-24_a.b", "A", &"x".repeat(100)] {
            assert_eq!(run_id(id).as_deref(), Ok(id));
        }
        for id in ["", ".", "..", "-x", "a/b", "a b", "é", "a\n", &"x".repeat(101)] {
            assert!(run_id(id).is_err(), "{id:?}");
        }
    }
}
