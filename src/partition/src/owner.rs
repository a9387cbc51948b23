//! Who writes a corpus, and from what: one run, and the same inputs at every attempt.
//!
//! PRIVACY: sizes, entity tags and digests of the inputs tell about private data; they stay in the private root, and no
//! message repeats them.

use std::collections::HashMap;

use lake::{LakeError, PrivateRoot, StorageOptions, Zone, layout};
use serde::{Deserialize, Serialize};
use stage::Failure;

use crate::input::Identity;

/// The record of it, beside the corpus.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The run that may write.
    pub run: String,
    /// What it reads.
    pub inputs: Vec<Identity>,
}

impl Owner {
    /// Refuses a corpus of another run, before this one leaves anything behind.
    pub async fn refuse_other_run(&self, root: &PrivateRoot, corpus: &str) -> Result<(), Failure> {
        match read(root, corpus).await? {
            Some(earlier) if earlier.run != self.run => Err(taken(corpus, &earlier.run)),
            _ => Ok(()),
        }
    }

    /// Reads the digests of all inputs, by which they are known when they were copied or touched.
    pub async fn read_digests(&mut self, storage: &StorageOptions) -> Result<(), LakeError> {
        for input in &mut self.inputs {
            input.read_digest(storage).await?;
        }
        Ok(())
    }

    /// Refuses two inputs whose digests are the same: where equal records are units, each of theirs would be two.
    pub fn refuse_copies(&self) -> Result<(), Failure> {
        let mut seen = HashMap::new();
        for input in &self.inputs {
            if let Some(earlier) = seen.insert(&input.digest, &input.url) {
                return Err(copies(earlier, &input.url));
            }
        }
        Ok(())
    }

    /// Makes this run the only one that writes to the corpus, before its first row.
    pub async fn take(&self, root: &PrivateRoot, corpus: &str) -> Result<(), Failure> {
        let body = serde_json::to_vec_pretty(self).map_err(|error| Failure::Bug(error.to_string()))?;
        if root.put_if_absent(&layout::owner(corpus), body.into()).await? {
            return Ok(());
        }
        match read(root, corpus).await? {
            Some(earlier) if earlier.run != self.run => Err(taken(corpus, &earlier.run)),
            Some(earlier) => {
                let mut pairs = earlier.inputs.iter().zip(&self.inputs);
                pairs
                    .find(|(earlier, now)| !earlier.is_same(now))
                    .map_or(Ok(()), |(earlier, now)| Err(changed(corpus, &self.run, earlier, now)))
            }
            None => {
                Err(Failure::Transient(format!("{}: removed while it was read", root.url_of(&layout::owner(corpus)))))
            }
        }
    }
}

/// Refuses to call a corpus done whose inputs hold something else by now. An input that is gone, or may no longer be
/// read, says nothing against what was made of it.
pub async fn refuse_changed(root: &PrivateRoot, corpus: &str, storage: &StorageOptions) -> Result<(), Failure> {
    let Some(owner) = read(root, corpus).await? else { return Ok(()) };
    for earlier in &owner.inputs {
        match current(earlier, storage).await {
            Ok(now) if !earlier.is_same(&now) => return Err(changed(corpus, &owner.run, earlier, &now)),
            Ok(_) | Err(LakeError::NotFound(_) | LakeError::Forbidden(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What an input is now; read only where its size leaves open whether it is the same and its tag does not confirm it.
async fn current(earlier: &Identity, storage: &StorageOptions) -> Result<Identity, LakeError> {
    let mut now = Identity::of(&earlier.url, storage).await?;
    if earlier.digest.is_some() && earlier.size == now.size && earlier.etag != now.etag {
        now.read_digest(storage).await?;
    }
    Ok(now)
}

async fn read(root: &PrivateRoot, corpus: &str) -> Result<Option<Owner>, Failure> {
    let body = match root.get(&layout::owner(corpus)).await {
        Err(LakeError::NotFound(_)) => return Ok(None),
        found => found?,
    };
    serde_json::from_slice(&body).map(Some).map_err(|_| {
        let place = root.url_of(&layout::owner(corpus));
        Failure::Input(format!("{place}: not an owner record\nhelp: restore it from a backup"))
    })
}

fn taken(corpus: &str, run: &str) -> Failure {
    Failure::Usage(format!(
        "corpus `{corpus}` exists already: run `{run}` wrote it\n\
         help: choose another --corpus; a corpus never changes, since ledger entries refer to it"
    ))
}

fn copies(one: &str, other: &str) -> Failure {
    Failure::Usage(format!(
        "{one} and {other} have the same content: with --unit-rule record and --dedup none each of their records would \
         be two units, and cost twice the ε that the ledger states\n\
         help: name one of the two; if they hold different records that read alike, put them into one file"
    ))
}

fn changed(corpus: &str, run: &str, earlier: &Identity, now: &Identity) -> Failure {
    let evidence = match (earlier.size == now.size, &earlier.digest) {
        (false, _) => "its size is another",
        (true, Some(_)) => "its content is another",
        (true, None) => "its size is the same, its time stamp or place in the store is not, and no digest was kept",
    };
    Failure::Usage(format!(
        "corpus `{corpus}`: {} changed since run `{run}` began to write: {evidence}\n\
         help: put back what it was then, on a disk the same file with its time stamp: the same content needs no new \
         corpus; partition other content under a new --run and --corpus; for units that are in both corpora, what the \
         two ledgers spend adds up",
        now.url
    ))
}
