//! The chain of objects: reading it whole, and appending one entry by put-if-absent; and the noise key, which may be drawn
//! for as long as no chain has a reservation.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use lake::{LakeError, PrivateRoot, Zone};
use privacy::keyed::NoiseKey;

use crate::entry::{Body, Entry, Seal};
use crate::spent::{Budget, Ledger};
use crate::{LedgerError, key};

/// Folder of all ledgers.
const FOLDER: &str = "ledger";

/// How many objects are read at a time.
const PARALLEL_READS: usize = 16;

/// How often an append may lose its number: each loss is another writer's success, so this many stages would have to
/// race.
const ATTEMPTS: usize = 256;

/// What to do given the ledger as it is.
pub(crate) enum Decision<T> {
    /// Nothing to write.
    Done(T),
    /// Write `Body`; then the result is `T` of its sequence number.
    Append(Body, fn(u64) -> T),
}

/// Decides by the newest state and appends, again and again until no other writer came between.
pub(crate) async fn update<T>(
    root: &PrivateRoot,
    corpus: &str,
    decide: impl Fn(&Ledger) -> Result<Decision<T>, LedgerError>,
) -> Result<T, LedgerError> {
    check_name(corpus)?;
    for _ in 0..ATTEMPTS {
        let (ledger, previous) = load(root, corpus).await?;
        let (body, result) = match decide(&ledger)? {
            Decision::Done(result) => return Ok(result),
            Decision::Append(body, result) => (body, result),
        };
        let reserving = matches!(body, Body::Reserve { .. });
        let seal = match reserving || ledger.has_reservation() {
            true => Seal::keyed(&noise_key(root).await?),
            false => Seal::Plain,
        };
        let sequence = ledger.entries.len() as u64;
        let sealed = Entry::seal(&seal, corpus, sequence, previous, body)?;
        if root.put_if_absent(&path(corpus, sequence), Bytes::from(sealed)).await? {
            return Ok(result(sequence));
        }
    }
    let place = format!("{}/{}", root.url(), folder(corpus));
    Err(LakeError::Transient(format!("{place}: other writers won {ATTEMPTS} times in a row\nhelp: run again")).into())
}

/// Reads the ledger of `corpus` and checks its whole chain. One that was never written to is empty.
pub async fn read(root: &PrivateRoot, corpus: &str) -> Result<Ledger, LedgerError> {
    Ok(load(root, corpus).await?.0)
}

/// The noise key of the private root, drawn from the operating system at first use (put-if-absent).
///
/// Of two stages that start at once, both read back the winner's key. A key that is gone though mechanisms were reserved is
/// an error: with a new one their runs would draw a second sample of noise that was paid for once.
pub async fn noise_key(root: &PrivateRoot) -> Result<NoiseKey, LedgerError> {
    if let Some(key) = key::stored(root).await? {
        return Ok(key);
    }
    for corpus in corpora(root).await? {
        // Reading a ledger with a reservation takes the key, which by then is written or lost.
        load(root, &corpus).await?;
    }
    key::draw(root).await?;
    key::stored(root).await?.ok_or_else(|| key::lost(root))
}

/// Reads and checks all entries; also the hash of the last object.
pub(crate) async fn load(root: &PrivateRoot, corpus: &str) -> Result<(Ledger, Option<String>), LedgerError> {
    check_name(corpus)?;
    let paths = root.list(&folder(corpus)).await?;
    for (sequence, found) in (0..).zip(&paths) {
        let expected = path(corpus, sequence);
        if *found != expected {
            return Err(broken(root, &expected, &format!("is missing; found {found} in its place")));
        }
    }
    let reads = paths.clone().into_iter().map(|path| async move { root.get(&path).await });
    let objects: Vec<Bytes> = futures::stream::iter(reads).buffered(PARALLEL_READS).try_collect().await?;
    let mut ledger = Ledger { corpus: corpus.to_string(), entries: Vec::with_capacity(objects.len()), verified: true };
    let (mut seal, mut previous) = (Some(Seal::Plain), None);
    for ((sequence, path), bytes) in (0..).zip(&paths).zip(&objects) {
        let malformed = |problem: String| broken(root, path, &problem);
        let entry = Entry::parse(bytes).map_err(malformed)?;
        if matches!(entry.body, Body::Reserve { .. }) && !ledger.has_reservation() {
            seal = keyed_seal(key::stored(root).await, || key::lost(root))?;
        }
        match &seal {
            Some(seal) => entry.check_digest(bytes, seal).map_err(malformed)?,
            None => ledger.verified = false,
        }
        check(&entry, sequence, corpus, previous.as_deref(), &ledger.entries).map_err(malformed)?;
        previous = Some(blake3::hash(bytes).to_hex().to_string());
        ledger.entries.push(entry);
    }
    Ok((ledger, previous))
}

/// The seal of a ledger with reservations; `None` for who may read the ledger but not the key, such as an auditor. The
/// hashes from entry to entry then show damage, but whoever may write can forge all of them. To write takes the key.
fn keyed_seal(
    stored: Result<Option<NoiseKey>, LedgerError>,
    lost: impl FnOnce() -> LedgerError,
) -> Result<Option<Seal>, LedgerError> {
    match stored {
        Ok(Some(key)) => Ok(Some(Seal::keyed(&key))),
        Ok(None) => Err(lost()),
        Err(LedgerError::Lake(LakeError::Forbidden(_))) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether `entry` may follow `earlier`.
fn check(entry: &Entry, sequence: u64, corpus: &str, previous: Option<&str>, earlier: &[Entry]) -> Result<(), String> {
    if entry.sequence != sequence {
        return Err(format!("says that it is entry {}", entry.sequence));
    }
    if entry.corpus != corpus {
        return Err(format!("belongs to the ledger of corpus `{}`", entry.corpus));
    }
    if entry.previous.as_deref() != previous {
        return Err("does not follow from the entry before: one of the two was replaced".into());
    }
    match &entry.body {
        Body::Budget { epsilon, delta } => Budget { epsilon: *epsilon, delta: *delta }.check(),
        Body::Reserve { event, .. } => event.validate().map_err(|error| error.to_string()),
        Body::Settle { reservation } => {
            let reserved = usize::try_from(*reservation).ok().and_then(|at| earlier.get(at));
            match reserved.map(|entry| &entry.body) {
                Some(Body::Reserve { .. }) => Ok(()),
                _ => Err(format!("settles entry {reservation}, which is no reservation")),
            }
        }
    }
}

fn broken(root: &PrivateRoot, path: &str, problem: &str) -> LedgerError {
    LedgerError::Malformed(format!(
        "ledger entry {}/{path}: {problem}\n\
         help: no budget can be told from a broken ledger; restore the object from the store's versions or a backup",
        root.url()
    ))
}

/// Corpora that have a ledger below `root`.
pub async fn corpora(root: &PrivateRoot) -> Result<BTreeSet<String>, LedgerError> {
    let paths = root.list(FOLDER).await?;
    Ok(paths.iter().filter_map(|path| path.split('/').nth(1)).map(str::to_owned).collect())
}

fn folder(corpus: &str) -> String {
    format!("{FOLDER}/{corpus}/")
}

fn path(corpus: &str, sequence: u64) -> String {
    format!("{FOLDER}/{corpus}/{sequence:08}.json")
}

/// A corpus name becomes a part of object paths.
fn check_name(corpus: &str) -> Result<(), LedgerError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts_well = corpus.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && corpus.len() <= 100 && corpus.chars().all(allowed) {
        return Ok(());
    }
    Err(LedgerError::Usage(format!(
        "corpus name `{corpus}`: expected 1 to 100 letters, digits, `.`, `_` or `-`, the first a letter or digit"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_read_the_noise_key_reads_without_it_and_nobody_else_does() {
        let lost = || LedgerError::Malformed("lost".into());
        let failed = |error: LakeError| keyed_seal(Err(error.into()), lost);
        assert!(keyed_seal(Ok(Some(NoiseKey::new([7; 32]))), lost).unwrap().is_some());
        assert!(failed(LakeError::Forbidden("closed".into())).unwrap().is_none());
        assert!(matches!(keyed_seal(Ok(None), lost), Err(LedgerError::Malformed(text)) if text == "lost"));
        let error = failed(LakeError::Transient("away".into())).map(drop).unwrap_err();
        assert!(matches!(error, LedgerError::Lake(LakeError::Transient(_))), "{error}");
    }
}
