//! The stage: load the model, claim, reserve, read, train, publish, settle.

use lake::manifest::{self, Begin, Claim, Input, RunHandle};
use lake::{LocalFolder, PrivateRoot, ReleaseRoot, Table, Zone, layout};
use ledger::{LedgerError, Request, Reservation};
use lm::LmError;
use lm::adapter::Lora;
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::Compute;
use lm::gradients::{self, Example, example_gradients, token_losses};
use lm::template::Prompt;
use lm::tokenizer::Tokenizer;
use privacy::keyed::{Context, NoiseKey};
use privacy::training::{ClippedSum, TrainingMechanism};
use serde_json::json;
use stage::{Failure, Progress, Summary};
use tch::{Kind, Tensor};

use crate::adapter::{BaselineAdapter, PrivateAdapter, Training, Update, check_learned, is_finite};
use crate::args::{Args, Config, Mechanism};
use crate::checkpoint::Checkpoints;
use crate::corpus::{self, Encoding, Splits};
use crate::failure;
use crate::step::{Limits, sample, sum_gradients};
use crate::{loss, publish};

/// Runs the stage.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = args.config()?;
    match &config.mechanism {
        Mechanism::Private(mechanism) => {
            let (private, release) = args.common.roots().await?;
            // PRIVACY: its reservation stands and its noise is keyed, so under a release root that does not know it was
            // dropped it would train again, for free and under equal noise.
            manifest::refuse_dropped(&private, &args.common.run).await?;
            let base = Base::open(&args, &config, &private).await?;
            let use_of_it = (args.common.run.as_str(), config.mechanism.stage());
            ledger::check(&private, &config.corpus, &base.unit, use_of_it, &mechanism.event())
                .await
                .map_err(refused)?;
            let facts = facts(&args, mechanism, &private).await?;
            let Some((model, handle)) = base.begin(&release).await? else {
                return Ok(summary(&args, &config, true));
            };
            train_privately(mechanism, base, model, &release, handle, facts).await?;
        }
        Mechanism::Baseline { expected_batch_size, .. } => {
            let private = args.common.private_root().await?;
            let base = Base::open(&args, &config, &private).await?;
            let Some((model, handle)) = base.begin(&private).await? else {
                return Ok(summary(&args, &config, true));
            };
            train_baseline(*expected_batch_size, base, model, handle).await?;
        }
    }
    Ok(summary(&args, &config, false))
}

async fn train_privately(
    mechanism: &TrainingMechanism,
    base: Base<'_>,
    model: Model,
    release: &ReleaseRoot,
    handle: RunHandle<ReleaseRoot>,
    mut facts: serde_json::Value,
) -> Result<(), Failure> {
    let fingerprint = base.fingerprint(&handle.claim, model.decoder.compute).await?;
    let reservation = reserve(mechanism, &base, &handle.claim, &fingerprint).await?;
    let setting = Setting::read(base, model, &handle.claim, fingerprint).await?;
    let mut adapter = PrivateAdapter::new(setting.resume().await?);
    let progress = Progress::public("train", "steps", mechanism.steps());
    progress.resume(adapter.training().steps);
    for step in adapter.training().steps..mechanism.steps() {
        let sum = setting.sum_gradients(step, &adapter.training().lora)?;
        let gradient = mechanism.release(&setting.key, &setting.context, step, sum).map_err(accounting)?;
        adapter.apply(&gradient, setting.update(step)).map_err(failure)?;
        progress.advance(1);
        setting.save(adapter.training()).await?;
    }
    // What is stored counts: a copy of this stage that rounds otherwise may have been the first to end.
    let adapter = PrivateAdapter::new(setting.resume().await?);
    setting.conclude(adapter.training()).await?;
    ledger::settle(setting.base.private, &reservation).await.map_err(refused)?;
    let output = publish::publish(release, &handle.claim.run, claimed_model(&handle.claim)?, &adapter).await?;
    facts["steps_taken"] = adapter.training().steps.into();
    handle.finish(vec![output], facts).await?;
    Ok(())
}

async fn train_baseline(
    expected_batch_size: f64,
    base: Base<'_>,
    model: Model,
    handle: RunHandle<PrivateRoot>,
) -> Result<(), Failure> {
    let fingerprint = base.fingerprint(&handle.claim, model.decoder.compute).await?;
    let setting = Setting::read(base, model, &handle.claim, fingerprint).await?;
    let mut adapter = BaselineAdapter::new(setting.resume().await?);
    let steps = setting.base.config.mechanism.steps();
    let progress = Progress::public("train without privacy", "steps", steps);
    progress.resume(adapter.training().steps);
    for step in adapter.training().steps..steps {
        let sum = setting.sum_gradients(step, &adapter.training().lora)?;
        adapter.apply(&sum, expected_batch_size, setting.update(step)).map_err(failure)?;
        progress.advance(1);
        setting.save(adapter.training()).await?;
    }
    let adapter = BaselineAdapter::new(setting.resume().await?);
    setting.conclude(adapter.training()).await?;
    let Base { private, .. } = setting.base;
    let (run, model) = (&handle.claim.run, claimed_model(&handle.claim)?);
    let output = publish::publish_baseline(private, run, model, &adapter).await?;
    handle.finish(vec![output], json!({ "sampler": "poisson", "private": false })).await?;
    Ok(())
}

/// What was asked for, and the frozen inputs: model files on this machine, and the corpus version to pin.
struct Base<'a> {
    args: &'a Args,
    config: &'a Config,
    private: &'a PrivateRoot,
    checkpoint: Checkpoint,
    model_digest: String,
    corpus: Table,
    corpus_version: i64,
    /// The corpus's privacy unit.
    unit: String,
    _folder: LocalFolder,
}

impl<'a> Base<'a> {
    async fn open(args: &'a Args, config: &'a Config, private: &'a PrivateRoot) -> Result<Self, Failure> {
        let corpus = private.table(&layout::corpus(&config.corpus));
        let corpus_version = corpus.pin().await?;
        // partition writes the terms when the records stand. Before, there is a version without records, and a run that
        // was bound to it would pay for nothing.
        let unit = lake::CorpusTerms::read(private, &config.corpus).await?.privacy_unit;
        if corpus.count(corpus_version).await? == 0 {
            let help = "run partition to its end, on an input with instructions";
            return Err(Failure::Input(format!(
                "{}: version {corpus_version} has no rows\nhelp: {help}",
                corpus.url()
            )));
        }
        let folder = lake::fetch_folder(&args.model, &args.common.storage()).await?;
        let checkpoint = Checkpoint::open(folder.path()).map_err(failure)?;
        let model_digest = checkpoint.digest().map_err(failure)?;
        Ok(Self { args, config, private, checkpoint, model_digest, corpus, corpus_version, unit, _folder: folder })
    }

    /// Claims the run in `zone`, once corpus and model are known to work with the settings; `None` where it is done
    /// already.
    async fn begin<Z: Zone>(&self, zone: &Z) -> Result<Option<(Model, RunHandle<Z>)>, Failure> {
        let claim = self.claim()?;
        if manifest::find(zone, &claim.run, &claim.stage, None).await?.is_some() {
            // Done already, or a conflict with what was done: `begin` tells which.
            if let Begin::Done(_) = manifest::begin(zone, claim.clone()).await? {
                return Ok(None);
            }
        }
        // Before the claim: a run id must not be bound to settings that cannot work.
        self.check_size(zone, &claim).await?;
        let model = Model::load(self).map_err(failure)?;
        match manifest::begin(zone, claim).await? {
            Begin::Done(_) => Ok(None),
            Begin::Fresh(handle) | Begin::Resumed(handle) => Ok(Some((model, handle))),
        }
    }

    /// Checks the version that will be read: of a run that goes on, the one that it was begun with.
    async fn check_size<Z: Zone>(&self, zone: &Z, claim: &Claim) -> Result<(), Failure> {
        let claims = manifest::claims_of(zone, &claim.run).await?;
        let earlier = claims.iter().find(|earlier| earlier.stage == claim.stage);
        let version = corpus_version(earlier.unwrap_or(claim))?;
        corpus::check_size(&self.corpus, version, self.args.expected_batch_size).await
    }

    fn claim(&self) -> Result<Claim, Failure> {
        let input = |name: &str, location: &str, version, digest: Option<&String>| Input {
            name: name.into(),
            location: location.into(),
            version,
            digest: digest.cloned(),
        };
        Ok(Claim {
            run: self.args.common.run.clone(),
            stage: self.config.mechanism.stage().into(),
            shard: None,
            // PRIVACY: a digest of the corpus would let anyone confirm a guess of it, so the pin is the version alone.
            inputs: vec![
                input("corpus", &layout::corpus(&self.config.corpus), Some(self.corpus_version), None),
                input("model", stage::base_name(&self.args.model), None, Some(&self.model_digest)),
            ],
            config: serde_json::to_value(self.config).map_err(|error| Failure::Bug(error.to_string()))?,
            seeds: vec![self.config.seed],
            binary: stage::binary("doppel-train"),
            started: chrono::Utc::now(),
            command: stage::command(),
        })
    }

    /// BLAKE3 over run, settings, inputs with their digests, and the device and precision that `auto` came to mean:
    /// whatever differs, the noise is fresh, and neither a reservation nor a checkpoint is taken up again.
    ///
    /// PRIVACY: it depends on the corpus's content, so it stays in the private root. For this digest the corpus is read
    /// before the reservation, which is bound to it; but for [`corpus::check_size`], nothing else is computed from a
    /// record before.
    async fn fingerprint(&self, claim: &Claim, compute: Compute) -> Result<String, Failure> {
        let version = corpus_version(claim)?;
        let corpus = self.corpus.digest(version).await?;
        Ok(plan_digest(claim, &json!([version, corpus, self.model_digest]), compute))
    }
}

/// What [`Base::fingerprint`] says. Of the device its kind alone: another one of that kind may take up the run.
fn plan_digest(claim: &Claim, inputs: &serde_json::Value, compute: Compute) -> String {
    let device = if compute.device.is_cuda() { "cuda" } else { "cpu" };
    let kind = if compute.kind == Kind::BFloat16 { "bf16" } else { "f32" };
    let identity = json!([claim.run, claim.stage, claim.config, inputs, device, kind]);
    blake3::hash(identity.to_string().as_bytes()).to_hex().to_string()
}

/// The model, and all else that must work with the settings before a run id is bound or anything is reserved.
struct Model {
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: Prompt,
    initial: Lora,
}

impl Model {
    fn load(base: &Base) -> Result<Self, LmError> {
        let (args, config, checkpoint) = (base.args, base.config, &base.checkpoint);
        let compute = Compute::resolve(args.device, args.dtype)?;
        let tokenizer = checkpoint.tokenizer()?;
        let architecture = checkpoint.decoder_config()?;
        let prompt = Prompt::new(config.template, &tokenizer, &architecture)?;
        check_block_length(config.block_length, prompt.prefix.len(), architecture.max_positions)?;
        let decoder = Decoder::load(checkpoint, compute)?;
        // The same mistakes would end the run after the reservation otherwise, some of them on certain records alone.
        decoder.check_tokens(prompt.prefix.iter().chain([&prompt.end]))?;
        tokenizer.check_fits(architecture.vocab_size)?;
        let initial = new_lora(config, &decoder)?;
        let model = Self { decoder, tokenizer, prompt, initial };
        let example = model.public_example(config)?;
        match has_gradients(&model.decoder, &after_one_step(&model.initial, config)?, &example, config.block_length)? {
            true => Ok(model),
            false => Err(LmError::Malformed(format!(
                "{}: on a short text, its loss or the adapter's gradients are not finite, so it cannot be trained\n\
                 help: check the model's files, name another --dtype, or lower --alpha and --learning-rate",
                args.model
            ))),
        }
    }

    fn encoding(&self, config: &Config) -> Encoding<'_> {
        let (block_length, seed) = (config.block_length, config.seed);
        Encoding { tokenizer: &self.tokenizer, prompt: &self.prompt, block_length, seed }
    }

    /// An example that is no record.
    fn public_example(&self, config: &Config) -> Result<Example, LmError> {
        Ok(self.encoding(config).example(self.tokenizer.encode("Where do rivers begin?", false)?))
    }
}

/// `initial` as the first step leaves it, which moves each parameter by the learning rate: B is zero before, and with it
/// the gradient of A.
fn after_one_step(initial: &Lora, config: &Config) -> Result<Lora, LmError> {
    let rate = config.learning_rate(0);
    let moved = |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.f_add_scalar(rate)?));
    let tensors = initial.tensors.iter().map(moved).collect::<Result<_, LmError>>()?;
    Ok(Lora { config: initial.config.clone(), tensors })
}

/// Whether the loss of `example` and its gradients are finite. Where none are, every unit counts as zero, and the budget
/// would buy noise alone.
fn has_gradients(decoder: &Decoder, lora: &Lora, example: &Example, block_length: usize) -> Result<bool, LmError> {
    let found = example_gradients(decoder, lora, std::slice::from_ref(example), block_length)?;
    for values in found.gradients.iter().chain([&found.losses]) {
        if !is_finite(values)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Refuses an adapter with which the model computes no loss.
fn check_loss(decoder: &Decoder, lora: &Lora, example: &Example) -> Result<(), LmError> {
    let (losses, _) = token_losses(decoder, lora, std::slice::from_ref(example))?;
    match losses.iter().all(|loss| loss.is_finite()) {
        true => Ok(()),
        false => Err(LmError::Malformed(
            "the trained adapter: its loss on a short text is not finite, so nothing is released\n\
             help: lower --learning-rate or --alpha"
                .into(),
        )),
    }
}

fn check_block_length(block_length: usize, prefix: usize, positions: i64) -> Result<(), LmError> {
    if prefix + 1 >= block_length {
        return Err(LmError::Usage(format!(
            "--block-length {block_length}: the template alone takes {prefix} tokens\nhelp: raise --block-length"
        )));
    }
    if block_length as u64 > positions as u64 {
        return Err(LmError::Usage(format!(
            "--block-length {block_length}: the model has {positions} positions\nhelp: lower --block-length"
        )));
    }
    Ok(())
}

fn new_lora(config: &Config, decoder: &Decoder) -> Result<Lora, LmError> {
    Lora::new(config.lora(), &decoder.config, decoder.compute.device, config.seed)
}

/// Reserves what `mechanism` will spend, before anything is computed from a record but the digest in `fingerprint` and
/// whether there are as many units as a batch expects.
async fn reserve(
    mechanism: &TrainingMechanism,
    base: &Base<'_>,
    claim: &Claim,
    fingerprint: &str,
) -> Result<Reservation, Failure> {
    let terms = lake::CorpusTerms::read(base.private, &base.config.corpus).await?;
    let request = Request {
        corpus: base.config.corpus.clone(),
        version: corpus_version(claim)?,
        unit: terms.privacy_unit,
        conditions: terms.conditions,
        run: claim.run.clone(),
        stage: claim.stage.clone(),
        event: mechanism.event(),
        fingerprint: fingerprint.into(),
    };
    ledger::reserve(base.private, &request).await.map_err(refused)
}

/// Everything that a training loop needs and that does not depend on the mechanism.
struct Setting<'a> {
    base: Base<'a>,
    model: Model,
    splits: Splits,
    checkpoints: Checkpoints<'a>,
    key: NoiseKey,
    context: Context,
}

impl<'a> Setting<'a> {
    /// Reads the records that `claim` pins. A mechanism on them must be reserved by now.
    async fn read(base: Base<'a>, model: Model, claim: &Claim, fingerprint: String) -> Result<Self, Failure> {
        let key = ledger::noise_key(base.private).await.map_err(refused)?;
        let context =
            Context::new(&claim.stage).field("run", claim.run.as_bytes()).field("plan", fingerprint.as_bytes());
        let version = corpus_version(claim)?;
        let splits = corpus::read(&base.corpus, version, &model.encoding(base.config)).await?;
        let checkpoints = Checkpoints::new(base.private, &claim.run, &claim.stage, fingerprint);
        Ok(Self { base, model, splits, checkpoints, key, context })
    }

    /// The state to go on from: that of the newest checkpoint, or the first, whose loss is recorded.
    async fn resume(&self) -> Result<Training, Failure> {
        let fresh = new_lora(self.base.config, &self.model.decoder).map_err(failure)?;
        let training = self.checkpoints.resume(Training::new(fresh)).await?;
        if training.steps == 0 {
            self.record_loss(&training).await?;
        }
        Ok(training)
    }

    /// Draws the units of `step` and sums their gradients at `lora`.
    fn sum_gradients(&self, step: u64, lora: &Lora) -> Result<ClippedSum, Failure> {
        let config = self.base.config;
        let units =
            sample(&config.mechanism, &self.key, &self.context, step, &self.splits.train).map_err(accounting)?;
        let limits = Limits { block_length: config.block_length, micro_batch_tokens: self.micro_batch_tokens() };
        sum_gradients(&self.model.decoder, lora, &config.mechanism, &units, step, limits).map_err(failure)
    }

    fn micro_batch_tokens(&self) -> usize {
        self.base.args.micro_batch_tokens.unwrap_or_else(|| gradients::usual_tokens(&self.model.decoder))
    }

    fn update(&self, step: u64) -> Update {
        let config = self.base.config;
        Update { learning_rate: config.learning_rate(step), weight_decay: config.weight_decay }
    }

    /// Writes a checkpoint where one is due, after the last step in any case.
    async fn save(&self, training: &Training) -> Result<(), Failure> {
        let last = training.steps == self.base.config.mechanism.steps();
        if last {
            self.checkpoints.save_last(training).await?;
        } else if training.steps.is_multiple_of(self.base.args.checkpoint_every) {
            self.checkpoints.save(training).await?;
        }
        Ok(())
    }

    /// Records the last loss, and refuses an adapter that did not learn or that the model computes nothing with.
    async fn conclude(&self, training: &Training) -> Result<(), Failure> {
        self.record_loss(training).await?;
        let (model, config, lora) = (&self.model, self.base.config, &training.lora);
        check_learned(&model.initial, lora, &config.mechanism).map_err(failure)?;
        let example = model.public_example(config).map_err(failure)?;
        check_loss(&model.decoder, lora, &example).map_err(failure)
    }

    /// Records the validation loss after `training`'s steps in the private root.
    async fn record_loss(&self, training: &Training) -> Result<(), Failure> {
        let Base { args, config, private, .. } = self.base;
        let units = &self.splits.validation;
        let mean =
            loss::mean(&self.model.decoder, &training.lora, units, self.micro_batch_tokens()).map_err(failure)?;
        if let Some(mean) = mean {
            loss::record(private, &args.common.run, config.mechanism.stage(), training.steps, &mean).await?;
        }
        Ok(())
    }
}

/// What the manifest says of a release: the mechanism as it is accounted, and its own ε at the δ of the flags, or of the
/// corpus's budget.
async fn facts(
    args: &Args,
    mechanism: &TrainingMechanism,
    private: &PrivateRoot,
) -> Result<serde_json::Value, Failure> {
    let ledger = ledger::read(private, &args.corpus).await.map_err(refused)?;
    let delta = args.delta.or(ledger.budget().map(|budget| budget.delta));
    let epsilon = delta.map(|delta| privacy::epsilon(&[mechanism.event()], delta)).transpose().map_err(accounting)?;
    Ok(json!({
        "sampler": "poisson",
        "adjacency": "add_or_remove_one",
        "events": [mechanism.event()],
        "epsilon": epsilon.map(|epsilon| epsilon.pld),
        "delta": delta,
    }))
}

fn summary(args: &Args, config: &Config, already: bool) -> Summary {
    let run = &args.common.run;
    let zone = if matches!(config.mechanism, Mechanism::Private(_)) { "release" } else { "private" };
    let adapter = layout::adapter(run);
    let text = match already {
        true => format!("train: run {run} is done already; its adapter is in the {zone} zone at {adapter}"),
        false => format!("train: the adapter is in the {zone} zone at {adapter}"),
    };
    let json = json!({
        "stage": config.mechanism.stage(), "run": run, "already_done": already, "zone": zone,
        "adapter": adapter,
    });
    Summary { text, json }
}

fn corpus_version(claim: &Claim) -> Result<i64, Failure> {
    let pin = claim.inputs.iter().find(|input| input.name == "corpus").and_then(|input| input.version);
    pin.ok_or_else(|| Failure::Input(format!("claim of run {}: no version of the corpus is pinned", claim.run)))
}

/// The base model's name as it was claimed: a rerun may find the same model under another.
fn claimed_model(claim: &Claim) -> Result<&str, Failure> {
    let model = claim.inputs.iter().find(|input| input.name == "model").map(|input| input.location.as_str());
    model.ok_or_else(|| Failure::Input(format!("claim of run {}: no model is named", claim.run)))
}

fn refused(error: LedgerError) -> Failure {
    Failure::coded(error.exit_code(), error.to_string())
}

fn accounting(error: privacy::AccountingError) -> Failure {
    Failure::Usage(error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use tch::Device;

    use super::*;
    use crate::testing;

    #[tokio::test]
    async fn a_run_that_was_dropped_is_refused_whichever_release_root_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let root = |zone: &str| format!("--{zone}={}", folder.path().join(zone).display());
        let flags = "--run one --corpus chats --model llama --expected-batch-size 1 --records 2 --steps 1";
        let flags = std::iter::once("doppel-train").chain(flags.split_whitespace()).map(str::to_owned);
        let flags = flags.chain([root("private"), root("release"), "--noise-multiplier=1".into()]);
        let args = Args::try_parse_from(flags).unwrap();
        let told = run(args.clone()).await.unwrap_err().to_string();
        assert!(told.contains("corpora/chats"), "a run like any other: {told}");
        manifest::close(&args.common.private_root().await.unwrap(), "one").await.unwrap();
        let told = run(args).await.unwrap_err();
        assert!(matches!(&told, Failure::Usage(told) if told.contains("run one was dropped")), "{told}");
    }

    #[test]
    fn a_plan_is_bound_to_the_kind_of_device_and_the_precision() {
        let claim = Claim {
            run: "one".into(),
            stage: "train".into(),
            shard: None,
            inputs: Vec::new(),
            // What auto came to mean does not stand in the settings.
            config: json!({ "dtype": "auto" }),
            seeds: vec![0],
            binary: stage::binary("doppel-train"),
            started: chrono::Utc::now(),
            command: stage::command(),
        };
        let of = |device, kind| plan_digest(&claim, &json!([3, "c0ffee", "beef"]), Compute { device, kind });
        let mut plans = Vec::new();
        for device in [Device::Cpu, Device::Cuda(0)] {
            plans.extend([Kind::Float, Kind::BFloat16].map(|kind| of(device, kind)));
        }
        assert_eq!(plans[0], of(Device::Cpu, Kind::Float));
        assert_eq!(plans[2], of(Device::Cuda(1), Kind::Float), "another GPU of the machine");
        plans.sort();
        plans.dedup();
        assert_eq!(plans.len(), 4);
    }

    #[test]
    fn a_loss_or_a_gradient_that_is_not_finite_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, mut lora) = testing::tiny(folder.path());
        let example = testing::example(3);
        assert!(has_gradients(&decoder, &lora, &example, 32).unwrap());
        check_loss(&decoder, &lora, &example).unwrap();
        let last = lora.tensors.len() - 1;
        lora.tensors[last].1 = lora.tensors[last].1.full_like(f64::NAN);
        assert!(!has_gradients(&decoder, &lora, &example, 32).unwrap());
        let told = check_loss(&decoder, &lora, &example).unwrap_err().to_string();
        assert!(told.contains("nothing is released") && told.contains("help:"), "{told}");
    }

    #[test]
    fn after_one_step_no_tensor_is_zero() {
        let folder = tempfile::tempdir().unwrap();
        let (decoder, _) = testing::tiny(folder.path());
        let flags = "doppel-train --run one --corpus chats --model llama --expected-batch-size 1 --records 2 --steps 1 \
                     --noise-multiplier 1 --rank 2";
        let config = Args::try_parse_from(flags.split_whitespace()).unwrap().config().unwrap();
        let lora = after_one_step(&new_lora(&config, &decoder).unwrap(), &config).unwrap();
        assert!(lora.tensors.iter().all(|(_, tensor)| tensor.abs().max().double_value(&[]) > 0.0));
        let found = example_gradients(&decoder, &lora, &[testing::example(3)], 32).unwrap();
        assert!(found.gradients.iter().all(|gradient| gradient.abs().max().double_value(&[]) > 0.0));
    }

    #[test]
    fn a_block_fits_the_template_and_the_model() {
        check_block_length(64, 10, 64).unwrap();
        for (block_length, expected) in [(65, "the model has 64 positions"), (11, "the template alone takes 10 tokens")]
        {
            let told = check_block_length(block_length, 10, 64).unwrap_err().to_string();
            assert!(told.contains(expected) && told.contains("help:"), "{told}");
        }
    }
}
