//! Sentence encoders from sentence-transformers folders: BERT (MiniLM) and the T5 encoder (Sentence-T5).
//!
//! `modules.json` lists what happens in a row: a transformer, mean pooling, dense layers, normalisation. The transformer
//! computes in the kind that was asked for; what follows is one vector per text, and computes in float32.
//! Reference: <https://github.com/UKPLab/sentence-transformers>.

mod bert;
mod t5;

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::{Weights, digest_of, read_json};
use crate::tokenizer::Tokenizer;
use crate::workers::{self, Shared};
use crate::{LmError, device::Compute};

/// What `modules.json` may list.
const KNOWN_MODULES: [&str; 4] = ["Transformer", "Pooling", "Dense", "Normalize"];

/// Tokens of a text that are read where neither the folder nor the architecture sets a limit.
const DEFAULT_LONGEST: u64 = 512;

/// A sentence encoder.
pub struct Encoder {
    transformer: Transformer,
    tail: Vec<Step>,
    tokenizer: Tokenizer,
    lowercase: bool,
    compute: Compute,
    dimension: usize,
    digest: String,
}

enum Transformer {
    Bert(bert::Bert),
    T5(t5::T5),
}

/// What follows pooling.
enum Step {
    Dense(Dense),
    Normalize,
}

struct Dense {
    weight: Tensor,
    bias: Option<Tensor>,
    tanh: bool,
}

impl Encoder {
    /// Reads `modules.json` and what it names: transformer, pooling, dense, normalize.
    pub fn load(folder: &Path, compute: Compute) -> Result<Self, LmError> {
        let modules = Module::list(folder)?;
        let [transformer, pooling, tail @ ..] = modules.as_slice() else {
            return Err(unsupported(folder, "expected a Transformer and a Pooling at least"));
        };
        if transformer.kind != "Transformer" || pooling.kind != "Pooling" {
            return Err(unsupported(folder, "expected a Transformer first and a Pooling second"));
        }
        let mean_width = pooling.mean_pooling()?;
        let (model, longest, width) = load_transformer(&transformer.folder, compute)?;
        if mean_width != width {
            return Err(pooling.malformed(&format!("embedding width {mean_width}, but the transformer's is {width}")));
        }
        let settings = transformer.optional_json("sentence_bert_config.json")?;
        let limit = transformer.longest_text(&settings)?.unwrap_or(DEFAULT_LONGEST).min(longest.unwrap_or(u64::MAX));
        let tokenizer = Tokenizer::from_folder(&transformer.folder)?.truncated(limit as usize)?;
        let mut width = width;
        let mut steps = Vec::new();
        for module in tail {
            let (step, out) = module.step(width, compute.device)?;
            steps.push(step);
            width = out;
        }
        Ok(Self {
            transformer: model,
            tail: steps,
            tokenizer,
            lowercase: settings.get("do_lower_case").and_then(Value::as_bool).unwrap_or(false),
            compute,
            dimension: width as usize,
            digest: digest(folder, &modules)?,
        })
    }

    /// Width of an embedding.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// BLAKE3 of the files, hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// One f32 vector per text, in order; batches by length of at most `batch_tokens` padded tokens.
    pub fn embed(&self, texts: &[&str], batch_tokens: usize) -> Result<Vec<Vec<f32>>, LmError> {
        let lowered: Vec<String>;
        let mut texts = texts.to_vec();
        if self.lowercase {
            lowered = texts.iter().map(|text| text.to_lowercase()).collect();
            texts = lowered.iter().map(String::as_str).collect();
        }
        let ids = self.tokenizer.encode_batch(&texts, true)?;
        let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();
        let batches = batches(&lengths, batch_tokens);
        let encoder = Shared::new(self);
        let found = workers::fold(
            self.compute.device,
            batches,
            || Ok(Vec::new()),
            |vectors, batch| {
                let rows: Vec<&[i64]> = batch.iter().map(|&index| ids[index].as_slice()).collect();
                let flat = encoder.get().forward(&rows)?.f_to_device(Device::Cpu)?.f_reshape([-1i64])?;
                let flat = Vec::<f32>::try_from(flat)?;
                let each = batch.iter().zip(flat.chunks_exact(encoder.get().dimension));
                vectors.extend(each.map(|(&index, vector)| (index, vector.to_vec())));
                Ok(())
            },
        )?;
        let mut vectors = vec![Vec::new(); texts.len()];
        for (index, vector) in found.into_iter().flatten() {
            vectors[index] = vector;
        }
        Ok(vectors)
    }

    /// `[texts, dimension]` f32 of token ids.
    fn forward(&self, rows: &[&[i64]]) -> Result<Tensor, LmError> {
        tch::no_grad(|| {
            let batch = Batch::new(rows, self.compute)?;
            let hidden = match &self.transformer {
                Transformer::Bert(bert) => bert.forward(&batch)?,
                Transformer::T5(t5) => t5.forward(&batch)?,
            };
            let mut vectors = batch.mean(&hidden.f_to_kind(Kind::Float)?)?;
            for step in &self.tail {
                vectors = step.forward(&vectors)?;
            }
            Ok(vectors)
        })
    }
}

/// Token ids of texts, padded to the longest.
pub(crate) struct Batch {
    /// `[texts, length]` i64.
    ids: Tensor,
    /// Tokens of each text, at least 1.
    lengths: Vec<usize>,
    /// `[texts, length]` f32, 1 for tokens and 0 for padding; `None` where nothing is padded.
    mask: Option<Tensor>,
    /// What attention adds to its scores, `[texts, 1, 1, length]` in the transformer's kind: 0 or -inf.
    blocked: Option<Tensor>,
}

impl Batch {
    fn new(rows: &[&[i64]], compute: Compute) -> Result<Self, LmError> {
        // A text of no tokens at all (T5 adds an end token, BERT two) still needs a row that pooling can divide by.
        let width = rows.iter().map(|row| row.len()).max().unwrap_or_default().max(1);
        let mut ids = vec![0i64; rows.len() * width];
        let mut mask = vec![0f32; rows.len() * width];
        for (row, (ids, mask)) in rows.iter().zip(ids.chunks_exact_mut(width).zip(mask.chunks_exact_mut(width))) {
            ids[..row.len()].copy_from_slice(row);
            mask[..row.len().max(1)].fill(1.0);
        }
        let shape = [rows.len() as i64, width as i64];
        let ids = Tensor::f_from_slice(&ids)?.f_reshape(shape)?.f_to_device(compute.device)?;
        let lengths = rows.iter().map(|row| row.len().max(1)).collect();
        if rows.iter().all(|row| row.len() == width) {
            return Ok(Self { ids, lengths, mask: None, blocked: None });
        }
        let mask = Tensor::f_from_slice(&mask)?.f_reshape(shape)?.f_to_device(compute.device)?;
        let padding = mask.f_eq(0.0)?.f_reshape([shape[0], 1, 1, shape[1]])?;
        let blocked = Tensor::f_zeros([shape[0], 1, 1, shape[1]], (compute.kind, compute.device))?
            .f_masked_fill(&padding, f64::NEG_INFINITY)?;
        Ok(Self { ids, lengths, mask: Some(mask), blocked: Some(blocked) })
    }

    /// Mean over a text's own tokens: `[texts, length, width]` → `[texts, width]`.
    fn mean(&self, hidden: &Tensor) -> Result<Tensor, LmError> {
        let Some(mask) = &self.mask else {
            return Ok(hidden.f_mean_dim(1i64, false, Kind::Float)?);
        };
        let weighted = hidden.f_mul(&mask.f_unsqueeze(-1)?)?;
        let counts = mask.f_sum_dim_intlist(1i64, true, Kind::Float)?;
        Ok(weighted.f_sum_dim_intlist(1i64, false, Kind::Float)?.f_div(&counts)?)
    }
}

impl Step {
    fn forward(&self, vectors: &Tensor) -> Result<Tensor, LmError> {
        match self {
            Step::Dense(dense) => {
                let out = vectors.f_linear(&dense.weight, dense.bias.as_ref())?;
                Ok(if dense.tanh { out.f_tanh()? } else { out })
            }
            Step::Normalize => {
                let norms = vectors.f_norm_scalaropt_dim(2.0, 1i64, true)?.f_clamp_min(1e-12)?;
                Ok(vectors.f_div(&norms)?)
            }
        }
    }
}

/// Padded tokens that a batch has at least before a text is too short for it: products of fewer are slow.
const ENOUGH: usize = 512;

/// Indices by length, in batches of at most `tokens` padded tokens (at least one text each), longest first, so that
/// memory runs out at once or not at all. A text that would be padding by more than a twentieth begins a new one.
fn batches(lengths: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        let fits = |batch: &[usize]| {
            let width = lengths[batch[0]];
            let alike = 20 * lengths[index] >= 19 * width || batch.len() * width < ENOUGH;
            alike && (batch.len() + 1) * width <= tokens
        };
        match batches.last_mut() {
            Some(batch) if fits(batch) => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

/// One entry of `modules.json`.
struct Module {
    kind: String,
    folder: PathBuf,
    /// The folder relative to the encoder's, for the digest.
    path: String,
}

impl Module {
    fn list(folder: &Path) -> Result<Vec<Self>, LmError> {
        let path = folder.join("modules.json");
        if !path.is_file() {
            return Err(LmError::Malformed(format!(
                "{}: no modules.json\nhelp: --encoder takes a sentence-transformers folder, such as all-MiniLM-L6-v2",
                folder.display()
            )));
        }
        let value = read_json(&path)?;
        let entry = |item: &Value| {
            let kind = item.get("type")?.as_str()?.rsplit('.').next()?.to_string();
            let relative = item.get("path")?.as_str().filter(|path| !path.contains("..") && !path.starts_with('/'))?;
            Some(Self { kind, folder: folder.join(relative), path: relative.to_string() })
        };
        let modules: Option<Vec<Self>> = value.as_array().and_then(|items| items.iter().map(entry).collect());
        let modules = modules.ok_or_else(|| unsupported(folder, "expected a list of modules with type and path"))?;
        match modules.iter().find(|module| !KNOWN_MODULES.contains(&module.kind.as_str())) {
            Some(module) => Err(unsupported(folder, &format!("unknown module {}", module.kind))),
            None => Ok(modules),
        }
    }

    fn malformed(&self, what: &str) -> LmError {
        let path = self.folder.join("config.json");
        LmError::Malformed(format!("{}: {what}\nhelp: download the encoder again", path.display()))
    }

    fn optional_json(&self, name: &str) -> Result<Value, LmError> {
        let path = self.folder.join(name);
        if path.is_file() { read_json(&path) } else { Ok(Value::Null) }
    }

    /// The longest text in tokens, as older folders state it (`max_seq_length`) or newer ones (the tokenizer's).
    fn longest_text(&self, settings: &Value) -> Result<Option<u64>, LmError> {
        let tokenizer = self.optional_json("tokenizer_config.json")?;
        let stated = settings.get("max_seq_length").or_else(|| tokenizer.get("model_max_length"));
        // Where a tokenizer has no limit, transformers writes 1e30.
        Ok(stated.and_then(Value::as_u64).filter(|limit| *limit <= u64::from(u32::MAX)))
    }

    /// Checks that pooling is the mean, and returns its width.
    fn mean_pooling(&self) -> Result<i64, LmError> {
        let config = read_json(&self.folder.join("config.json"))?;
        let field = |new: &str, old: &str| config.get(new).or_else(|| config.get(old)).cloned();
        // Newer folders name the mode, older ones have a flag for each.
        let others = ["cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"];
        let on = |name: &str| config.get(format!("pooling_mode_{name}")).and_then(Value::as_bool).unwrap_or(false);
        let mean = match config.get("pooling_mode") {
            Some(mode) => mode == "mean",
            None => on("mean_tokens") && !others.iter().any(|other| on(other)),
        };
        if !mean {
            return Err(self.malformed("expected mean pooling and no other"));
        }
        let width = field("embedding_dimension", "word_embedding_dimension").and_then(|width| width.as_i64());
        width.ok_or_else(|| self.malformed("expected word_embedding_dimension"))
    }

    /// A step after pooling, with the width that leaves it.
    fn step(&self, width: i64, device: Device) -> Result<(Step, i64), LmError> {
        match self.kind.as_str() {
            "Normalize" => Ok((Step::Normalize, width)),
            "Dense" => self.dense(width, device),
            other => Err(self.malformed(&format!("found {other}, expected Dense or Normalize after Pooling"))),
        }
    }

    fn dense(&self, width: i64, device: Device) -> Result<(Step, i64), LmError> {
        let config = read_json(&self.folder.join("config.json"))?;
        let size = |key: &str| config.get(key).and_then(Value::as_i64).filter(|size| *size > 0);
        let (Some(inputs), Some(outputs)) = (size("in_features"), size("out_features")) else {
            return Err(self.malformed("expected in_features and out_features"));
        };
        if inputs != width {
            return Err(self.malformed(&format!("in_features {inputs}, but the vectors have {width}")));
        }
        let activation = config.get("activation_function").and_then(Value::as_str).unwrap_or_default();
        let tanh = match activation.rsplit('.').next() {
            Some("Identity") => false,
            Some("Tanh") => true,
            _ => return Err(self.malformed("activation_function: expected Identity or Tanh")),
        };
        let float = Compute { device, kind: Kind::Float };
        let weights = Weights::open(&self.folder)?;
        let weight = weights.tensor("linear.weight", &[outputs, inputs], float)?;
        let has_bias = config.get("bias").and_then(Value::as_bool).unwrap_or(true);
        let bias = if has_bias { Some(weights.tensor("linear.bias", &[outputs], float)?) } else { None };
        Ok((Step::Dense(Dense { weight, bias, tanh }), outputs))
    }
}

/// The transformer of a folder, the longest text that its positions allow, and its width.
fn load_transformer(folder: &Path, compute: Compute) -> Result<(Transformer, Option<u64>, i64), LmError> {
    let path = folder.join("config.json");
    let config = read_json(&path)?;
    let weights = Weights::open(folder)?;
    match config.get("model_type").and_then(Value::as_str) {
        Some("bert") => {
            let config = bert::BertConfig::read(&path, &config)?;
            let bert = bert::Bert::load(&weights, &config, compute)?;
            Ok((Transformer::Bert(bert), Some(config.max_positions as u64), config.hidden_size))
        }
        Some("t5") => {
            let config = t5::T5Config::read(&path, &config)?;
            Ok((Transformer::T5(t5::T5::load(&weights, &config, compute)?), None, config.hidden_size))
        }
        other => Err(LmError::Malformed(format!(
            "{}: model_type {:?} is not a known encoder\nhelp: known are bert, t5",
            path.display(),
            other.unwrap_or_default()
        ))),
    }
}

fn unsupported(folder: &Path, what: &str) -> LmError {
    LmError::Malformed(format!(
        "{}: {what}\nhelp: supported are {}, with mean pooling",
        folder.join("modules.json").display(),
        KNOWN_MODULES.join(", ")
    ))
}

/// A positive integer of a configuration.
fn size(path: &Path, config: &Value, key: &str) -> Result<i64, LmError> {
    let value = config.get(key);
    let size = value.and_then(Value::as_i64).filter(|size| (1..=i64::from(i32::MAX)).contains(size));
    size.ok_or_else(|| {
        let found = value.map_or("nothing".to_string(), Value::to_string);
        LmError::Malformed(format!(
            "{}: {key}: found {found}, expected a positive integer\nhelp: download the encoder again",
            path.display()
        ))
    })
}

/// BLAKE3 over what an embedding depends on.
fn digest(folder: &Path, modules: &[Module]) -> Result<String, LmError> {
    let files = ["config.json", "sentence_bert_config.json", "tokenizer.json", "model.safetensors"];
    let mut names = vec!["modules.json".to_string()];
    for module in modules {
        let prefix = module.path.trim_end_matches('/');
        let path = |file: &str| if prefix.is_empty() { file.to_string() } else { format!("{prefix}/{file}") };
        names.extend(files.iter().map(|file| path(file)).filter(|name| folder.join(name).is_file()));
    }
    digest_of(folder, &names)
}

#[cfg(test)]
mod tests;
