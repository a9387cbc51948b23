//! Names in a query, resolved when the query uses them.
//!
//! A schema is a run, a table is a Delta table of that run, and the tables of [`crate::audit`] are in every schema.
//! Nothing is listed up front: a lake may hold thousands of runs, and a query names a few tables. Only an error lists
//! what there is, to suggest what may have been meant.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, SchemaProvider, TableProvider};
use datafusion::common::utils::datafusion_strsim::levenshtein;
use datafusion::error::{DataFusionError, Result};
use lake::{ReleaseRoot, Zone};
use tokio::sync::OnceCell;

use crate::audit::{Audit, TABLES};
use crate::error::QueryError;
use crate::session::Options;

/// The catalog's name, which a query need not write.
pub const CATALOG: &str = "release";

/// The schema of unqualified names when no run is given; no run id has a space.
pub const NO_RUN: &str = "no run";

/// The release root as a catalog.
#[derive(Debug)]
pub struct ReleaseCatalog(Arc<Released>);

impl ReleaseCatalog {
    /// The catalog of `root`; touches no storage. The engine looks up its table `functions` as tables first; these are
    /// left to it.
    pub fn new(root: ReleaseRoot, options: Options, functions: HashSet<String>) -> Self {
        Self(Arc::new(Released { root, options, functions, pins_used: Mutex::default(), audit: OnceCell::new() }))
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
        let table = self.root.table(&format!("runs/{run}/{name}"));
        let Some(latest) = table.version().await? else {
            return Err(self.missing(run, name).await);
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
    async fn missing(&self, run: &str, name: &str) -> QueryError {
        let tables = match tables_of(&self.root, Some(run)).await {
            Ok(tables) => tables.into_iter().map(|(_, table)| table).collect::<Vec<_>>(),
            Err(error) => return error,
        };
        if !tables.is_empty() {
            let known: Vec<&str> = tables.iter().map(String::as_str).chain(TABLES.iter().copied()).collect();
            return QueryError::Missing(format!(
                "run {run} has no table {name}{}\nhelp: it has {}; besides, {}",
                suggestion(name, &known),
                tables.join(", "),
                TABLES.join(", ")
            ));
        }
        let runs = match runs(&self.root).await {
            Ok(runs) => runs,
            Err(error) => return error,
        };
        let known: Vec<&str> = runs.iter().map(String::as_str).collect();
        QueryError::Missing(format!(
            "no run {run} has tables here{}\nhelp: {}",
            suggestion(run, &known),
            list_runs(&known)
        ))
    }

    async fn no_run(&self, name: &str) -> QueryError {
        match runs(&self.root).await {
            Ok(runs) => {
                let known: Vec<&str> = runs.iter().map(String::as_str).collect();
                let help = list_runs(&known);
                QueryError::Missing(format!(
                    "table {name}: no run is named\nhelp: pass --run ID, or write \"ID\".{name}; {help}"
                ))
            }
            Err(error) => error,
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
            None => Err(self.released.no_run(name).await),
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

/// `(run, table)` of all Delta tables of one run, or of all runs, sorted.
pub(crate) async fn tables_of(
    root: &ReleaseRoot,
    run: Option<&str>,
) -> std::result::Result<Vec<(String, String)>, QueryError> {
    let prefix = run.map_or_else(|| "runs".to_string(), |run| format!("runs/{run}"));
    let paths = root.list(&prefix).await?;
    let tables: BTreeSet<(String, String)> = paths
        .iter()
        .filter_map(|path| {
            let (table, _) = path.strip_prefix("runs/")?.split_once("/_delta_log/")?;
            let (run, table) = table.split_once('/')?;
            (!table.contains('/')).then(|| (run.to_string(), table.to_string()))
        })
        .collect();
    Ok(tables.into_iter().collect())
}

async fn runs(root: &ReleaseRoot) -> std::result::Result<Vec<String>, QueryError> {
    let paths = root.list("runs").await?;
    let runs: BTreeSet<String> = paths
        .iter()
        .filter_map(|path| path.strip_prefix("runs/")?.split_once('/').map(|(run, _)| run.to_string()))
        .collect();
    Ok(runs.into_iter().collect())
}

fn list_runs(runs: &[&str]) -> String {
    const SHOWN: usize = 12;
    match runs.len() {
        0 => "the release root has no run yet".into(),
        count if count <= SHOWN => format!("the release root has {}", runs.join(", ")),
        count => format!("the release root has {} and {} more", runs[..SHOWN].join(", "), count - SHOWN),
    }
}

/// `; did you mean …?` where a known name is near.
fn suggestion(name: &str, known: &[&str]) -> String {
    let near = known.iter().map(|other| (levenshtein(name, other), *other)).min();
    match near {
        Some((distance, other)) if distance <= 1 + name.len() / 3 => {
            format!("; did you mean {other}?")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_gets_the_nearest_name() {
        let known = ["clusters", "embeddings", "synthetic"];
        assert_eq!(suggestion("cluster", &known), "; did you mean clusters?");
        assert_eq!(suggestion("syntetic", &known), "; did you mean synthetic?");
        assert_eq!(suggestion("corpus", &known), "");
    }

    #[test]
    fn names_do_not_walk_out_of_the_runs() {
        for name in ["..", "../private", "a/b", "", ".hidden", "s3://x"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
