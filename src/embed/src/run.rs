//! The stage: claim, load, embed, settle.

use lake::manifest::{self, Begin, Claim, Input, Manifest, RunHandle};
use lake::{LocalFolder, Output, PrivateRoot, ReleaseRoot, Zone, layout};
use lm::device::Compute;
use lm::encoder::Encoder;
use serde_json::json;
use stage::{Failure, Shard, Summary};

use crate::args::{Args, Arithmetic, Config, Of};
use crate::failure;
use crate::table::{self, Meter, Work};

/// Stage name of the vectors of public texts.
const PUBLIC: &str = "embed";
/// Stage name of the vectors of a corpus, whose claims and manifests lie in the private zone.
const CORPUS: &str = "embed-corpus";

/// Runs the stage.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = args.config()?;
    match config.of {
        Of::Synthetic => {
            let release = args.common.release_root().await?;
            embed_public(&args, &config, &release).await
        }
        Of::Corpus => {
            let private = args.common.private_root().await?;
            embed_corpus(&args, &config, &private).await
        }
    }
}

async fn embed_public(args: &Args, config: &Config, release: &ReleaseRoot) -> Result<Summary, Failure> {
    if args.table.is_none() {
        require_all_shards(release, &args.common.run).await?;
    }
    let stage = Stage { zone: release, name: PUBLIC, input: "texts", of: Of::Synthetic };
    let manifest = match stage.begin(args, config).await? {
        Started::Done(manifest) => return Ok(summary(args, &manifest, true)),
        Started::Open(open) => {
            let rows = release.table(&config.table).count(open.version).await?;
            stage.work(args, config, open, Meter::public(rows)).await?
        }
    };
    Ok(summary(args, &manifest, false))
}

async fn embed_corpus(args: &Args, config: &Config, private: &PrivateRoot) -> Result<Summary, Failure> {
    let stage = Stage { zone: private, name: CORPUS, input: "corpus", of: Of::Corpus };
    let manifest = match stage.begin(args, config).await? {
        Started::Done(manifest) => return Ok(summary(args, &manifest, true)),
        Started::Open(open) => stage.work(args, config, open, Meter::private()).await?,
    };
    Ok(summary(args, &manifest, false))
}

/// One of the two forms of this stage in its zone.
struct Stage<'a, Z: Zone> {
    zone: &'a Z,
    name: &'static str,
    input: &'static str,
    of: Of,
}

#[expect(clippy::large_enum_variant, reason = "there is one of them in a run")]
enum Started<Z: Zone> {
    Open(Open<Z>),
    Done(Manifest),
}

/// A stage that was claimed: encoder loaded, version pinned.
struct Open<Z: Zone> {
    handle: RunHandle<Z>,
    encoder: Encoder,
    version: i64,
    _folder: LocalFolder,
}

impl<Z: Zone> Stage<'_, Z> {
    async fn begin(&self, args: &Args, config: &Config) -> Result<Started<Z>, Failure> {
        let run = &args.common.run;
        let version = match self.sibling_version(run).await? {
            Some(version) => version,
            None => self.zone.table(&config.table).pin().await?,
        };
        self.check_readable(config, version).await?;
        let folder = lake::fetch_folder(&args.encoder, &args.common.storage()).await?;
        let compute = Compute::resolve(args.device, args.dtype).map_err(failure)?;
        let arithmetic = self.arithmetic(args, compute).await?;
        let encoder = Encoder::load(folder.path(), compute).map_err(failure)?;
        let config = Config { arithmetic, ..config.clone() };
        let claim = self.claim(args, &config, version, encoder.digest())?;
        let handle = match manifest::begin(self.zone, claim).await? {
            Begin::Done(manifest) => return Ok(Started::Done(manifest)),
            Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
        };
        let version = self.pinned(&handle.claim)?;
        match self.sibling_version(run).await? {
            Some(other) if other != version => Err(Failure::Usage(format!(
                "run {run}: shards of {} pinned versions {version} and {other} of {}\n\
                 help: the table grew while they started; use another --run when it is complete",
                self.name, config.table
            ))),
            _ => Ok(Started::Open(Open { handle, encoder, version, _folder: folder })),
        }
    }

    /// Refuses a table without rows or without the columns before the run is bound to it.
    async fn check_readable(&self, config: &Config, version: i64) -> Result<(), Failure> {
        let table = self.zone.table(&config.table);
        drop(table.scan(version, self.of.columns()).await?);
        match table.count(version).await? {
            0 => Err(Failure::Input(format!(
                "{}: no rows to embed\nhelp: run the stage that writes the table first, on an input with texts",
                table.url()
            ))),
            _ => Ok(()),
        }
    }

    /// The version that other shards of this run embed: all must cut the same rows into chunks.
    async fn sibling_version(&self, run: &str) -> Result<Option<i64>, Failure> {
        let claims = self.claims(run).await?;
        let versions: Vec<i64> = claims.iter().map(|claim| self.pinned(claim)).collect::<Result<_, _>>()?;
        Ok(versions.into_iter().min())
    }

    /// This stage's claims of a run.
    async fn claims(&self, run: &str) -> Result<Vec<Claim>, Failure> {
        let mut claims = manifest::claims_of(self.zone, run).await?;
        claims.retain(|claim| claim.stage == self.name);
        Ok(claims)
    }

    /// What a corpus is embedded on and by, as the claim says it; refuses to go on with one that was begun otherwise.
    ///
    /// PRIVACY: which rows a shard embeds depends on how many records stand before them. If shards differed by rounding,
    /// one more record would move the vectors of others, and their votes.
    async fn arithmetic(&self, args: &Args, compute: Compute) -> Result<Option<Arithmetic>, Failure> {
        if self.of != Of::Corpus {
            return Ok(None);
        }
        let run = &args.common.run;
        if let Some(done) = manifest::find(self.zone, run, self.name, args.shard.map(Shard::pair)).await? {
            return Ok(Arithmetic::of(&done.claim));
        }
        let mut now = Arithmetic { compute: compute.to_string(), build: Some(stage::binary("doppel-embed")) };
        for earlier in self.claims(run).await?.iter().filter_map(Arithmetic::of) {
            // What a rerun computes is compared, not voted with: it may be by a later build.
            if stage::is_rerun() {
                now.build.clone_from(&earlier.build);
            }
            if earlier != now {
                return Err(Failure::Usage(format!(
                    "run {run}: its corpus is embedded on {earlier}; this would be {now}\n\
                     help: embed all shards on machines of one kind by one build, with the same --dtype and --device, or \
                     use another --run: vectors that differ by rounding would let one record move the votes of others"
                )));
            }
        }
        Ok(Some(now))
    }

    fn pinned(&self, claim: &Claim) -> Result<i64, Failure> {
        let pin = claim.inputs.iter().find(|input| input.name == self.input).and_then(|input| input.version);
        pin.ok_or_else(|| Failure::Input(format!("claim of run {}: no version of {} is pinned", claim.run, self.input)))
    }

    fn claim(&self, args: &Args, config: &Config, version: i64, digest: &str) -> Result<Claim, Failure> {
        let encoder = Input {
            name: "encoder".into(),
            location: stage::base_name(&args.encoder).into(),
            version: None,
            digest: Some(digest.into()),
        };
        let texts =
            Input { name: self.input.into(), location: config.table.clone(), version: Some(version), digest: None };
        Ok(Claim {
            run: args.common.run.clone(),
            stage: self.name.into(),
            shard: args.shard.map(Shard::pair),
            inputs: vec![texts, encoder],
            config: serde_json::to_value(config).map_err(|error| Failure::Bug(error.to_string()))?,
            seeds: Vec::new(),
            binary: stage::binary("doppel-embed"),
            started: chrono::Utc::now(),
            command: stage::command(),
        })
    }

    /// Embeds this shard's rows and writes the manifest.
    async fn work(&self, args: &Args, config: &Config, open: Open<Z>, meter: Meter) -> Result<Manifest, Failure> {
        let output = layout::embeddings(&args.common.run);
        let work = Work {
            source: self.zone.table(&config.table),
            version: open.version,
            output: self.zone.table(&output),
            of: self.of,
            shard: args.shard.unwrap_or(Shard::WHOLE),
            transaction: stage::transaction(&args.common.run, self.name, args.shard),
            batch_tokens: args.batch_tokens.unwrap_or_else(|| open.encoder.usual_tokens()),
        };
        table::embed(&work, &open.encoder, &meter).await?;
        let version = work.output.version().await?;
        let outputs = vec![Output { name: "embeddings".into(), path: output, version }];
        let facts = json!({ "dimension": open.encoder.dimension() });
        Ok(open.handle.finish(outputs, facts).await?)
    }
}

/// Refuses to embed a sample of which shards are missing: what they add later would never be embedded.
async fn require_all_shards(release: &ReleaseRoot, run: &str) -> Result<(), Failure> {
    let finished = |manifests: &[Manifest], shard| manifests.iter().any(|manifest| manifest.claim.shard == shard);
    let mut manifests = manifest::manifests_of(release, run).await?;
    manifests.retain(|manifest| manifest.claim.stage == "synthesize");
    for claim in manifest::claims_of(release, run).await? {
        if claim.stage != "synthesize" {
            continue;
        }
        let count = claim.shard.map_or(1, |(_, count)| count);
        let shards = (0..count).map(|index| claim.shard.map(|_| (index, count)));
        if let Some(missing) = shards.into_iter().find(|shard| !finished(&manifests, *shard)) {
            let name = missing.map_or("it".to_string(), |(index, count)| format!("shard {index}/{count}"));
            return Err(Failure::Input(format!(
                "run {run}: synthesize is not done: {name} has not finished\n\
                 help: run it to its end first; its rows would be missing from the vectors"
            )));
        }
        break;
    }
    Ok(())
}

fn summary(args: &Args, manifest: &Manifest, already: bool) -> Summary {
    let run = &args.common.run;
    // PRIVACY: a version counts commits, one for each chunk of rows, so that of private vectors would tell how many
    // records there are.
    let version = manifest.outputs.first().and_then(|output| output.version);
    let (zone, version) = match args.of {
        Of::Corpus => (PrivateRoot::NAME, None),
        Of::Synthetic => (ReleaseRoot::NAME, version),
    };
    let path = layout::embeddings(run);
    let done = if already { "done already; " } else { "" };
    Summary {
        text: format!("embed: {done}the vectors are in the {zone} zone at {path}"),
        json: json!({
            "stage": manifest.claim.stage, "run": run, "already_done": already, "zone": zone, "table": path,
            "version": version, "dimension": manifest.facts.get("dimension"),
        }),
    }
}
