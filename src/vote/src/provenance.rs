//! What the embeddings are of, by the manifests of the stages that made them.
//!
//! Votes of one corpus must not be paid from the ledger of another, and distances between vectors of two encoders mean
//! nothing; both are told apart here, before anything is read, for every shard: their rows stand in one table.

use lake::{Manifest, Zone, layout, manifest};

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

/// What `run` embedded in `zone`; all shards must be done, and alike.
pub async fn embedded<Z: Zone>(zone: &Z, run: &str, (stage, input): (&str, &str)) -> Result<Embedded, VoteError> {
    let refused = |problem: String, help| {
        VoteError::input(zone.url_of(&format!("{}/{stage}", layout::stages(run))), problem, help)
    };
    let unfinished =
        |problem| refused(problem, "run doppel-embed to its end, for the synthetic texts and for the corpus");
    let nothing = || unfinished(format!("run `{run}` has not finished `{stage}`"));
    let malformed = || unfinished(format!("a manifest of `{stage}` does not name its input and output"));

    let mut manifests = manifest::manifests_of(zone, run).await?;
    manifests.retain(|manifest| manifest.claim.stage == stage);
    manifests.sort_by_key(|manifest| manifest.claim.shard);
    let shards = manifests.iter().map(|manifest| Shard::of(manifest, input));
    let shards: Vec<Shard> = shards.collect::<Option<_>>().ok_or_else(malformed)?;
    let first = shards.first().ok_or_else(nothing)?;
    let other: Vec<String> = shards.iter().filter(|shard| !shard.is_like(first)).map(Shard::name).collect();
    if !other.is_empty() {
        let problem = format!(
            "shards {} of `{stage}` differ from shard {} in the table or version that was embedded, in the encoder, \
             or in the number of shards",
            other.join(", "),
            first.name()
        );
        return Err(refused(problem, "embed one version of one table, with one encoder, under another --run"));
    }
    if !shards.iter().map(|shard| shard.index).eq(0..first.count) {
        let found: Vec<String> = shards.iter().map(Shard::name).collect();
        let found = found.join(", ");
        return Err(unfinished(format!("of {} shards of `{stage}`, each expected once, found {found}", first.count)));
    }
    // Alike but for the version that each left: the latest has the rows of all.
    shards.into_iter().map(|shard| shard.embedded).max_by_key(|embedded| embedded.version).ok_or_else(nothing)
}

/// One shard, by its manifest.
struct Shard {
    index: u32,
    count: u32,
    embedded: Embedded,
}

impl Shard {
    /// `None` where the manifest does not name its input and output.
    fn of(manifest: &Manifest, input: &str) -> Option<Self> {
        let (index, count) = manifest.claim.shard.unwrap_or((0, 1));
        let named = |name: &str| manifest.claim.inputs.iter().find(|input| input.name == name);
        let source = named(input)?;
        let embedded = Embedded {
            source: (source.location.clone(), source.version?),
            version: manifest.outputs.first()?.version?,
            encoder: named("encoder").and_then(|encoder| encoder.digest.clone()),
            dimension: manifest.facts["dimension"].as_u64(),
        };
        Some(Self { index, count, embedded })
    }

    fn name(&self) -> String {
        format!("{}/{}", self.index, self.count)
    }

    /// Whether both are parts of the same work.
    fn is_like(&self, other: &Self) -> bool {
        let version = other.embedded.version;
        self.count == other.count && Embedded { version, ..self.embedded.clone() } == other.embedded
    }
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
