//! What went wrong with a Delta table, in words that hold no data.
//!
//! The messages of the libraries repeat lines of the log, which hold column statistics of private tables; so they are
//! looked at here, and never shown.

use deltalake::DeltaTableError;
use deltalake::kernel::transaction::TransactionError;
use futures::TryStreamExt;
use url::Url;

use crate::error::{LakeError, explain as explain_store, text};
use crate::store::Store;

/// What a failed commit asks for.
pub(crate) enum Commit {
    /// Another writer was first, or the answer was lost: look at the table, then perhaps try again.
    LookAgain(LakeError),
    /// Trying again is no use.
    Failed(LakeError),
}

/// The error of an operation on the table at `url`.
pub(crate) fn explain(url: &str, error: &DeltaTableError) -> LakeError {
    if let Some(error) = storage_cause(error) {
        return explain_store(url, error);
    }
    let text = text(error);
    if matches!(error, DeltaTableError::NotATable(_))
        || text.contains("No files in log segment")
        || text.contains("Path does not exist")
    {
        return LakeError::NotFound(format!("{url}: no table there"));
    }
    if text.contains("Unsupported") || text.contains("unsupported") {
        return LakeError::Malformed(format!(
            "{url}: the table uses a Delta feature that doppel cannot read\n\
             help: copy it to a plain table (no column mapping, no v2 checkpoints) with the program that wrote it"
        ));
    }
    LakeError::Malformed(format!("{url}: the table's log (_delta_log) cannot be read"))
}

/// What to do after a commit failed with `error`; `failure` is what storage failed at meanwhile.
pub(crate) fn after_commit(url: &str, error: &DeltaTableError, failure: Option<LakeError>) -> Commit {
    match error {
        DeltaTableError::VersionAlreadyExists(_) => Commit::LookAgain(raced(url)),
        DeltaTableError::Transaction {
            source:
                TransactionError::VersionAlreadyExists(_)
                | TransactionError::MaxCommitAttempts(_)
                | TransactionError::CommitConflict(_),
        } => Commit::LookAgain(raced(url)),
        _ if text(error).contains("already exists") => Commit::LookAgain(raced(url)),
        _ => sort(failure.unwrap_or_else(|| explain(url, error))),
    }
}

impl Commit {
    /// The same of a table that could not be created where there was none: a log that cannot be read is another
    /// writer's, at work on the same table, or one that the store says is there and is not.
    pub(crate) fn of_creation(self, url: &str) -> Self {
        match self {
            Self::Failed(LakeError::Malformed(_) | LakeError::NotFound(_)) => Self::LookAgain(raced(url)),
            other => other,
        }
    }
}

fn raced(url: &str) -> LakeError {
    LakeError::Transient(format!("{url}: other writers kept committing first\nhelp: run again"))
}

fn sort(error: LakeError) -> Commit {
    match error {
        LakeError::Transient(_) => Commit::LookAgain(error),
        other => Commit::Failed(other),
    }
}

fn storage_cause<'a>(error: &'a DeltaTableError) -> Option<&'a object_store::Error> {
    let mut cause: Option<&'a (dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<object_store::Error>() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

/// Looks into the log of a table that could not be loaded, and says which commit is at fault.
pub(crate) async fn diagnose(store: &Store, path: &str, version: Option<u64>, error: LakeError) -> LakeError {
    match error {
        LakeError::Transient(_) | LakeError::Forbidden(_) | LakeError::Usage(_) => return error,
        LakeError::NotFound(_) if version.is_none() => return error,
        _ => {}
    }
    match find_fault(store, path, version).await {
        Ok(Some(fault)) => fault,
        Ok(None) => error,
        Err(error) => error,
    }
}

/// Refuses an empty commit behind version `known` and up to `until`: the kernel takes it for one that changes nothing,
/// and the rows that it added would be missing.
pub(crate) async fn refuse_empty_commits(
    store: &Store,
    path: &str,
    known: Option<i64>,
    until: i64,
) -> Result<(), LakeError> {
    let log = format!("{path}/_delta_log");
    let after = known.map(|known| format!("{log}/{known:020}.json"));
    let objects = store.list_behind(&log, after.as_deref()).await?;
    let empty = objects.iter().filter(|object| object.size == 0).find_map(|object| {
        let name = object.path.rsplit('/').next()?;
        let commit: i64 = name.strip_suffix(".json")?.parse().ok()?;
        (commit <= until).then_some(name)
    });
    match empty {
        Some(name) => Err(empty_commit(&store.url_of(path), name)),
        None => Ok(()),
    }
}

/// Only the name tells the commit's number, so that [`without_commits`] takes it away.
fn empty_commit(url: &Url, name: &str) -> LakeError {
    LakeError::Malformed(format!(
        "{url}: a commit is empty (_delta_log/{name})\n\
         help: restore it from a backup or an older version of the object, or write the table again"
    ))
}

/// A message with a star for the number of each commit that it names.
pub(crate) fn without_commits(text: &str) -> String {
    let mut parts = text.split("_delta_log/");
    let mut plain = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        let star = if rest.len() < part.len() { "*" } else { "" };
        plain += &format!("_delta_log/{star}{rest}");
    }
    plain
}

async fn find_fault(store: &Store, path: &str, version: Option<u64>) -> Result<Option<LakeError>, LakeError> {
    let log = format!("{path}/_delta_log");
    let names = store.list(&log).await?;
    let number = |suffix: &str| {
        let names = names.iter().filter_map(|path| path.rsplit('/').next());
        let mut numbers: Vec<u64> =
            names.filter_map(|name| name.strip_suffix(suffix)?.split('.').next()?.parse().ok()).collect();
        numbers.sort();
        numbers
    };
    let (commits, checkpoints) = (number(".json"), number(".parquet"));
    let url = store.url_of(path);
    let Some(&latest) = commits.last() else {
        return Ok(Some(LakeError::NotFound(format!("{url}: no table there"))));
    };
    if let Some(version) = version.filter(|&version| version > latest) {
        return Ok(Some(LakeError::NotFound(format!(
            "{url}: there is no version {version}; the latest is _delta_log/{latest:020}.json"
        ))));
    }
    let until = version.unwrap_or(latest);
    let from =
        checkpoints.iter().rev().find(|&&checkpoint| checkpoint <= until).map_or(0, |&checkpoint| checkpoint + 1);
    for commit in from..=until {
        let name = format!("{commit:020}.json");
        if commits.binary_search(&commit).is_err() {
            return Ok(Some(LakeError::Malformed(format!(
                "{url}: a commit is missing from the table's log (_delta_log/{name})\n\
                 help: restore it from a backup or an older version of the object, or write the table again"
            ))));
        }
        let body = read(store, &format!("{log}/{name}")).await?;
        if body.is_empty() {
            return Ok(Some(empty_commit(&url, &name)));
        }
        let mut lines = body.split(|&byte| byte == b'\n').enumerate();
        let broken = |line: &[u8]| !line.is_empty() && serde_json::from_slice::<serde::de::IgnoredAny>(line).is_err();
        if let Some((line, _)) = lines.find(|(_, line)| broken(line)) {
            return Ok(Some(LakeError::Malformed(format!(
                "{url}: line {} of _delta_log/{name} is not JSON\n\
                 help: restore it from a backup or an older version of the object, or write the table again",
                line + 1
            ))));
        }
    }
    Ok(None)
}

async fn read(store: &Store, path: &str) -> Result<Vec<u8>, LakeError> {
    let (_, parts) = store.stream(path).await?;
    parts
        .try_fold(Vec::new(), |mut body, part| async move {
            body.extend_from_slice(&part);
            Ok(body)
        })
        .await
}
