//! Canary gradients in the training of a real decoder: train's own step on texts, into whose sum canaries are slipped.
//!
//! The canaries of Nasr et al. 2023, section 4: the attacker chooses gradients, here along axes of the adapter, and the
//! product samples, clips, sums, adds noise and updates the adapter, with the gradients of ordinary units beside them.

use std::time::Duration;

use doppel_train::adapter::{PrivateAdapter, Training, Update};
use doppel_train::args::Mechanism;
use doppel_train::step::{Limits, Unit, sample, sum_gradients};
use lake::StorageOptions;
use lm::adapter::{Lora, LoraConfig, Target as Projection};
use lm::checkpoint::Checkpoint;
use lm::decoder::Decoder;
use lm::device::{Compute, DeviceChoice, DtypeChoice};
use lm::gradients::Example;
use privacy::keyed::{Context, NoiseKey};
use stage::Failure;

use crate::attack::Attack;
use crate::canary::clipped;
use crate::failure;
use crate::parts::Parts;
use crate::target::Target;

/// Ordinary units that train beside the canaries, and tokens of each.
const TEXTS: u64 = 32;
const LENGTH: u64 = 9;

const LIMITS: Limits = Limits { block_length: LENGTH as usize, micro_batch_tokens: 2048 };

const UPDATE: Update = Update { learning_rate: 1e-3, weight_decay: 0.0 };

/// Training that canary gradients take part in.
pub(crate) struct Model {
    decoder: Decoder,
    adapter: PrivateAdapter,
    texts: Vec<Unit>,
    /// Of each canary: its unit, tensor and place in it.
    canaries: Vec<(String, usize, usize)>,
    parts: Parts,
    key: NoiseKey,
    context: Context,
}

impl Model {
    /// Reads the model at `url`; at most one canary for each parameter of the adapter.
    pub async fn fetch(url: &str, parts: Parts, canaries: usize, attack: &Attack) -> Result<Self, Failure> {
        let folder = lake::fetch_folder(url, &StorageOptions { timeout: Duration::from_secs(180) }).await?;
        let load = || {
            let compute = Compute::resolve(DeviceChoice::Auto, DtypeChoice::F32)?;
            let decoder = Decoder::load(&Checkpoint::open(folder.path())?, compute)?;
            let config = LoraConfig { rank: 8, alpha: 16.0, targets: Projection::ALL.to_vec(), dropout: 0.0 };
            let lora = Lora::new(config, &decoder.config, decoder.compute.device, attack.seed)?;
            Ok(Self {
                texts: texts(decoder.config.vocab_size as u64, attack),
                canaries: axes(&lora, canaries),
                decoder,
                adapter: PrivateAdapter::new(Training::new(lora)),
                parts,
                key: attack.key(),
                context: Context::new("audit/model"),
            })
        };
        load().map_err(failure)
    }
}

impl Target for Model {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn canaries(&self) -> usize {
        self.canaries.len()
    }

    fn step(&mut self, step: u64, present: &[bool]) -> Result<Vec<f64>, Failure> {
        let Self { decoder, adapter, texts, canaries, parts, key, context } = self;
        let mechanism = Mechanism::Private(parts.sampler.clone());
        let units = sample(&mechanism, key, context, step, texts).map_err(crate::accounting)?;
        let lora = &adapter.training().lora;
        let mut sum = sum_gradients(decoder, lora, &parts.clipping, &units, step, LIMITS).map_err(failure)?;
        let sampler = parts.sampler.sampler(key, context, step);
        let clipped = clipped(parts, &sum)?;
        let mut gradients: Vec<Vec<i64>> = lora.tensors.iter().map(|(_, tensor)| vec![0; tensor.numel()]).collect();
        for ((unit, tensor, place), present) in canaries.iter().zip(present) {
            if *present && sampler.includes(unit) {
                gradients[*tensor][*place] += clipped;
            }
        }
        sum.add_rounded(&gradients).map_err(crate::accounting)?;
        let released = parts.noise.release(key, context, step, sum).map_err(crate::accounting)?;
        adapter.apply(&released, UPDATE).map_err(failure)?;
        let scale = parts.accounted.expected_batch_size() / parts.accounted.clip_norm();
        let score = |&(_, tensor, place): &(String, usize, usize)| f64::from(released.value()[tensor][place]) * scale;
        Ok(canaries.iter().map(score).collect())
    }
}

/// Units of random tokens.
fn texts(vocabulary: u64, attack: &Attack) -> Vec<Unit> {
    let hasher = attack.key().hasher(&Context::new("audit/texts"));
    let token = |place: u64| (hasher.hash(&place.to_le_bytes()) % vocabulary) as i64;
    let example = |unit: u64| Example {
        tokens: (0..LENGTH).map(|place| token(unit * LENGTH + place)).collect(),
        prefix: 1,
        dropout_seed: unit,
    };
    (0..TEXTS).map(|unit| Unit { id: format!("text-{unit}"), examples: vec![example(unit)] }).collect()
}

/// Places for `count` canaries, spread evenly over all tensors.
fn axes(lora: &Lora, count: usize) -> Vec<(String, usize, usize)> {
    let sizes = lora.tensors.iter().map(|(_, tensor)| tensor.numel()).enumerate();
    let places: Vec<(usize, usize)> = sizes.flat_map(|(tensor, size)| (0..size).map(move |i| (tensor, i))).collect();
    let count = count.min(places.len());
    let axis = |canary: usize| {
        let (tensor, place) = places[canary * places.len() / count];
        (format!("canary-{canary}"), tensor, place)
    };
    (0..count).map(axis).collect()
}
