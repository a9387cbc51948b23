//! Names in a query, resolved when the query uses them.
//!
//! A schema is a run, a table is a Delta table of that run, and the tables of [`crate::audit`] are of no run.
//! Nothing is listed up front: a lake may hold thousands of runs, and a query names a few tables. Only an error lists
//! what there is, to suggest what may have been meant.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, SchemaProvider, TableProvider};
use datafusion::error::{DataFusionError, Result};
use lake::{ReleaseRoot, Zone, layout};
use strsim::levenshtein;
use tokio::sync::OnceCell;

use crate::audit::{Audit, TABLES, tables_of};
use crate::error::QueryError;

/// The catalog's name, which a query need not write.
pub const CATALOG: &str = "release";

/// The schema of unqualified names when no run is given; no run id has a space.
pub const NO_RUN: &str = "no run";

/// What names resolve by.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Run whose tables have short names.
    pub run: Option<String>,
    /// Older versions to read.
    pub pins: Pins,
    /// Other names of runs.
    pub aliases: HashMap<String, String>,
}

/// Versions by run and table.
pub type Pins = BTreeMap<(String, String), i64>;

/// The release root as a catalog.
#[derive(Debug)]
pub struct ReleaseCatalog(Arc<Released>);

impl ReleaseCatalog {
    /// The catalog of `root`; touches no storage. The engine looks up its table `functions` as tables first; these are
    /// left to it.
    pub fn new(root: ReleaseRoot, options: Options, functions: HashSet<String>) -> Self {
        Self(Arc::new(Released { root, options, functions, pins_used: Mutex::default(), audit: OnceCell::new() }))
    }

    /// Refuses aliases that are ids of runs: a query that names such a run would be answered from another one.
    pub async fn refuse_aliases_of_runs(&self) -> std::result::Result<(), QueryError> {
        for (name, run) in &self.0.options.aliases {
            if !self.0.root.list(&layout::run(name)).await?.is_empty() {
                return Err(QueryError::Sql(format!(
                    "--alias {name}={run}: {name} is the id of a run\nhelp: choose another NAME"
                )));
            }
        }
        Ok(())
    }

    /// Refuses pins of tables that nothing has resolved so far.
    pub fn refuse_unused_pins(&self) -> std::result::Result<(), QueryError> {
        let used = self.0.pins_used.lock().unwrap_or_else(PoisonError::into_inner);
        match self.0.options.pins.iter().find(|(table, _)| !used.contains(*table)) {
            None => Ok(()),
            Some(((run, table), version)) => Err(QueryError::Sql(format!(
                "--at {run}.{table}={version}: the query does not read that table\n\
                 help: leave it out, or correct its name; SHOW TABLES lists tables"
            ))),
        }
    }
}

impl CatalogProvider for ReleaseCatalog {
    /// Empty, because listing would read storage; names resolve all the same.
    fn schema_names(&self) -> Vec<String> {
        Vec::new()
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        let run = (name != NO_RUN).then(|| self.0.run_of(name));
        Some(Arc::new(RunSchema { run, released: self.0.clone() }))
    }
}

#[derive(Debug)]
struct Released {
    root: ReleaseRoot,
    options: Options,
    functions: HashSet<String>,
    pins_used: Mutex<BTreeSet<(String, String)>>,
    audit: OnceCell<Audit>,
}

impl Released {
    fn run_of(&self, name: &str) -> String {
        self.options.aliases.get(name).cloned().unwrap_or_else(|| name.to_string())
    }

    fn pinned(&self, run: &str, table: &str) -> Option<i64> {
        let table = (run.to_owned(), table.to_owned());
        let version = *self.options.pins.get(&table)?;
        self.pins_used.lock().unwrap_or_else(PoisonError::into_inner).insert(table);
        Some(version)
    }

    async fn audit(&self, table: &str) -> std::result::Result<Arc<dyn TableProvider>, QueryError> {
        let audit = self.audit.get_or_try_init(|| Audit::read(&self.root)).await?;
        audit.table(&self.root, table).await
    }

    async fn delta(&self, run: &str, name: &str) -> std::result::Result<Arc<dyn TableProvider>, QueryError> {
        let pinned = self.pinned(run, name);
        let table = self.root.table(&layout::of_run(run, name));
        let Some(latest) = table.version().await? else {
            return Err(self.missing(run, name).await?);
        };
        let version = pinned.unwrap_or(latest);
        if version > latest {
            return Err(QueryError::Missing(format!(
                "{run}.{name} has no version {version}\nhelp: the latest is {latest}; --at {name}=VERSION takes 0 to it"
            )));
        }
        tracing::info!(run, table = name, version, "reading");
        Ok(table.provider(version).await?)
    }

    /// Says what there is instead.
    async fn missing(&self, run: &str, name: &str) -> std::result::Result<QueryError, QueryError> {
        let tables: Vec<String> = tables_of(&self.root, Some(run)).await?.into_iter().map(|(_, table)| table).collect();
        if !tables.is_empty() {
            let known = tables.iter().map(String::as_str).chain(TABLES);
            return Ok(QueryError::Missing(format!(
                "run {run} has no table {name}{}\nhelp: it has {}; besides, {}",
                suggestion(name, known),
                tables.join(", "),
                TABLES.join(", ")
            )));
        }
        let known = self.runs_with_tables().await?;
        let found = if self.root.list(&layout::run(run)).await?.is_empty() {
            format!("no run {run} has tables here{}", suggestion(run, known.iter().map(String::as_str)))
        } else {
            format!("run {run} has no tables yet, or it was dropped")
        };
        Ok(QueryError::Missing(format!("{found}\nhelp: {}", self.list_runs(&known))))
    }

    async fn no_run(&self, name: &str) -> std::result::Result<QueryError, QueryError> {
        let runs = self.list_runs(&self.runs_with_tables().await?);
        Ok(QueryError::Missing(format!(
            "table {name}: no run is named\nhelp: pass --run ID, or write \"ID\".{name}; {runs}"
        )))
    }

    async fn runs_with_tables(&self) -> std::result::Result<Vec<String>, QueryError> {
        let mut runs: Vec<String> = tables_of(&self.root, None).await?.into_iter().map(|(run, _)| run).collect();
        runs.dedup();
        Ok(runs)
    }

    fn list_runs(&self, runs: &[String]) -> String {
        const SHOWN: usize = 12;
        let url = self.root.url();
        match runs.split_at_checked(SHOWN) {
            _ if runs.is_empty() => format!("{url} has no tables of any run yet"),
            Some((shown, rest)) if !rest.is_empty() => {
                format!("{url} has tables of {} and {} more", shown.join(", "), rest.len())
            }
            _ => format!("{url} has tables of {}", runs.join(", ")),
        }
    }
}

/// One run as a schema.
#[derive(Debug)]
struct RunSchema {
    run: Option<String>,
    released: Arc<Released>,
}

#[async_trait]
impl SchemaProvider for RunSchema {
    /// Empty, because listing would read storage; names resolve all the same.
    fn table_names(&self) -> Vec<String> {
        Vec::new()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        if self.released.functions.contains(name) {
            return Ok(None);
        }
        let found = match &self.run {
            _ if TABLES.contains(&name) => self.released.audit(name).await,
            _ if !is_name(name) => Err(not_a_name(name)),
            Some(run) if !is_name(run) => Err(not_a_name(run)),
            Some(run) => self.released.delta(run, name).await,
            None => self.released.no_run(name).await.and_then(Err),
        };
        found.map(Some).map_err(|error| DataFusionError::External(Box::new(error)))
    }

    fn table_exist(&self, _name: &str) -> bool {
        true
    }
}

fn not_a_name(name: &str) -> QueryError {
    QueryError::Missing(format!(
        "{name:?} is not the name of a table or run\n\
         help: names have letters, digits, `.`, `_` and `-`; files are not read by their paths"
    ))
}

/// Whether `name` is safe as one part of an object's path: this keeps a query from walking out of `runs/`.
fn is_name(name: &str) -> bool {
    stage::common::run_id(name).is_ok()
}

/// `; did you mean …?` where a known name is near.
fn suggestion<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let near = known.into_iter().map(|other| (levenshtein(name, other), other));
    match near.filter(|(distance, other)| *distance <= 1 + name.len().max(other.len()) / 4).min() {
        Some((_, other)) => format!("; did you mean {other}?"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_gets_the_nearest_name() {
        let known = ["clusters", "embeddings", "synthetic"];
        assert_eq!(suggestion("cluster", known), "; did you mean clusters?");
        assert_eq!(suggestion("syntetic", known), "; did you mean synthetic?");
        assert_eq!(suggestion("corpus", known), "");
    }

    #[test]
    fn names_do_not_walk_out_of_the_runs() {
        for name in ["..", "../private", "a/b", "", ".hidden", "s3://x"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
