//! Canary texts through train's own step: sample, gradients of a real decoder, clip, sum, noise, update.
//!
//! A canary is a privacy unit of random tokens. The attacker computes its gradient at the adapter of each step, which
//! is public, and looks for that direction in what is released.

use std::time::Duration;

use doppel_train::adapter::{PrivateAdapter, Training, Update};
use doppel_train::args::Mechanism;
use doppel_train::step::{Limits, Unit, sample, sum_gradients};
use lake::StorageOptions;
use lm::LmError;
use lm::adapter::{Lora, LoraConfig, Target as Projection};
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::gradients::{Example, example_gradients};
use privacy::AccountingError;
use privacy::keyed::{Context, NoiseKey};
use privacy::training::TrainingMechanism;
use stage::Failure;
use tch::{Kind, Tensor};

use crate::attack::{Attack, Target};
use crate::canary::OVERSIZE;
use crate::parts::Parts;

/// Tokens of a canary, the first of which is no label.
const LENGTH: u64 = 9;

/// The canaries' loss is not averaged: the clip norm follows from their gradients.
const LIMITS: Limits = Limits { block_length: 1, micro_batch_tokens: 2048 };

/// Weight of noise against other canaries.
const RIDGE: f64 = 8.0;

const UPDATE: Update = Update { learning_rate: 1e-3, weight_decay: 0.0 };

/// A model, and texts that no corpus has.
pub(crate) struct Canaries {
    decoder: Decoder,
    lora: Lora,
    units: Vec<Unit>,
    /// Smallest norm of a canary's gradient at the first adapter.
    smallest_norm: f64,
}

impl Canaries {
    /// Reads the model at `url`; computes in float32, where gradients are sharpest.
    pub async fn fetch(url: &str, count: usize, seed: u64) -> Result<Self, Failure> {
        let folder = lake::fetch_folder(url, &StorageOptions { timeout: Duration::from_secs(180) }).await?;
        let load = || {
            let compute = Compute::resolve(DeviceChoice::Auto, DtypeChoice::F32)?;
            Self::new(Decoder::load(&Checkpoint::open(folder.path())?, compute)?, count, seed)
        };
        load().map_err(failure)
    }

    fn new(decoder: Decoder, count: usize, seed: u64) -> Result<Self, LmError> {
        let config = LoraConfig { rank: 8, alpha: 16.0, targets: Projection::ALL.to_vec(), dropout: 0.0 };
        let lora = Lora::new(config, &decoder.config, decoder.compute.device, seed)?;
        let units = units(count, decoder.config.vocab_size as u64, seed);
        let mut canaries = Self { decoder, lora, units, smallest_norm: 0.0 };
        let norms = canaries.gradients(&canaries.lora)?.square().sum_dim_intlist(1, false, Kind::Double).sqrt();
        canaries.smallest_norm = norms.min().double_value(&[]);
        Ok(canaries)
    }

    /// `mechanism` with a clip norm that every canary exceeds, so that clipping has something to do.
    pub fn mechanism(&self, mechanism: &TrainingMechanism) -> Result<TrainingMechanism, AccountingError> {
        TrainingMechanism::new(
            mechanism.sampling_probability(),
            mechanism.noise_multiplier(),
            mechanism.steps(),
            self.smallest_norm / OVERSIZE,
            (mechanism.sampling_probability() * self.units.len() as f64 / 2.0).max(1.0),
        )
    }

    /// `[canaries, parameters]`: every canary's gradient at `lora`, all tensors in a row.
    fn gradients(&self, lora: &Lora) -> Result<Tensor, LmError> {
        let examples: Vec<Example> = self.units.iter().flat_map(|unit| unit.examples.iter().cloned()).collect();
        let flat = |batch: &[Example]| {
            let gradients = example_gradients(&self.decoder, lora, batch, LIMITS.block_length)?.gradients;
            let rows: Vec<Tensor> = gradients.iter().map(|gradient| gradient.flatten(1, -1)).collect();
            Ok(Tensor::f_cat(&rows, 1)?)
        };
        let batches = examples.chunks(LIMITS.micro_batch_tokens / LENGTH as usize);
        let batches = batches.map(flat).collect::<Result<Vec<_>, LmError>>()?;
        Ok(Tensor::f_cat(&batches, 0)?)
    }
}

/// Training that canary texts take part in.
pub(crate) struct Model {
    canaries: Canaries,
    adapter: PrivateAdapter,
    parts: Parts,
    key: NoiseKey,
    context: Context,
}

impl Model {
    /// Begins with a new adapter.
    pub fn new(canaries: Canaries, parts: Parts, attack: &Attack) -> Result<Self, Failure> {
        let lora = Lora::new(
            canaries.lora.config.clone(),
            &canaries.decoder.config,
            canaries.decoder.compute.device,
            attack.seed,
        );
        let adapter = PrivateAdapter::new(Training::new(lora.map_err(failure)?));
        Ok(Self { canaries, adapter, parts, key: attack.key(), context: Context::new("audit/model") })
    }

    /// The step as train takes it; returns the released gradient in a row.
    fn train(&mut self, step: u64, present: &[bool]) -> Result<Vec<f32>, Failure> {
        let Self { canaries, adapter, parts, key, context } = self;
        let sampler = Mechanism::Private(parts.sampler.clone());
        let mut units = sample(&sampler, key, context, step, &canaries.units).map_err(crate::accounting)?;
        // A unit's membership of a step does not depend on the others, so those that are absent may be taken out last.
        let absent = |unit: &Unit| canaries.units.iter().zip(present).any(|(other, &p)| !p && other.id == unit.id);
        units.retain(|unit| !absent(unit));
        let lora = &adapter.training().lora;
        let sum = sum_gradients(&canaries.decoder, lora, &parts.clipping, &units, step, LIMITS).map_err(failure)?;
        let released = parts.noise.release(key, context, step, sum);
        adapter.apply(&released, UPDATE).map_err(failure)?;
        Ok(released.value().concat())
    }
}

impl Target for Model {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn canaries(&self) -> usize {
        self.canaries.units.len()
    }

    fn step(&mut self, step: u64, present: &[bool]) -> Result<Vec<f64>, Failure> {
        let gradients = self.canaries.gradients(&self.adapter.training().lora).map_err(failure)?;
        let released = self.train(step, present)?;
        let scale = self.parts.accounted.expected_batch_size() / self.parts.accounted.clip_norm();
        let read = || -> Result<Vec<f64>, tch::TchError> {
            let released = (Tensor::f_from_slice(&released)? * scale).to_device(gradients.device());
            let directions = &gradients / gradients.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), true)?;
            // Ridge regression: what canaries have in common drowns what they have not.
            let alike = directions.f_matmul(&directions.f_transpose(0, 1)?)?;
            let penalty = Tensor::f_eye(alike.size()[0], (Kind::Float, alike.device()))? * RIDGE;
            let own = Tensor::f_linalg_solve(&(alike + penalty), &directions, true)?;
            let lengths = (&own * &directions).f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?;
            Vec::<f64>::try_from((own.f_matmul(&released)? / lengths).to_kind(Kind::Double))
        };
        read().map_err(|error| failure(error.into()))
    }
}

/// Units of random tokens.
fn units(count: usize, vocabulary: u64, seed: u64) -> Vec<Unit> {
    let hasher = NoiseKey::new([0; 32]).hasher(&Context::new("audit/texts").field("seed", &seed.to_le_bytes()));
    let token = |place: u64| (hasher.hash(&place.to_le_bytes()) % vocabulary) as i64;
    let example = |unit: u64| Example {
        tokens: (0..LENGTH).map(|place| token(unit * LENGTH + place)).collect(),
        prefix: 1,
        dropout_seed: unit,
    };
    let unit = |unit: u64| Unit { id: format!("canary-{unit}"), examples: vec![example(unit)] };
    (0..count as u64).map(unit).collect()
}

fn failure(error: LmError) -> Failure {
    match error {
        LmError::Usage(message) => Failure::Usage(message),
        LmError::Malformed(message) => Failure::Input(message),
        other => Failure::Bug(other.to_string()),
    }
}
