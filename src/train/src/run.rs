//! The stage: reserve, read, train, publish, settle.

use std::path::Path;

use lake::manifest::{self, Begin, Claim, Input, RunHandle};
use lake::{PrivateRoot, ReleaseRoot, Zone};
use ledger::{LedgerError, Request};
use lm::LmError;
use lm::adapter::Lora;
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::Compute;
use lm::template::Prompt;
use privacy::keyed::Context;
use privacy::training::TrainingMechanism;
use serde_json::json;
use stage::{Failure, Progress, Summary};

use crate::adapter::{BaselineAdapter, PrivateAdapter, Training, Update, check_learned};
use crate::args::{Args, Config, Mechanism};
use crate::checkpoint::Checkpoints;
use crate::corpus::{self, Encoding, Splits};
use crate::step::{Limits, sample, sum_gradients};
use crate::{loss, publish};

const STAGE: &str = "train";

/// Runs the stage.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = args.config()?;
    match &config.mechanism {
        Mechanism::Private(mechanism) => {
            let (private, release) = args.common.roots().await?;
            let mechanism = mechanism.clone();
            let base = Base::open(&args, &private).await?;
            let handle = match manifest::begin(&release, base.claim(&args, &config)?).await? {
                Begin::Done(_) => return Ok(summary(&args, &config, true)),
                Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
            };
            train_privately(&args, &config, mechanism, &base, &private, &release, handle).await?;
        }
        Mechanism::Baseline { .. } => {
            let private = args.common.private_root().await?;
            let base = Base::open(&args, &private).await?;
            let handle = match manifest::begin(&private, base.claim(&args, &config)?).await? {
                Begin::Done(_) => return Ok(summary(&args, &config, true)),
                Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
            };
            train_baseline(&args, &config, &base, &private, handle).await?;
        }
    }
    Ok(summary(&args, &config, false))
}

/// The frozen inputs: model files on this machine, and the corpus version to pin.
struct Base {
    checkpoint: Checkpoint,
    model_digest: String,
    corpus_version: i64,
    corpus_url: String,
    _folder: lake::LocalFolder,
}

impl Base {
    async fn open(args: &Args, private: &PrivateRoot) -> Result<Self, Failure> {
        let corpus = private.table(&format!("corpora/{}", args.corpus));
        let corpus_version = corpus.pin().await?;
        let folder = lake::fetch_folder(&args.model, &args.common.storage()).await?;
        let checkpoint = Checkpoint::open(folder.path()).map_err(|error| failure(&error))?;
        let model_digest = checkpoint.digest().map_err(|error| failure(&error))?;
        let corpus_url = corpus.url().to_string();
        Ok(Self { checkpoint, model_digest, corpus_version, corpus_url, _folder: folder })
    }

    fn claim(&self, args: &Args, config: &Config) -> Result<Claim, Failure> {
        let input = |name: &str, location: &str, version, digest: Option<&String>| Input {
            name: name.into(),
            location: location.into(),
            version,
            digest: digest.cloned(),
        };
        Ok(Claim {
            run: args.common.run.clone(),
            stage: STAGE.into(),
            shard: None,
            // PRIVACY: a digest of the corpus would let anyone confirm a guess of it, so the pin is the version alone.
            inputs: vec![
                input("corpus", &format!("corpora/{}", config.corpus), Some(self.corpus_version), None),
                input("model", model_name(&args.model), None, Some(&self.model_digest)),
            ],
            config: serde_json::to_value(config).map_err(|error| Failure::Bug(error.to_string()))?,
            seeds: vec![config.seed],
            binary: stage::binary("doppel-train"),
            started: chrono::Utc::now(),
        })
    }

    /// BLAKE3 over run, settings, and inputs with their digests: whatever differs, the noise is fresh.
    /// PRIVACY: it depends on the corpus's content, so it stays in the private root.
    async fn fingerprint(&self, claim: &Claim, private: &PrivateRoot, corpus: &str) -> Result<String, Failure> {
        let version = corpus_version(claim)?;
        let digest = private.table(&format!("corpora/{corpus}")).digest(version).await?;
        let identity = json!([claim.run, claim.stage, claim.config, version, digest, self.model_digest]);
        Ok(blake3::hash(identity.to_string().as_bytes()).to_hex().to_string())
    }
}

/// Everything a training loop needs that does not depend on the mechanism.
struct Setting {
    decoder: Decoder,
    initial: Lora,
    splits: Splits,
    limits: Limits,
}

impl Setting {
    async fn load(
        args: &Args,
        config: &Config,
        base: &Base,
        version: i64,
        private: &PrivateRoot,
    ) -> Result<Self, Failure> {
        let compute = Compute::resolve(args.device.into(), args.dtype.into()).map_err(|error| failure(&error))?;
        let decoder = Decoder::load(&base.checkpoint, compute).map_err(|error| failure(&error))?;
        let tokenizer = base.checkpoint.tokenizer().map_err(|error| failure(&error))?;
        let prompt =
            Prompt::new(config.template.into(), &tokenizer, &decoder.config).map_err(|error| failure(&error))?;
        if prompt.prefix.len() + 1 >= config.block_length {
            return Err(Failure::Usage(format!(
                "--block-length {}: the template alone takes {} tokens\nhelp: raise --block-length",
                config.block_length,
                prompt.prefix.len()
            )));
        }
        let encoding =
            Encoding { tokenizer: &tokenizer, prompt: &prompt, block_length: config.block_length, seed: config.seed };
        let splits = corpus::read(&private.table(&format!("corpora/{}", config.corpus)), version, &encoding).await?;
        if splits.train.is_empty() {
            return Err(Failure::Input(format!(
                "{}: version {version} has no rows in its train split\nhelp: run partition on an input with instructions",
                base.corpus_url
            )));
        }
        // PRIVACY: this tells the operator one bit about the corpus's size, as the error that was asked for; no number.
        if (splits.train.len() as f64) < args.expected_batch_size {
            return Err(Failure::Input(format!(
                "{}: the train split has fewer units than the expected batch of {}\n\
                 help: lower --expected-batch-size and declare the units with --records",
                base.corpus_url, args.expected_batch_size
            )));
        }
        let initial = new_lora(config, &decoder)?;
        let limits = Limits { block_length: config.block_length, micro_batch_tokens: args.micro_batch_tokens };
        Ok(Self { decoder, initial, splits, limits })
    }

    /// Records the validation loss after `training`'s steps in the private root.
    async fn record_loss(&self, private: &PrivateRoot, run: &str, training: &Training) -> Result<(), Failure> {
        let mean = loss::mean(&self.decoder, &training.lora, &self.splits.validation, self.limits.micro_batch_tokens)
            .map_err(|error| failure(&error))?;
        if let Some(mean) = mean {
            loss::record(private, run, training.steps, &mean).await?;
        }
        Ok(())
    }
}

async fn train_privately(
    args: &Args,
    config: &Config,
    mechanism: TrainingMechanism,
    base: &Base,
    private: &PrivateRoot,
    release: &ReleaseRoot,
    handle: RunHandle<ReleaseRoot>,
) -> Result<(), Failure> {
    let run = handle.claim.run.clone();
    let version = corpus_version(&handle.claim)?;
    let fingerprint = base.fingerprint(&handle.claim, private, &config.corpus).await?;
    let terms = lake::CorpusTerms::read(private, &config.corpus).await?;
    let request = Request {
        corpus: config.corpus.clone(),
        version,
        unit: terms.privacy_unit,
        conditions: terms.conditions,
        run: run.clone(),
        stage: STAGE.into(),
        event: mechanism.event(),
        fingerprint: fingerprint.clone(),
    };
    let reservation = ledger::reserve(private, &request).await.map_err(refused)?;
    let key = ledger::noise_key(private).await.map_err(refused)?;
    let context = Context::new("train").field("run", run.as_bytes()).field("plan", fingerprint.as_bytes());

    let setting = Setting::load(args, config, base, version, private).await?;
    let checkpoints = Checkpoints::new(private, &run, &fingerprint);
    let training = checkpoints.resume(Training::new(new_lora(config, &setting.decoder)?)).await?;
    if training.steps == 0 {
        setting.record_loss(private, &run, &training).await?;
    }
    let mut adapter = PrivateAdapter::new(training);
    let progress = Progress::public("train", "steps", mechanism.steps());
    progress.resume(adapter.training().steps);
    for step in adapter.training().steps..mechanism.steps() {
        let units = sample(&config.mechanism, &key, &context, step, &setting.splits.train).map_err(accounting)?;
        let lora = &adapter.training().lora;
        let sum = sum_gradients(&setting.decoder, lora, &config.mechanism, &units, step, setting.limits)
            .map_err(|error| failure(&error))?;
        let gradient = mechanism.release(&key, &context, step, sum);
        adapter.apply(&gradient, update(config, step)).map_err(|error| failure(&error))?;
        progress.advance(1);
        if (step + 1) % args.checkpoint_every == 0 || step + 1 == mechanism.steps() {
            checkpoints.save(adapter.training()).await?;
        }
    }
    setting.record_loss(private, &run, adapter.training()).await?;
    check_learned(&setting.initial, &adapter.training().lora).map_err(Failure::Input)?;
    ledger::settle(private, &reservation).await.map_err(refused)?;
    let output = publish::publish(release, &run, model_name(&args.model), &adapter).await?;
    let ledger = ledger::read(private, &config.corpus).await.map_err(refused)?;
    let delta = args.delta.or(ledger.budget().map(|budget| budget.delta));
    handle.finish(vec![output], facts(&mechanism, delta)?).await?;
    Ok(())
}

async fn train_baseline(
    args: &Args,
    config: &Config,
    base: &Base,
    private: &PrivateRoot,
    handle: RunHandle<PrivateRoot>,
) -> Result<(), Failure> {
    let Mechanism::Baseline { steps, expected_batch_size, .. } = config.mechanism else {
        return Err(Failure::Bug("a baseline with a private mechanism".into()));
    };
    let run = handle.claim.run.clone();
    let fingerprint = base.fingerprint(&handle.claim, private, &config.corpus).await?;
    let key = ledger::noise_key(private).await.map_err(refused)?;
    let context = Context::new("train-baseline").field("run", run.as_bytes()).field("plan", fingerprint.as_bytes());
    let setting = Setting::load(args, config, base, corpus_version(&handle.claim)?, private).await?;
    let checkpoints = Checkpoints::new(private, &run, &fingerprint);
    let training = checkpoints.resume(Training::new(new_lora(config, &setting.decoder)?)).await?;
    if training.steps == 0 {
        setting.record_loss(private, &run, &training).await?;
    }
    let mut adapter = BaselineAdapter::new(training);
    let progress = Progress::public("train without privacy", "steps", steps);
    progress.resume(adapter.training().steps);
    for step in adapter.training().steps..steps {
        let units = sample(&config.mechanism, &key, &context, step, &setting.splits.train).map_err(accounting)?;
        let lora = &adapter.training().lora;
        let sum = sum_gradients(&setting.decoder, lora, &config.mechanism, &units, step, setting.limits)
            .map_err(|error| failure(&error))?;
        adapter.apply(sum, expected_batch_size, update(config, step)).map_err(|error| failure(&error))?;
        progress.advance(1);
        if (step + 1) % args.checkpoint_every == 0 || step + 1 == steps {
            checkpoints.save(adapter.training()).await?;
        }
    }
    setting.record_loss(private, &run, adapter.training()).await?;
    check_learned(&setting.initial, &adapter.training().lora).map_err(Failure::Input)?;
    let output = publish::write(private, &run, model_name(&args.model), &adapter.training().lora).await?;
    handle.finish(vec![output], json!({ "sampler": "poisson", "private": false })).await?;
    Ok(())
}

fn new_lora(config: &Config, decoder: &Decoder) -> Result<Lora, Failure> {
    Lora::new(config.lora(), &decoder.config, decoder.compute.device, config.seed).map_err(|error| failure(&error))
}

fn update(config: &Config, step: u64) -> Update {
    Update { learning_rate: config.learning_rate(step), weight_decay: config.weight_decay }
}

/// What the manifest says of a release: the mechanism as it was accounted, and its own ε at the δ of the flags, or of the
/// corpus's budget.
fn facts(mechanism: &TrainingMechanism, delta: Option<f64>) -> Result<serde_json::Value, Failure> {
    let epsilon = delta.map(|delta| privacy::epsilon(&[mechanism.event()], delta)).transpose().map_err(accounting)?;
    Ok(json!({
        "sampler": "poisson",
        "adjacency": "add_or_remove_one",
        "events": [mechanism.event()],
        "steps_taken": mechanism.steps(),
        "epsilon": epsilon.map(|epsilon| epsilon.pld),
        "delta": delta,
    }))
}

fn summary(args: &Args, config: &Config, already: bool) -> Summary {
    let run = &args.common.run;
    let zone = if matches!(config.mechanism, Mechanism::Private(_)) { "release" } else { "private" };
    let text = match already {
        true => format!("train: run {run} is done already; its adapter is in the {zone} zone at runs/{run}/adapter"),
        false => format!("train: the adapter is in the {zone} zone at runs/{run}/adapter"),
    };
    let json = json!({
        "stage": STAGE, "run": run, "already_done": already, "zone": zone, "adapter": format!("runs/{run}/adapter"),
    });
    Summary { text, json }
}

fn corpus_version(claim: &Claim) -> Result<i64, Failure> {
    let pin = claim.inputs.iter().find(|input| input.name == "corpus").and_then(|input| input.version);
    pin.ok_or_else(|| Failure::Input(format!("claim of run {}: no version of the corpus is pinned", claim.run)))
}

/// A model's name without the machine's folders.
fn model_name(url: &str) -> &str {
    Path::new(url.trim_end_matches('/')).file_name().and_then(|name| name.to_str()).unwrap_or(url)
}

/// A model's failure by what the operator can do. No variant holds text of a record.
pub(crate) fn failure(error: &LmError) -> Failure {
    match error {
        LmError::Usage(message) => Failure::Usage(message.clone()),
        LmError::Malformed(message) => Failure::Input(message.clone()),
        other => Failure::Bug(other.to_string()),
    }
}

fn refused(error: LedgerError) -> Failure {
    Failure::coded(error.exit_code(), error.to_string())
}

fn accounting(error: privacy::AccountingError) -> Failure {
    Failure::Usage(error.to_string())
}
