//! What is typed, and what it means.

use std::collections::HashMap;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use lake::{ReleaseRoot, StorageOptions};
use stage::Failure;

use crate::catalog::{Options, Pins};
use crate::output::{Format, Target};

const EXAMPLES: &str = "\
Tables:
  synthetic, embeddings, clusters, histogram, selected   of the run that --run names
  \"other-run\".synthetic                                  of another run
  tables                                                 what a run holds, with versions
  runs, stages, inputs, outputs, releases                who made what from what, and which ε paid for it

  runs and releases say of each run whether it was `dropped`: its results are removed, and it stays on record.

Functions besides DataFusion's: cosine_similarity(list, list), word_ngrams(text, n).

Examples:
  doppel query --run demo \"SELECT finish_reason, count(*) FROM synthetic GROUP BY 1\"
  doppel query --run demo --file sql/cluster_sizes.sql --output csv
  doppel query --run demo --at synthetic=3 \"SELECT count(*) FROM synthetic\"
  doppel query --run demo --alias base=demo-base \\
    \"SELECT (SELECT avg(tokens) FROM synthetic), (SELECT avg(tokens) FROM base.synthetic)\"
  doppel query \"SELECT run, mechanism, epsilon, delta FROM releases\"

Exit codes: 0 done; 2 wrong usage or SQL; 3 a table, run or file is missing or malformed; 5 storage, safe to retry.";

/// Answer one SQL query over the release zone. Read-only: nothing is written to a root, and no other file is read.
#[derive(Parser, Clone, Debug)]
#[command(name = "doppel-query", version, after_help = EXAMPLES)]
pub struct Args {
    /// The query: one SELECT, DESCRIBE, SHOW TABLES or EXPLAIN.
    #[arg(value_name = "SQL", required_unless_present = "file", conflicts_with = "file")]
    pub sql: Option<String>,
    /// Read the query from this file, or from standard input for `-`.
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Run whose tables have short names; without it, tables are written "RUN".TABLE.
    #[arg(long, env = "DOPPEL_RUN", value_name = "ID", value_parser = stage::common::run_id)]
    pub run: Option<String>,
    /// Read TABLE, or RUN.TABLE, at an older version instead of the latest; the query must name it. Repeatable.
    #[arg(long, value_name = "TABLE=VERSION", value_parser = pin)]
    pub at: Vec<Pin>,
    /// Give the tables of RUN the names NAME.synthetic and so on, so that one SQL file can compare any two runs; NAME
    /// must not be the id of a run. Repeatable.
    #[arg(long, value_name = "NAME=RUN", value_parser = alias)]
    pub alias: Vec<(String, String)>,
    /// Form of the rows. `json` is one array of objects; `parquet` needs --to or a pipe.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Write the rows to this file, which appears when it is complete, instead of standard output. A device or named
    /// pipe gets them as they come.
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,
    /// Release root: a path, file://, s3://, gs:// or az:// URL.
    #[arg(long, env = "DOPPEL_RELEASE", value_name = "URL", hide_env_values = true)]
    pub release: Option<String>,
    /// Deadline of one storage operation with its retries, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = stage::common::storage_timeout())]
    pub storage_timeout: u64,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: stage::Verbosity,
}

impl Args {
    /// The SQL text, from the command line, a file or standard input.
    pub fn sql_text(&self) -> Result<String, Failure> {
        let Some(file) = &self.file else {
            return Ok(self.sql.clone().unwrap_or_default());
        };
        let text = if file.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(file)
        };
        text.map_err(|error| Failure::Input(format!("{}: {error}\nhelp: --file expects a SQL file", file.display())))
    }

    /// Where the rows go. Parquet is refused on a terminal, which it would garble.
    pub fn target(&self) -> Result<Target, Failure> {
        if let Some(folder) = self.to.as_ref().filter(|to| to.is_dir()) {
            return Err(Failure::Usage(format!(
                "--to {}: a folder is there\nhelp: name a file, which may be in it",
                folder.display()
            )));
        }
        if self.output == Format::Parquet && self.to.is_none() && std::io::stdout().is_terminal() {
            return Err(Failure::Usage("--output parquet: standard output is a terminal\nhelp: add --to FILE".into()));
        }
        Ok(Target { format: self.output, file: self.to.clone() })
    }

    /// What the session resolves names by.
    pub fn options(&self) -> Result<Options, Failure> {
        let mut aliases = HashMap::new();
        for (name, run) in &self.alias {
            if self.run.as_ref() == Some(name) {
                return Err(Failure::Usage(format!(
                    "--alias {name}={run}: --run names {name} too\nhelp: choose another NAME"
                )));
            }
            if aliases.insert(name.clone(), run.clone()).is_some() {
                return Err(Failure::Usage(format!("--alias {name}: given twice\nhelp: one run per name")));
            }
        }
        let pins = self.pins(&aliases)?;
        Ok(Options { run: self.run.clone(), pins, aliases })
    }

    /// The pins by run and table, however the run was named.
    fn pins(&self, aliases: &HashMap<String, String>) -> Result<Pins, Failure> {
        let mut pins = Pins::new();
        for Pin { run, table, version } in &self.at {
            let run = match run {
                Some(name) => aliases.get(name).unwrap_or(name),
                None => self.run.as_ref().ok_or_else(|| {
                    Failure::Usage(format!(
                        "--at {table}={version}: of which run?\nhelp: pass --run ID, or write --at ID.{table}={version}"
                    ))
                })?,
            };
            if pins.insert((run.clone(), table.clone()), *version).is_some() {
                return Err(Failure::Usage(format!("--at {run}.{table}: given twice\nhelp: one version per table")));
            }
        }
        Ok(pins)
    }

    /// Opens the release root.
    pub async fn release_root(&self) -> Result<ReleaseRoot, Failure> {
        let url = self.release.as_deref().filter(|url| !url.is_empty()).ok_or_else(|| {
            Failure::Usage("no release root is given\nhelp: pass --release URL, or set DOPPEL_RELEASE".into())
        })?;
        let options = StorageOptions { timeout: Duration::from_secs(self.storage_timeout) };
        Ok(ReleaseRoot::open(url, &options).await?)
    }
}

/// One table held at a version, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Run id or alias; `None` for the run whose tables have short names.
    run: Option<String>,
    table: String,
    version: i64,
}

fn pin(text: &str) -> Result<Pin, String> {
    let expected = || format!("found {text:?}; expected TABLE=VERSION or RUN.TABLE=VERSION, such as synthetic=3");
    let (name, version) = text.split_once('=').ok_or_else(expected)?;
    let version = version.parse().ok().filter(|version| *version >= 0).ok_or_else(expected)?;
    // A run id may hold dots and a table's name may not, so the last one separates them.
    let (run, table) = match name.rsplit_once('.') {
        Some((run, table)) => (Some(run.trim_matches('"').to_string()), table),
        None => (None, name),
    };
    if table.is_empty() || run.as_deref() == Some("") {
        return Err(expected());
    }
    Ok(Pin { run, table: table.to_string(), version })
}

fn alias(text: &str) -> Result<(String, String), String> {
    let (name, run) = text.split_once('=').ok_or_else(|| format!("found {text:?}; expected NAME=RUN"))?;
    let name_is_plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if name.is_empty() || !name_is_plain {
        return Err(format!("found name {name:?}; expected lower-case letters, digits and `_`"));
    }
    Ok((name.to_string(), stage::common::run_id(run)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn pins_name_a_table_of_this_run_or_of_another() {
        let parsed = |run: Option<&str>, table: &str, version| {
            Ok(Pin { run: run.map(str::to_string), table: table.into(), version })
        };
        assert_eq!(pin("synthetic=3"), parsed(None, "synthetic", 3));
        assert_eq!(pin("v1.2.synthetic=0"), parsed(Some("v1.2"), "synthetic", 0));
        assert_eq!(pin("\"a-b\".clusters=1"), parsed(Some("a-b"), "clusters", 1));
        for wrong in ["synthetic", "synthetic=", "synthetic=-1", "synthetic=x", "=1", "a.=1", ".a=1"] {
            assert!(pin(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn aliases_are_plain_names_of_run_ids() {
        assert_eq!(alias("base=demo-base"), Ok(("base".into(), "demo-base".into())));
        for wrong in ["base", "=x", "Base=x", "a-b=x", "base=../x", "base="] {
            assert!(alias(wrong).is_err(), "{wrong}");
        }
    }
}
