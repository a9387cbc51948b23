//! The stage as a whole: pins, budget, and the steps of Algorithm 2 in their order.

use std::collections::{HashMap, HashSet};

use chrono::Utc;
use lake::{Begin, Claim, CorpusTerms, Input, Manifest, PrivateRoot, RunHandle, Table, Zone, layout, manifest};
use privacy::histogram::VotingMechanism;
use privacy::keyed::Context;
use stage::progress::PrivateProgress;
use stage::{Failure, Summary};

use crate::ballot;
use crate::compare;
use crate::config::{Args, Config};
use crate::embeddings::{Whose, for_each_chunk};
use crate::error::VoteError;
use crate::kmeans::{self, Assignment};
use crate::matrix::Matrix;
use crate::pca::{Covariance, PcaError};
use crate::provenance::{Embedded, OF_CORPUS, OF_TEXTS, embedded, same_encoder};
use crate::publish::{Histogram, Publisher};
use crate::resample::{allocate, choose};
use crate::space::Space;

const STAGE: &str = "vote";

/// The stage: settings from `args` to a summary.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = Config::new(&args)?;
    let mechanism = VotingMechanism::new(config.sigma).map_err(VoteError::from)?;
    let (private, release) = args.common.roots().await?;
    // PRIVACY: under a release root that does not know it was dropped, it would vote again under its old reservation.
    manifest::refuse_dropped(&private, &args.common.run).await?;
    let inputs = Inputs::find(&private, &release, &args.common.run, &config).await?;
    inputs.check(&config).await?;
    let terms = CorpusTerms::read(&private, &config.corpus).await?;
    let (unit, use_of_it) = (&terms.privacy_unit, (args.common.run.as_str(), STAGE));
    ledger::check(&private, &config.corpus, unit, use_of_it, &mechanism.event()).await.map_err(VoteError::from)?;
    let handle = match manifest::begin(&release, inputs.claim(&args.common.run, &config)?).await? {
        Begin::Done(manifest) => return summary(&args, &config, &manifest, true),
        Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
    };
    let publisher = Publisher::new(&release, &args.common.run);
    let manifest = vote(&private, &publisher, handle, &config, &inputs, &mechanism, args.delta).await?;
    summary(&args, &config, &manifest, false)
}

/// Algorithm 2.
async fn vote<Z: Zone>(
    private: &PrivateRoot,
    publisher: &Publisher,
    handle: RunHandle<Z>,
    config: &Config,
    inputs: &Inputs,
    mechanism: &VotingMechanism,
    delta: Option<f64>,
) -> Result<Manifest, VoteError> {
    let run = handle.claim.run.clone();
    // What is public comes first, so that public inputs which must be refused cost no budget. All of it follows from
    // public vectors and settings that the run's claim binds: it may stand where the ledger then refuses.
    let (space, stored) = find_space(publisher, config, inputs).await?;
    let (ids, assignment) = assign(&space, &inputs.texts).await?;
    let base = match &inputs.baseline {
        Some(baseline) => Some(assign(&space, baseline).await?.1.counts(space.bins())),
        None => None,
    };
    let bins = publisher.clusters(&ids, &assignment).await?;
    let supply = Assignment { bins: bins.clone(), squared_distances: Vec::new() }.counts(space.bins());

    let identity = inputs.identity(&handle.claim).await?;
    // PRIVACY: the budget comes before the votes. Until it is reserved, of what is private only the digests are taken
    // that bind the reservation to its inputs, and they stay in the private root; no vote is formed.
    let reservation =
        ledger::reserve(private, &inputs.request(private, &run, config, mechanism, &identity).await?).await?;

    if publisher.stored_histogram().await?.is_none() {
        let _progress = PrivateProgress::new("voting");
        let key = ledger::noise_key(private).await?;
        let centroids = blake3::hash(&stored);
        bind(private, &run, &centroids).await?;
        // The bins belong to the context: with others, the same noise would cover other counts.
        let context =
            Context::new("vote").field("identity", identity.as_bytes()).field("centroids", centroids.as_bytes());
        let (table, version) = (&inputs.votes.table, inputs.votes.embedded.version);
        let votes = ballot::hold(mechanism, &key, &context, &space, table, version).await?;
        publisher.histogram(&votes, &supply, config.target).await?;
    }
    let histogram =
        publisher.stored_histogram().await?.ok_or(VoteError::Bug("a histogram that was written is gone"))?;
    let taken = choose(&ids, &bins, &histogram.selected, config.seed)?;
    let bin_of: HashMap<&str, u32> =
        (0..ids.len()).filter(|&row| taken[row]).map(|row| (ids[row].as_str(), bins[row])).collect();
    publisher.selected(&inputs.candidates, inputs.texts.embedded.source.1, &bin_of).await?;
    ledger::settle(private, &reservation).await?;

    comparison(private, &run, &space, inputs, base, &histogram).await?;
    let budget = ledger::read(private, &config.corpus).await?.budget();
    let delta = delta.or(budget.map(|budget| budget.delta));
    let facts = facts(config, mechanism, delta, &space, &histogram)?;
    Ok(handle.finish(publisher.outputs().await?, facts).await?)
}

/// Binds the run's votes to the centroids that they are first cast on: votes on others, whether k-means came out
/// otherwise or somebody replaced them, would draw a second sample of noise for one reservation.
async fn bind(private: &PrivateRoot, run: &str, centroids: &blake3::Hash) -> Result<(), VoteError> {
    let path = format!("{}/centroids.blake3", layout::working(run, STAGE));
    let digest = centroids.to_hex();
    if private.put_if_absent(&path, digest.as_bytes().to_vec().into()).await? {
        return Ok(());
    }
    if private.get(&path).await? == digest.as_bytes() {
        return Ok(());
    }
    let place = format!("{}/{path}", private.url());
    let help =
        "restore the run's centroids from the store's versions, or vote under a new --run, which is paid for anew";
    Err(VoteError::input(&place, "the run's votes were cast on other centroids", help))
}

/// A table of embeddings, and where it comes from.
struct Embeddings {
    table: Table,
    embedded: Embedded,
}

impl Embeddings {
    async fn find<Z: Zone>(zone: &Z, run: &str, stage: (&str, &str)) -> Result<Self, VoteError> {
        let embedded = embedded(zone, run, stage).await?;
        Ok(Self { table: zone.table(&layout::embeddings(run)), embedded })
    }
}

/// Everything that is read, pinned.
struct Inputs {
    candidates: Table,
    texts: Embeddings,
    corpus: Table,
    votes: Embeddings,
    baseline: Option<Embeddings>,
}

impl Inputs {
    async fn find<Z: Zone>(private: &PrivateRoot, release: &Z, run: &str, config: &Config) -> Result<Self, VoteError> {
        let baseline = match &config.baseline_run {
            Some(run) => Some(Embeddings::find(release, run, OF_TEXTS).await?),
            None => None,
        };
        Ok(Self {
            candidates: release.table(&config.candidates),
            texts: Embeddings::find(release, run, OF_TEXTS).await?,
            corpus: private.table(&layout::corpus(&config.corpus)),
            votes: Embeddings::find(private, run, OF_CORPUS).await?,
            baseline,
        })
    }

    /// What can be refused before anything is claimed, reserved or read.
    async fn check(&self, config: &Config) -> Result<(), VoteError> {
        let (texts, corpus) = (&self.texts.embedded.source, &self.votes.embedded.source);
        if texts.0 != config.candidates {
            return Err(VoteError::Usage(format!(
                "--candidates {}: this run embedded {}\nhelp: name that table, or embed the other in another --run",
                config.candidates, texts.0
            )));
        }
        if corpus.0 != layout::corpus(&config.corpus) {
            return Err(VoteError::Usage(format!(
                "--corpus {}: this run embedded {}\nhelp: votes are paid from the ledger of the corpus that was embedded",
                config.corpus, corpus.0
            )));
        }
        same_encoder((self.texts.table.url(), &self.texts.embedded), (self.votes.table.url(), &self.votes.embedded))?;
        if let Some(baseline) = &self.baseline {
            same_encoder((baseline.table.url(), &baseline.embedded), (self.texts.table.url(), &self.texts.embedded))?;
        }
        let rows = self.texts.table.count(self.texts.embedded.version).await?;
        if rows != self.candidates.count(texts.1).await? {
            return Err(incomplete(&self.texts.table));
        }
        // PRIVACY: compared here, told nowhere.
        if self.votes.table.count(self.votes.embedded.version).await? != self.corpus.count(corpus.1).await? {
            return Err(incomplete(&self.votes.table));
        }
        for (flag, asked) in [("--clusters", config.clusters as u64), ("--target", config.target)] {
            if asked > rows {
                return Err(VoteError::Usage(format!(
                    "{flag} {asked}: there are {rows} synthetic rows\nhelp: lower {flag}, or synthesize more"
                )));
            }
        }
        Ok(())
    }

    /// PRIVACY: this goes to the release zone, so private inputs come without a digest. The corpus is pinned by its
    /// version. Its embeddings are not: their version counts commits, and so records; the private manifest of embed
    /// pins them, and a reservation and the noise are bound to their digest.
    fn claim(&self, run: &str, config: &Config) -> Result<Claim, VoteError> {
        let input =
            |name: &str, location: String, version| Input { name: name.to_owned(), location, version, digest: None };
        let embeddings = layout::embeddings(run);
        let (texts, votes) = (&self.texts.embedded, &self.votes.embedded);
        let mut inputs = vec![
            input("candidates", texts.source.0.clone(), Some(texts.source.1)),
            input("embeddings", embeddings.clone(), Some(texts.version)),
            input("corpus", votes.source.0.clone(), Some(votes.source.1)),
            input("corpus-embeddings", embeddings, None),
        ];
        if let (Some(baseline), Some(run)) = (&self.baseline, &config.baseline_run) {
            let version = Some(baseline.embedded.version);
            inputs.push(input("baseline-embeddings", layout::embeddings(run), version));
        }
        Ok(Claim {
            run: run.to_owned(),
            stage: STAGE.to_owned(),
            shard: None,
            inputs,
            config: serde_json::to_value(config).map_err(|_| VoteError::Bug("a configuration that is not JSON"))?,
            seeds: vec![config.seed],
            binary: stage::binary(STAGE),
            started: Utc::now(),
            command: stage::command(),
        })
    }

    /// Run, settings and inputs with their digests: what a reservation and the noise are bound to.
    /// PRIVACY: it depends on the corpus's content, so it stays in the private root.
    async fn identity(&self, claim: &Claim) -> Result<String, VoteError> {
        let digests = [
            self.corpus.digest(self.votes.embedded.source.1).await?,
            self.votes.table.digest(self.votes.embedded.version).await?,
            self.texts.table.digest(self.texts.embedded.version).await?,
        ];
        let identity = serde_json::json!([claim.run, claim.stage, claim.config, claim.inputs, digests]);
        Ok(blake3::hash(identity.to_string().as_bytes()).to_hex().to_string())
    }

    async fn request(
        &self,
        private: &PrivateRoot,
        run: &str,
        config: &Config,
        mechanism: &VotingMechanism,
        identity: &str,
    ) -> Result<ledger::Request, VoteError> {
        let terms = CorpusTerms::read(private, &config.corpus).await?;
        Ok(ledger::Request {
            corpus: config.corpus.clone(),
            version: self.votes.embedded.source.1,
            unit: terms.privacy_unit,
            conditions: terms.conditions,
            run: run.to_owned(),
            stage: STAGE.to_owned(),
            event: mechanism.event(),
            fingerprint: identity.to_owned(),
        })
    }
}

fn incomplete(table: &Table) -> VoteError {
    let problem = "it does not hold a vector for every row of the table that was embedded";
    VoteError::input(table.url(), problem, "run doppel-embed to its end, under another --run if the table grew since")
}

/// The stored space, made first where there is none; with its bytes.
async fn find_space(
    publisher: &Publisher,
    config: &Config,
    inputs: &Inputs,
) -> Result<(Space, bytes::Bytes), VoteError> {
    if publisher.stored_space().await?.is_none() {
        publisher.space(&make_space(config, &inputs.texts).await?).await?;
    }
    publisher.stored_space().await?.ok_or(VoteError::Bug("centroids that were written are gone"))
}

/// Principal components and centroids of the synthetic embeddings, read twice: for their covariance and to project.
async fn make_space(config: &Config, texts: &Embeddings) -> Result<Space, VoteError> {
    let (table, version) = (&texts.table, texts.embedded.version);
    let mut covariance: Option<Covariance> = None;
    for_each_chunk(table, version, &[], Whose::Public(None), |chunk| {
        covariance.get_or_insert_with(|| Covariance::new(chunk.vectors.columns())).add(&chunk.vectors);
        Ok(())
    })
    .await?;
    let pca = match covariance.map(|covariance| covariance.components(config.variance)) {
        Some(Ok(pca)) => pca,
        Some(Err(PcaError::Decomposition)) => return Err(VoteError::Bug("a covariance without eigenvalues")),
        Some(Err(PcaError::NoVariance)) | None => {
            let help = "synthesize more, and more varied, texts";
            return Err(VoteError::input(table.url(), "its vectors do not differ", help));
        }
    };
    let mut projected = Matrix::new(pca.output_columns());
    for_each_chunk(table, version, &[], Whose::Public(Some(pca.input_columns())), |chunk| {
        projected.extend(pca.project(&chunk.vectors).values());
        Ok(())
    })
    .await?;
    let plan = config.plan();
    let clustering = tokio::task::spawn_blocking(move || kmeans::fit(&projected, &plan))
        .await
        .map_err(|_| VoteError::Bug("clustering panicked"))?;
    tracing::info!(
        components = pca.output_columns(),
        iterations = clustering.iterations,
        inertia = clustering.inertia,
        "clustered"
    );
    Ok(Space::new(pca, clustering))
}

/// Ids and bins of all synthetic rows.
async fn assign(space: &Space, texts: &Embeddings) -> Result<(Vec<String>, Assignment), VoteError> {
    let mut ids = Vec::new();
    let mut all = Assignment { bins: Vec::new(), squared_distances: Vec::new() };
    let whose = Whose::Public(Some(space.pca.input_columns()));
    for_each_chunk(&texts.table, texts.embedded.version, &["id"], whose, |chunk| {
        let assignment = space.assign(&chunk.vectors);
        all.bins.extend(assignment.bins);
        all.squared_distances.extend(assignment.squared_distances);
        ids.extend(chunk.columns.iter().flatten().flatten().map(str::to_owned));
        Ok(())
    })
    .await?;
    let unique: HashSet<&str> = ids.iter().map(String::as_str).collect();
    if unique.len() != ids.len() {
        let help = "ids must be unique, since rows are selected by them";
        return Err(VoteError::input(texts.table.url(), "an id occurs twice", help));
    }
    Ok((ids, all))
}

/// The private comparison with test records.
async fn comparison(
    private: &PrivateRoot,
    run: &str,
    space: &Space,
    inputs: &Inputs,
    base: Option<Vec<u64>>,
    histogram: &Histogram,
) -> Result<(), VoteError> {
    let _progress = PrivateProgress::new("comparing with test records");
    let (votes, version) = (&inputs.votes.table, inputs.votes.embedded.version);
    let mut test = vec![0; space.bins()];
    for (_, bin) in ballot::votes(space, votes, version, "test").await?.expose() {
        // A void vector has no bin.
        if let Some(count) = test.get_mut(*bin) {
            *count += 1;
        }
    }
    let mut sets: Vec<(&str, Vec<u64>)> = base.into_iter().map(|base| ("base", base)).collect();
    sets.push(("synthetic", histogram.synthetic.clone()));
    sets.push(("selected", histogram.selected.clone()));
    compare::write(private, run, &test, &sets).await
}

/// What the manifest says besides: all of it public, from noised counts and synthetic rows.
fn facts(
    config: &Config,
    mechanism: &VotingMechanism,
    delta: Option<f64>,
    space: &Space,
    histogram: &Histogram,
) -> Result<serde_json::Value, VoteError> {
    let allocation = allocate(config.target, &histogram.noisy, &histogram.synthetic);
    let epsilon = delta.map(|delta| privacy::epsilon(&[mechanism.event()], delta)).transpose()?;
    Ok(serde_json::json!({
        "adjacency": "add_or_remove_one",
        "events": [mechanism.event()],
        "epsilon": epsilon.map(|epsilon| epsilon.pld),
        "delta": delta,
        "bins": space.bins(),
        "components": space.pca.output_columns(),
        "explained_variance": space.pca.explained,
        "inertia": space.inertia,
        "iterations": space.iterations,
        "selected": histogram.selected.iter().sum::<u64>(),
        "target": config.target,
        "ran_out": { "bins": allocation.ran_out, "rows": allocation.shortfall },
    }))
}

fn summary(args: &Args, config: &Config, manifest: &Manifest, already: bool) -> Result<Summary, Failure> {
    let facts = &manifest.facts;
    let done = if already { "done already; " } else { "" };
    let number = |name: &str| facts[name].as_u64().unwrap_or(0);
    let empty = facts["ran_out"]["bins"].as_array().map_or(0, Vec::len);
    let mut text = format!(
        "vote: {done}{} of {} rows selected over {} bins of {} components; {empty} bins ran out, {} rows short of their share",
        number("selected"),
        config.target,
        number("bins"),
        number("components"),
        facts["ran_out"]["rows"].as_u64().unwrap_or(0),
    );
    let mut json = serde_json::json!({
        "stage": STAGE, "run": manifest.claim.run, "already_done": already, "corpus": config.corpus, "facts": facts,
        "outputs": manifest.outputs,
    });
    if let Some(delta) = args.delta {
        let mechanism = VotingMechanism::new(config.sigma).map_err(VoteError::from)?;
        let epsilon = privacy::epsilon(&[mechanism.event()], delta).map_err(VoteError::from)?;
        json["epsilon"] = serde_json::json!({ "pld": epsilon.pld, "rdp": epsilon.rdp, "delta": delta });
        text.push_str(&format!("; ε = {:.3} at δ = {delta:e} for this stage alone", epsilon.pld));
    }
    Ok(Summary { text, json })
}
