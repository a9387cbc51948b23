//! What the embeddings are of, by the manifests of the stages that made them.
//!
//! Votes of one corpus must not be paid from the ledger of another, and distances between vectors of two encoders mean
//! nothing; both are told apart here, before anything is read.

use lake::{Claim, Input, Manifest, Zone, manifest};

use crate::error::VoteError;

/// Embeddings that a finished stage wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Embedded {
    /// Table that was embedded: path and version.
    pub source: (String, i64),
    /// Version of the embeddings.
    pub version: i64,
    /// Digest of the encoder.
    pub encoder: Option<String>,
    /// Dimension of its vectors.
    pub dimension: Option<u64>,
}

/// The stage of `embed` that embeds public texts, and the name of its input.
pub const OF_TEXTS: (&str, &str) = ("embed", "texts");
/// The stage of `embed` that embeds a corpus, and the name of its input.
pub const OF_CORPUS: (&str, &str) = ("embed-corpus", "corpus");

/// What `run` embedded in `zone`; all shards must be done.
pub async fn embedded<Z: Zone>(zone: &Z, run: &str, (stage, input): (&str, &str)) -> Result<Embedded, VoteError> {
    let unfinished = |what: String| VoteError::Input {
        table: zone.url_of(&format!("runs/{run}/stages/{stage}")),
        problem: what,
        help: "run doppel-embed to its end, for the synthetic texts and for the corpus",
    };
    let of_stage = |claim: &Claim| claim.stage == stage;
    let mut manifests = manifest::manifests_of(zone, run).await?;
    manifests.retain(|manifest| of_stage(&manifest.claim));
    let Some(first) = manifests.first() else {
        return Err(unfinished(format!("run `{run}` has not finished `{stage}`")));
    };
    let shards = first.claim.shard.map_or(1, |(_, count)| count as usize);
    if manifests.len() < shards {
        return Err(unfinished(format!("{} of {shards} shards of `{stage}` are done", manifests.len())));
    }
    let malformed = || unfinished(format!("the manifest of `{stage}` does not name its input, encoder and output"));
    let named = |name: &str| first.claim.inputs.iter().find(|input| input.name == name);
    let source = named(input).and_then(pinned).ok_or_else(malformed)?;
    let version = manifests.iter().filter_map(output_version).max().ok_or_else(malformed)?;
    let encoder = named("encoder").and_then(|encoder| encoder.digest.clone());
    Ok(Embedded { source, version, encoder, dimension: first.facts["dimension"].as_u64() })
}

/// Refuses vectors of two encoders.
pub fn same_encoder(one: (&str, &Embedded), other: (&str, &Embedded)) -> Result<(), VoteError> {
    if (&one.1.encoder, one.1.dimension) == (&other.1.encoder, other.1.dimension) {
        return Ok(());
    }
    Err(VoteError::input(
        one.0,
        format!("made by another encoder than {}", other.0),
        "embed both with the same encoder",
    ))
}

fn pinned(input: &Input) -> Option<(String, i64)> {
    Some((input.location.clone(), input.version?))
}

fn output_version(manifest: &Manifest) -> Option<i64> {
    manifest.outputs.first()?.version
}
