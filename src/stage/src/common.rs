//! Flags that every stage shares, and the roots they name.

use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use lake::{Overlay, Pins, PrivateRoot, ReleaseRoot, StorageOptions};
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::logging::Verbosity;

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
    /// Read this version of an input table rather than the latest; repeatable.
    ///
    /// TABLE is the path below its root, such as corpora/sharegpt=1. A run that has begun keeps what it reads; a table
    /// that the stage does not read is refused.
    #[arg(long = "pin", value_name = "TABLE=VERSION", value_parser = pin, help_heading = "Run")]
    pub pins: Vec<(String, i64)>,
    /// Deadline of one storage operation with its retries, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, help_heading = "Run", value_parser = storage_timeout())]
    pub storage_timeout: u64,
    /// What standard output carries at the end.
    #[arg(long, value_enum, default_value_t = Format::Text, help_heading = "Output")]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
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
    /// Opens the private root; a missing flag is a usage failure that says what to set. One that overlaps with the
    /// release root, where that is given, is refused: private data would lie in the release zone.
    pub async fn private_root(&self) -> Result<PrivateRoot, Failure> {
        let url = required(self.private.as_deref(), "private")?;
        if let Ok(release) = required(self.release.as_deref(), "release") {
            lake::check_disjoint_urls(url, release)?;
        }
        let root = PrivateRoot::open(url, &self.storage()).await?.pinned(self.pinned());
        match Overlays::of_process()?.private {
            Some(overlay) => Ok(root.under(&overlay)?),
            None => Ok(root.marked()),
        }
    }

    /// Opens the release root.
    pub async fn release_root(&self) -> Result<ReleaseRoot, Failure> {
        let url = required(self.release.as_deref(), "release")?;
        let root = ReleaseRoot::open(url, &self.storage()).await?.pinned(self.pinned());
        match Overlays::of_process()?.release {
            Some(overlay) => Ok(root.under(&overlay)?),
            None => Ok(root.marked()),
        }
    }

    /// Both roots.
    pub async fn roots(&self) -> Result<(PrivateRoot, ReleaseRoot), Failure> {
        Ok((self.private_root().await?, self.release_root().await?))
    }

    fn pinned(&self) -> Pins {
        self.pins.iter().cloned().collect()
    }

    /// Storage options from the flags.
    pub fn storage(&self) -> StorageOptions {
        StorageOptions { timeout: Duration::from_secs(self.storage_timeout) }
    }
}

/// With this set, a stage sees its roots through overlays and writes to scratch areas: `doppel rerun` repeats stages
/// so, as a process of the same command, and the roots stay as they are.
pub const OVERLAYS: &str = "DOPPEL_OVERLAYS";

/// Whether this process repeats a stage for `doppel rerun`, which compares its outputs and throws them away.
pub fn is_rerun() -> bool {
    std::env::var_os(OVERLAYS).is_some()
}

/// What lies over each root of a stage, as JSON in [`OVERLAYS`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlays {
    /// Over the private root.
    pub private: Option<Overlay>,
    /// Over the release root.
    pub release: Option<Overlay>,
}

impl Overlays {
    fn of_process() -> Result<Self, Failure> {
        match std::env::var(OVERLAYS) {
            Ok(text) => Self::parse(&text),
            Err(std::env::VarError::NotPresent) => Ok(Self::default()),
            Err(error) => Err(Failure::Usage(format!("{OVERLAYS}: {error}"))),
        }
    }

    /// PRIVACY: an overlay that cannot be read is an error, never none at all: the stage would write to the roots.
    fn parse(text: &str) -> Result<Self, Failure> {
        serde_json::from_str(text).map_err(|error| {
            Failure::Usage(format!(
                "{OVERLAYS}: {error}\nhelp: `doppel rerun` sets it; unset it to run the stage itself"
            ))
        })
    }
}

/// Takes the seconds of a `--storage-timeout`.
pub fn storage_timeout() -> RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=86_400)
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

/// Splits `TABLE=VERSION`.
fn pin(text: &str) -> Result<(String, i64), String> {
    let parts =
        text.rsplit_once('=').and_then(|(table, version)| Some((table.trim_matches('/'), version.parse().ok()?)));
    match parts {
        Some((table, version)) if !table.is_empty() && version >= 0 => Ok((table.to_owned(), version)),
        _ => Err("write it as TABLE=VERSION, such as corpora/sharegpt=1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_names_a_table_and_a_version() {
        assert_eq!(pin("/corpora/a=b/=12"), Ok(("corpora/a=b".to_owned(), 12)));
        for wrong in ["corpora/a", "=1", "/=1", "corpora/a=", "corpora/a=-1", "corpora/a=x"] {
            assert!(pin(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_told_can_be_handed_on() {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            verbosity: Verbosity,
        }
        use clap::Parser;
        for given in [vec!["-vv"], vec!["-q", "--log-format=json"], vec!["--log-format=text"], vec![]] {
            let verbosity = Command::parse_from(std::iter::once("one").chain(given)).verbosity;
            let again = Command::parse_from(std::iter::once("two".to_owned()).chain(verbosity.flags())).verbosity;
            assert_eq!(again, verbosity);
        }
    }

    #[test]
    fn overlays_that_cannot_be_read_are_an_error() {
        let overlay = Overlay { scratch: "s3://bucket/scratch".into(), hidden: vec!["runs/demo/adapter".into()] };
        let overlays = Overlays { private: None, release: Some(overlay) };
        let text = serde_json::to_string(&overlays).unwrap();
        assert_eq!(Overlays::parse(&text).unwrap(), overlays);
        for wrong in ["", "1", r#"{"privat": null}"#] {
            assert_eq!(Overlays::parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

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
