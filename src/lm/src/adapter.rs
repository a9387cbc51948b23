//! LoRA adapters (Hu et al. 2022, arXiv 2106.09685) in PEFT's format.
//!
//! Reference for names and files: <https://github.com/huggingface/peft>, `peft/tuners/lora`.

use std::path::Path;

use clap::ValueEnum;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::{LmError, checkpoint::DecoderConfig};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// A projection that LoRA can adapt.
#[derive(ValueEnum, Serialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Query.
    Q,
    /// Key.
    K,
    /// Value.
    V,
    /// Output.
    O,
}

impl Target {
    /// Every target, in the order that adapters are kept in.
    pub const ALL: [Target; 4] = [Target::Q, Target::K, Target::V, Target::O];

    /// PEFT's name of the module.
    pub fn module(self) -> &'static str {
        match self {
            Target::Q => "q_proj",
            Target::K => "k_proj",
            Target::V => "v_proj",
            Target::O => "o_proj",
        }
    }

    fn from_module(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.module() == name)
    }

    /// `(in, out)` of the projection.
    pub(crate) fn sizes(self, decoder: &DecoderConfig) -> (i64, i64) {
        let (queries, keys) = (decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim);
        match self {
            Target::Q => (decoder.hidden_size, queries),
            Target::K | Target::V => (decoder.hidden_size, keys),
            Target::O => (queries, decoder.hidden_size),
        }
    }
}

/// LoRA hyper-parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r
    pub rank: i64,
    /// alpha: the product is scaled by alpha / r.
    pub alpha: f64,
    /// Adapted projections.
    pub targets: Vec<Target>,
    /// Dropout on the adapter's input while training.
    pub dropout: f64,
}

impl LoraConfig {
    /// What B·A is multiplied by.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Targets in the order of [`Target::ALL`], each once.
    fn checked(mut self) -> Result<Self, String> {
        self.targets.sort();
        self.targets.dedup();
        if self.targets.is_empty() {
            return Err("no target projections; expected some of q, k, v, o".into());
        }
        if !(1..=4096).contains(&self.rank) {
            return Err(format!("rank {}; expected 1 to 4096", self.rank));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return Err(format!("alpha {}; expected a positive number", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("dropout {}; expected at least 0 and less than 1", self.dropout));
        }
        Ok(self)
    }
}

/// Trainable factors, float32, on the decoder's device. Order of tensors: layer, then target, then A, B.
pub struct Lora {
    /// Hyper-parameters.
    pub config: LoraConfig,
    /// `(PEFT name, tensor)`: A `[r, in]`, B `[out, r]`.
    pub tensors: Vec<(String, Tensor)>,
}

/// One tensor an adapter must have.
struct Slot {
    name: String,
    shape: [i64; 2],
    is_a: bool,
}

impl Lora {
    /// A uniform (Kaiming, as PEFT), B zero; A from a public seed.
    ///
    /// PEFT draws A by `kaiming_uniform_(a = √5)`, which is uniform in ±1/√in. The values come from a ChaCha20 stream
    /// rather than libtorch's generator: they are the same on every device and with every version.
    pub fn new(config: LoraConfig, decoder: &DecoderConfig, device: Device, seed: u64) -> Result<Self, LmError> {
        let help = "help: change --rank, --alpha, --targets or --dropout";
        let config = config.checked().map_err(|found| LmError::Usage(format!("LoRA: {found}\n{help}")))?;
        let mut stream = ChaCha20Rng::seed_from_u64(seed);
        let mut tensors = Vec::new();
        for slot in slots(&config, decoder) {
            let tensor = if slot.is_a {
                let bound = 1.0 / (slot.shape[1] as f64).sqrt();
                let count = (slot.shape[0] * slot.shape[1]) as usize;
                let values: Vec<f32> = (0..count).map(|_| uniform(&mut stream, bound)).collect();
                Tensor::f_from_slice(&values)?.f_reshape(slot.shape)?.f_to_device(device)?
            } else {
                Tensor::f_zeros(slot.shape, (Kind::Float, device))?
            };
            tensors.push((slot.name, tensor));
        }
        Ok(Self { config, tensors })
    }

    /// Reads a PEFT folder; checks that it fits `decoder`.
    pub fn load(folder: &Path, decoder: &DecoderConfig, device: Device) -> Result<Self, LmError> {
        let config = read_config(&folder.join(CONFIG))?;
        let path = folder.join(WEIGHTS);
        let malformed = |found: String| LmError::Malformed(format!("{}: {found}", path.display()));
        let bytes = std::fs::read(&path).map_err(|error| malformed(error.to_string()))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| malformed(format!("not a safetensors file, or cut short: {error}")))?;
        let expected = slots(&config, decoder);
        let mut tensors = Vec::new();
        for slot in &expected {
            let tensor = read_tensor(&file, slot).map_err(&malformed)?;
            tensors.push((slot.name.clone(), tensor.f_to_device(device)?));
        }
        let known = |name: &&str| expected.iter().any(|slot| slot.name == **name);
        if let Some(name) = file.names().iter().map(|name| &**name).find(|name| !known(name)) {
            return Err(malformed(format!(
                "tensor {name} has no place in this model of {} layers\n{WRONG_MODEL}",
                decoder.layers
            )));
        }
        Ok(Self { config, tensors })
    }

    /// Files of a PEFT folder: (`adapter_config.json`, `adapter_model.safetensors`) contents.
    pub fn to_peft(&self, base_model: &str) -> Result<Vec<(String, Vec<u8>)>, LmError> {
        let modules: Vec<&str> = self.config.targets.iter().map(|target| target.module()).collect();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "use_rslora": false,
            "use_dora": false,
        });
        let mut text = serde_json::to_vec_pretty(&config).map_err(|error| bug(&error))?;
        text.push(b'\n');
        let mut bodies = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &self.tensors {
            let flat = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_reshape([-1i64])?;
            let body: Vec<u8> = Vec::<f32>::try_from(flat)?.iter().flat_map(|value| value.to_le_bytes()).collect();
            bodies.push((name, tensor.size().iter().map(|&size| size as usize).collect::<Vec<_>>(), body));
        }
        let mut views = Vec::with_capacity(bodies.len());
        for (name, shape, body) in &bodies {
            let view = TensorView::new(Dtype::F32, shape.clone(), body).map_err(|error| bug(&error))?;
            views.push((name.as_str(), view));
        }
        // transformers and peft refuse a file that does not name its framework.
        let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
        let weights = safetensors::serialize(views, Some(metadata)).map_err(|error| bug(&error))?;
        Ok(vec![(CONFIG.to_string(), text), (WEIGHTS.to_string(), weights)])
    }

    /// `(A, B)` of a projection, where it is adapted.
    pub(crate) fn factors(&self, layer: usize, target: Target) -> Option<(&Tensor, &Tensor)> {
        let index = 2 * (layer * self.config.targets.len() + self.position(target)?);
        Some((&self.tensors.get(index)?.1, &self.tensors.get(index + 1)?.1))
    }

    /// Place of a target among the adapted ones.
    pub(crate) fn position(&self, target: Target) -> Option<usize> {
        self.config.targets.iter().position(|adapted| *adapted == target)
    }

    /// Checks that the factors have the shapes that `decoder` needs: an adapter may have been loaded for another one.
    pub(crate) fn check(&self, decoder: &DecoderConfig) -> Result<(), LmError> {
        let expected = slots(&self.config, decoder);
        if expected.len() != self.tensors.len() {
            return Err(LmError::Malformed(format!(
                "adapter: {} tensors, expected {} for a model of {} layers\n{WRONG_MODEL}",
                self.tensors.len(),
                expected.len(),
                decoder.layers
            )));
        }
        for (slot, (name, tensor)) in expected.iter().zip(&self.tensors) {
            if *name != slot.name || tensor.size() != slot.shape {
                return Err(LmError::Malformed(format!(
                    "adapter: tensor {name} {:?}, expected {} {:?}\n{WRONG_MODEL}",
                    tensor.size(),
                    slot.name,
                    slot.shape
                )));
            }
        }
        Ok(())
    }
}

const WRONG_MODEL: &str = "help: the adapter was trained for another model; give the base model that it names";

/// The tensors of an adapter, in order.
fn slots(config: &LoraConfig, decoder: &DecoderConfig) -> Vec<Slot> {
    let mut slots = Vec::new();
    for layer in 0..decoder.layers {
        for target in &config.targets {
            let (inputs, outputs) = target.sizes(decoder);
            let module = format!("base_model.model.model.layers.{layer}.self_attn.{}", target.module());
            let name = |factor: &str| format!("{module}.{factor}.weight");
            slots.push(Slot { name: name("lora_A"), shape: [config.rank, inputs], is_a: true });
            slots.push(Slot { name: name("lora_B"), shape: [outputs, config.rank], is_a: false });
        }
    }
    slots
}

/// Uniform in ±bound, from 24 bits.
fn uniform(stream: &mut ChaCha20Rng, bound: f64) -> f32 {
    let unit = f64::from(stream.next_u32() >> 8) / f64::from(1u32 << 24);
    ((2.0 * unit - 1.0) * bound) as f32
}

fn bug(error: &dyn std::fmt::Display) -> LmError {
    LmError::Malformed(format!("adapter: {error}"))
}

fn read_config(path: &Path) -> Result<LoraConfig, LmError> {
    let malformed = |found: String| {
        LmError::Malformed(format!("{}: {found}\nhelp: expected a PEFT folder of a LoRA adapter", path.display()))
    };
    let text = std::fs::read(path).map_err(|error| malformed(error.to_string()))?;
    let config: Value = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    if config["peft_type"] != "LORA" {
        return Err(malformed(format!("peft_type {}, expected \"LORA\"", config["peft_type"])));
    }
    // Each of these changes what the factors mean; ignoring one would sample from another model in silence.
    for flag in ["use_dora", "use_rslora", "fan_in_fan_out"] {
        if config[flag] == true {
            return Err(malformed(format!("{flag} is not supported")));
        }
    }
    let lists = ["rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "alora_invocation_tokens"];
    for list in lists {
        let empty = match &config[list] {
            Value::Null => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(items) => items.is_empty(),
            _ => false,
        };
        if !empty {
            return Err(malformed(format!("{list} is not supported")));
        }
    }
    // Others, such as PiSSA, take something off the base model's weights when they are loaded.
    let leaves_base = match &config["init_lora_weights"] {
        Value::String(kind) => ["gaussian", "eva"].contains(&kind.as_str()),
        _ => true,
    };
    if !leaves_base {
        return Err(malformed(format!("init_lora_weights {} is not supported", config["init_lora_weights"])));
    }
    if !matches!(config["bias"].as_str(), None | Some("none")) {
        return Err(malformed(format!("bias {}, expected \"none\"", config["bias"])));
    }
    let modules = config["target_modules"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut targets = Vec::new();
    for module in modules {
        let name = module.as_str().unwrap_or_default();
        let target = Target::from_module(name);
        targets.push(
            target.ok_or_else(|| {
                malformed(format!("target module {module}, expected q_proj, k_proj, v_proj or o_proj"))
            })?,
        );
    }
    let number = |key: &str| {
        config[key].as_f64().ok_or_else(|| malformed(format!("{key}: found {}, expected a number", config[key])))
    };
    let rank = number("r")?;
    if rank.fract() != 0.0 {
        return Err(malformed(format!("r: found {rank}, expected a whole number")));
    }
    let dropout = if config["lora_dropout"].is_null() { 0.0 } else { number("lora_dropout")? };
    let config = LoraConfig { rank: rank as i64, alpha: number("lora_alpha")?, targets, dropout };
    config.checked().map_err(malformed)
}

fn read_tensor(file: &SafeTensors, slot: &Slot) -> Result<Tensor, String> {
    let view = file.tensor(&slot.name).map_err(|_| {
        format!("no tensor {} among {} tensors, expected {:?}\n{WRONG_MODEL}", slot.name, file.len(), slot.shape)
    })?;
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    if shape != slot.shape {
        return Err(format!("tensor {}: found {shape:?}, expected {:?}\n{WRONG_MODEL}", slot.name, slot.shape));
    }
    let kind = match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => return Err(format!("tensor {}: found {other:?}, expected F32, F16 or BF16", slot.name)),
    };
    Tensor::f_from_data_size(view.data(), &shape, kind)
        .and_then(|tensor| tensor.f_to_kind(Kind::Float))
        .map_err(|error| format!("tensor {}: {error}", slot.name))
}

#[cfg(test)]
mod tests;
