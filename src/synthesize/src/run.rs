//! The stage: claim, load, sample, append, settle.

use std::ops::Range;

use lake::manifest::{self, Begin, Claim, Input, Manifest};
use lake::{AppTransaction, LakeError, LocalFolder, Output, ReleaseRoot, Table, TemporaryFolder, Zone, layout};
use lm::LmError;
use lm::adapter::Lora;
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::Compute;
use lm::generate::{Completion, Request, Sampling, generate, usual_batch};
use lm::template::Prompt;
use lm::tokenizer::Tokenizer;
use serde_json::json;
use stage::telemetry::{Fact, phase, tell};
use stage::{Failure, Progress, Shard, Summary};
use tokio::sync::mpsc;

use crate::args::{Args, Config};
use crate::plan::{self, Chunks};
use crate::rows::{self, Sample};

const STAGE: &str = "synthesize";
/// Samples that wait to be appended before sampling pauses: storage that hangs must not fill the memory.
const QUEUE: usize = 1024;

/// Runs the stage.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let config = args.config()?;
    let release = args.common.release_root().await?;
    let sources = Sources::open(&args, &config, &release).await?;
    let claim = sources.claim(&args, &config)?;
    if manifest::find(&release, &claim.run, STAGE, claim.shard).await?.is_some() {
        // Done already, or a conflict with what was done: `begin` tells which.
        if let Begin::Done(manifest) = manifest::begin(&release, claim.clone()).await? {
            return Ok(summary(&args, &manifest, true));
        }
    }
    // Before the claim: a run id must not be bound to settings that cannot work.
    sources.check_training(&config, &release).await?;
    let sampler = sources.load(&args, &config)?;
    let handle = match manifest::begin(&release, claim).await? {
        Begin::Done(manifest) => return Ok(summary(&args, &manifest, true)),
        Begin::Fresh(handle) | Begin::Resumed(handle) => handle,
    };
    let path = layout::synthetic(&args.common.run);
    let table = release.table(&path);
    table.create(lake::schema::synthetic()).await?;
    tell(Fact::Bytes(sample(&args, &config, sampler, &table).await?));
    let outputs = vec![Output { name: "synthetic".into(), path, version: table.version().await? }];
    let range = plan::range(config.count, args.effective_shard());
    let facts = json!({ "rows": range.end - range.start, "first": range.start });
    let manifest = handle.finish(outputs, facts).await?;
    Ok(summary(&args, &manifest, false))
}

/// The inputs on this machine.
struct Sources {
    checkpoint: Checkpoint,
    model_name: String,
    model_digest: String,
    adapter: Option<Adapter>,
    _folder: LocalFolder,
}

struct Adapter {
    folder: TemporaryFolder,
    path: String,
    url: String,
    digest: String,
}

impl Sources {
    async fn open(args: &Args, config: &Config, release: &ReleaseRoot) -> Result<Self, Failure> {
        let adapter = match &config.adapter_run {
            Some(run) => Some(Adapter::fetch(release, run).await?),
            None => None,
        };
        let folder = lake::fetch_folder(&args.model, &args.common.storage()).await?;
        let checkpoint = Checkpoint::open(folder.path()).map_err(failure)?;
        let model_digest = checkpoint.digest().map_err(failure)?;
        let model_name = stage::base_name(&args.model).to_string();
        Ok(Self { checkpoint, model_name, model_digest, adapter, _folder: folder })
    }

    fn claim(&self, args: &Args, config: &Config) -> Result<Claim, Failure> {
        let input = |name: &str, location: &str, digest: &str| Input {
            name: name.into(),
            location: location.into(),
            version: None,
            digest: Some(digest.into()),
        };
        let adapter = self.adapter.as_ref().map(|adapter| input("adapter", &adapter.path, &adapter.digest));
        let model = input("model", &self.model_name, &self.model_digest);
        Ok(Claim {
            run: args.common.run.clone(),
            stage: STAGE.into(),
            shard: args.shard.map(Shard::pair),
            inputs: std::iter::once(model).chain(adapter).collect(),
            config: serde_json::to_value(config).map_err(|error| Failure::Bug(error.to_string()))?,
            seeds: vec![config.seed],
            binary: stage::binary("doppel-synthesize"),
            started: chrono::Utc::now(),
            command: stage::command(),
        })
    }

    fn load(&self, args: &Args, config: &Config) -> Result<Sampler, Failure> {
        let _span = phase("load model").entered();
        let compute = Compute::resolve(args.device, args.dtype).map_err(failure)?;
        let tokenizer = self.checkpoint.tokenizer().map_err(failure)?;
        let mut decoder = Decoder::load(&self.checkpoint, compute).map_err(failure)?;
        if let Some(adapter) = &self.adapter {
            decoder.merge(&adapter.load(&decoder)?).map_err(failure)?;
        }
        let prompt = Prompt::new(config.template, &tokenizer, &decoder.config).map_err(failure)?;
        let longest = prompt.prefix.len() + config.max_new_tokens;
        if longest as u64 > decoder.config.max_positions as u64 {
            return Err(Failure::Usage(format!(
                "--max-new-tokens {}: with a prompt of {} tokens the model's {} positions do not suffice\n\
                 help: lower --max-new-tokens",
                config.max_new_tokens,
                prompt.prefix.len(),
                decoder.config.max_positions
            )));
        }
        let mut stop = vec![prompt.end];
        for text in &config.stop {
            stop.push(tokenizer.single_token(text).map_err(|error| Failure::Usage(format!("--stop {error}")))?);
        }
        stop.extend(&decoder.config.eos);
        let sampling = Sampling {
            temperature: config.temperature,
            top_p: config.top_p,
            top_k: config.top_k,
            repetition_penalty: config.repetition_penalty,
            max_new_tokens: config.max_new_tokens,
            stop,
        };
        let origin = match &self.adapter {
            Some(adapter) => adapter.url.clone(),
            None => format!("model {}", self.model_name),
        };
        Ok(Sampler { decoder, tokenizer, prompt, sampling, seed: config.seed, origin })
    }

    /// An error where train says that it trained the adapter on another model, or showed instructions behind another
    /// template, than samples are to be drawn from.
    async fn check_training(&self, config: &Config, release: &ReleaseRoot) -> Result<(), Failure> {
        let Some(run) = &config.adapter_run else { return Ok(()) };
        let Some(trained) = manifest::find(release, run, "train", None).await? else { return Ok(()) };
        let template = config.template.name();
        let given = trained.claim.config.get("template").and_then(serde_json::Value::as_str);
        if let Some(other) = given.filter(|other| *other != template) {
            return Err(Failure::Usage(format!(
                "--template {template}: the adapter of run {run} was trained with --template {other}\n\
                 help: give --template {other}"
            )));
        }
        let model = trained.claim.inputs.iter().find(|input| input.name == "model");
        match model.filter(|model| model.digest.as_ref().is_some_and(|digest| *digest != self.model_digest)) {
            Some(other) => Err(Failure::Usage(format!(
                "--model {}: the adapter of run {run} was trained on other files, of model {}\n\
                 help: give the model that train had; the same weights in another format are other files",
                self.model_name, other.location
            ))),
            None => Ok(()),
        }
    }
}

impl Adapter {
    async fn fetch(release: &ReleaseRoot, run: &str) -> Result<Self, Failure> {
        let path = layout::adapter(run);
        let url = release.url_of(&path);
        let missing = || {
            Failure::Input(format!(
                "{url}: no adapter there\nhelp: run train first, name its run with --adapter-run, or sample the base \
                 model with --no-adapter"
            ))
        };
        let folder = TemporaryFolder::new()?;
        match release.download(&path, folder.path()).await {
            Err(LakeError::NotFound(_)) => return Err(missing()),
            other => other?,
        }
        let mut hasher = blake3::Hasher::new();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            // train writes the configuration last: without it, the adapter is not complete.
            let body = std::fs::read(folder.path().join(name)).map_err(|_| missing())?;
            hasher.update(blake3::hash(&body).as_bytes());
        }
        let digest = hasher.finalize().to_hex().to_string();
        Ok(Self { folder, path, url, digest })
    }

    /// The adapter for `decoder`; errors name the object in the release zone rather than the copy on this machine.
    fn load(&self, decoder: &Decoder) -> Result<Lora, Failure> {
        let copy = self.folder.path().display().to_string();
        Lora::load(self.folder.path(), &decoder.config, decoder.compute.device).map_err(|error| match error {
            LmError::Malformed(message) => Failure::Input(message.replace(&copy, &self.url)),
            other => failure(other),
        })
    }
}

/// Everything that sampling needs.
struct Sampler {
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: Sampling,
    seed: u64,
    /// What the weights are of, for errors.
    origin: String,
}

impl Sampler {
    /// Draws the samples `range`, handing each to `done` as it finishes.
    fn draw(
        &self,
        batch: Option<usize>,
        range: Range<u64>,
        mut done: impl FnMut(u64, Sample) -> Result<(), LmError>,
    ) -> Result<(), LmError> {
        let batch = batch.unwrap_or_else(|| usual_batch(&self.decoder));
        // A slot that no sample can fill would still take memory.
        let batch = usize::try_from(range.end - range.start).map_or(batch, |count| batch.min(count));
        let request = |index| Request { index, prompt: self.prompt.prefix.clone(), seed: plan::seed(self.seed, index) };
        generate(&self.decoder, &self.sampling, range.map(request), batch, |completion: Completion| {
            self.check_finite(&completion)?;
            let sample = Sample {
                seed: plan::seed(self.seed, completion.index),
                text: self.tokenizer.decode(&completion.tokens)?,
                tokens: completion.tokens.len(),
                stopped: completion.stopped,
                mean_logprob: completion.mean_logprob,
            };
            done(completion.index, sample)
        })
    }

    /// Where logits are not finite, neither is the log-probability of whatever was chosen.
    fn check_finite(&self, completion: &Completion) -> Result<(), LmError> {
        match completion.mean_logprob.is_finite() {
            true => Ok(()),
            false => Err(LmError::Malformed(format!(
                "{}: logits are not finite, so nothing can be sampled\n\
                 help: train again with a lower --learning-rate; where the base model alone (--no-adapter) does the same, \
                 download it again",
                self.origin
            ))),
        }
    }
}

/// Draws what this shard lacks on a thread of its own, and appends whole chunks meanwhile; the bytes of text that this
/// attempt added.
async fn sample(args: &Args, config: &Config, sampler: Sampler, table: &Table) -> Result<u64, Failure> {
    let shard = args.effective_shard();
    let range = plan::range(config.count, shard);
    let transaction = stage::transaction(&args.common.run, STAGE, args.shard);
    let mut chunks = Chunks::new(range.clone(), table.last_chunk(&transaction).await?);
    let remaining = chunks.remaining();
    let mut bytes = 0;
    if chunks.is_done() {
        return Ok(bytes);
    }
    let rows = Progress::public("synthesize", "rows", range.end - range.start);
    rows.resume(remaining.start - range.start);
    let tokens = Progress::public("sample", "tokens", 0);
    let (sender, mut receiver) = mpsc::channel::<(u64, Sample)>(QUEUE);
    let batch = args.batch_size;
    let drawing = tokio::task::spawn_blocking(move || {
        sampler.draw(batch, remaining, |index, sample| {
            let gone = |_| LmError::Usage("synthesize: the rows could not be appended".into());
            sender.blocking_send((index, sample)).map_err(gone)
        })
    });
    while let Some((index, sample)) = receiver.recv().await {
        rows.advance(1);
        tokens.advance(sample.tokens as u64);
        bytes += sample.text.len() as u64;
        chunks.add(index, sample);
        while let Some((version, chunk)) = chunks.take() {
            let batch = rows::batch(&args.common.run, shard.index, &chunk)?;
            table.append(vec![batch], AppTransaction { id: transaction.clone(), version }).await?;
        }
    }
    drawing.await.map_err(|_| Failure::Bug("synthesize: the sampling thread panicked".into()))?.map_err(failure)?;
    match chunks.is_done() {
        true => Ok(bytes),
        false => Err(Failure::Bug("synthesize: fewer samples came than were asked for".into())),
    }
}

fn summary(args: &Args, manifest: &Manifest, already: bool) -> Summary {
    let run = &args.common.run;
    let path = layout::synthetic(run);
    let rows = manifest.facts.get("rows").and_then(serde_json::Value::as_u64).unwrap_or_default();
    let done = if already { "done already; " } else { "" };
    let version = manifest.outputs.first().and_then(|output| output.version);
    Summary {
        text: format!("synthesize: {done}{rows} samples are in the release zone at {path}"),
        json: json!({
            "stage": STAGE, "run": run, "already_done": already, "zone": ReleaseRoot::NAME, "table": path,
            "version": version, "rows": rows,
            "shard": manifest.claim.shard.map(|(index, count)| format!("{index}/{count}")),
        }),
    }
}

/// A model's failure by what the operator can do.
fn failure(error: LmError) -> Failure {
    Failure::coded(error.exit_code(), error)
}
