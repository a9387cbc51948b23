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

use crate::checkpoint::{Weights, digest_of, read_json, weight_files};
use crate::padding::Padding;
use crate::tokenizer::Tokenizer;
use crate::workers::{self, Shared};
use crate::{LmError, device::Compute, ops};

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

impl Transformer {
    /// How many tokens it knows.
    fn vocabulary(&self) -> Result<i64, LmError> {
        let words = match self {
            Self::Bert(bert) => bert.words(),
            Self::T5(t5) => t5.words(),
        };
        Ok(words.size2()?.0)
    }
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
        refuse_defaults(folder)?;
        let mean_width = pooling.mean_pooling()?;
        let (model, longest, width) = load_transformer(&transformer.folder, compute)?;
        if mean_width != width {
            return Err(pooling.malformed(&format!("embedding width {mean_width}, but the transformer's is {width}")));
        }
        let settings = transformer.optional_json("sentence_bert_config.json")?;
        let limit = transformer.longest_text(&settings)?.unwrap_or(DEFAULT_LONGEST).min(longest.unwrap_or(u64::MAX));
        let tokenizer = Tokenizer::from_folder(&transformer.folder)?.truncated(limit as usize)?;
        tokenizer.check_fits(model.vocabulary()?)?;
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

    /// Padded tokens of a batch where nobody says: on CPU so few that what one layer gives is still in the caches when the
    /// next one reads it.
    pub fn usual_tokens(&self) -> usize {
        match self.compute.device.is_cuda() {
            true => 4096,
            false => 1024,
        }
    }

    /// One f32 vector per text, in order; batches by length of at most `batch_tokens` padded tokens.
    pub fn embed(&self, texts: &[&str], batch_tokens: usize) -> Result<Vec<Vec<f32>>, LmError> {
        let lowered: Vec<String>;
        let mut texts = texts.to_vec();
        if self.lowercase {
            lowered = texts.iter().map(|text| text.to_lowercase()).collect();
            texts = lowered.iter().map(String::as_str).collect();
        }
        let encoder = Shared::new(self);
        let found = workers::fold(
            self.compute.device,
            self.shares(&texts, batch_tokens),
            || Ok(Vec::new()),
            |vectors, share| {
                let encoder = encoder.get();
                let ids = encoder.read(&share.iter().map(|&index| texts[index]).collect::<Vec<_>>())?;
                let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();
                for batch in batches(&lengths, encoder.padding(), batch_tokens) {
                    let rows: Vec<&[i64]> = batch.iter().map(|&place| ids[place].as_slice()).collect();
                    let flat = encoder.forward(&rows)?.f_to_device(Device::Cpu)?.f_reshape([-1i64])?;
                    let flat = Vec::<f32>::try_from(flat)?;
                    let each = batch.iter().zip(flat.chunks_exact(encoder.dimension));
                    vectors.extend(each.map(|(&place, vector)| (share[place], vector.to_vec())));
                }
                Ok(())
            },
        )?;
        let mut vectors = vec![Vec::new(); texts.len()];
        for (index, vector) in found.into_iter().flatten() {
            vectors[index] = vector;
        }
        Ok(vectors)
    }

    /// Indices of the texts that a worker reads and computes together. On CPU, of about a batch by what texts have in bytes:
    /// a worker reads its own while others compute, since reading is mostly taking memory, for which readers would wait for
    /// each other. On another device, all.
    fn shares(&self, texts: &[&str], batch_tokens: usize) -> Vec<Vec<usize>> {
        // A token has more bytes than this, on average, in most languages.
        const BYTES: usize = 3;
        match self.compute.device {
            Device::Cpu => {
                let most = self.tokenizer.limit().unwrap_or(usize::MAX);
                let lengths: Vec<usize> = texts.iter().map(|text| (text.len() / BYTES).clamp(1, most)).collect();
                batches(&lengths, self.padding(), batch_tokens)
            }
            _ => vec![(0..texts.len()).collect()],
        }
    }

    /// Token ids of each text.
    fn read(&self, texts: &[&str]) -> Result<Vec<Vec<i64>>, LmError> {
        match self.compute.device {
            Device::Cpu => texts.iter().map(|text| self.tokenizer.encode_start(text, true)).collect(),
            _ => self.tokenizer.encode_batch(texts, true),
        }
    }

    /// How texts are padded: by what computes all that mixes the tokens of one text with those of another.
    fn padding(&self) -> Padding {
        match &self.transformer {
            Transformer::Bert(bert) if ops::multiplies_all(self.compute, bert.inputs()) => Padding::Pairs,
            // libtorch computes T5's attention.
            _ => Padding::Fours,
        }
    }

    /// `[texts, dimension]` f32 of token ids, which come by falling length.
    fn forward(&self, rows: &[&[i64]]) -> Result<Tensor, LmError> {
        tch::no_grad(|| {
            let batch = Batch::new(rows, self.padding(), self.compute)?;
            let hidden = match &self.transformer {
                Transformer::Bert(bert) => bert.forward(&batch)?,
                Transformer::T5(t5) => t5.forward(&batch)?,
            };
            // Each text by itself: a product of several vectors may add up in another order than one of one.
            let vector = |mean: Tensor| self.tail.iter().try_fold(mean, |vector, step| step.forward(&vector));
            let vectors = batch.means(&hidden)?.into_iter().map(vector).collect::<Result<Vec<_>, _>>()?;
            Ok(Tensor::f_cat(&vectors, 0)?)
        })
    }
}

/// Token ids of texts, one text behind the other, each padded on the right by its own length alone: so that a text's vector
/// does not depend on its company, on a CPU with AVX2 bit for bit. Votes depend on vectors, and one more record must not
/// move others'.
pub(crate) struct Batch {
    /// `[tokens]` i64.
    ids: Tensor,
    /// `[tokens]` i64: the place of each token in its text, padding at that of the last.
    positions: Tensor,
    /// Neighbours of one padded length.
    groups: Vec<Group>,
}

/// Texts of one padded length in a [`Batch`].
pub(crate) struct Group {
    /// Place of the first token.
    first: i64,
    /// Padded length.
    length: i64,
    /// Tokens of each text, at least 1.
    lengths: Vec<usize>,
    /// What attention adds to its scores, `[texts, 1, 1, length]` in the transformer's kind: 0 or -inf.
    blocked: Tensor,
}

impl Batch {
    fn new(rows: &[&[i64]], padding: Padding, compute: Compute) -> Result<Self, LmError> {
        let (mut ids, mut positions, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        for alike in rows.chunk_by(|one, other| padding.padded(one.len()) == padding.padded(other.len())) {
            let (first, length) = (ids.len(), padding.padded(alike[0].len()));
            // A text of no tokens at all (T5 adds an end token, BERT two) still needs a row that pooling can divide by.
            let lengths: Vec<usize> = alike.iter().map(|row| row.len().max(1)).collect();
            for (row, &own) in alike.iter().zip(&lengths) {
                let end = ids.len() + length;
                ids.extend_from_slice(row);
                ids.resize(end, 0);
                positions.extend((0..length).map(|place| place.min(own - 1) as i64));
            }
            groups.push(Group::new(first as i64, length as i64, lengths, compute)?);
        }
        let place = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(compute.device);
        Ok(Self { ids: place(&ids)?, positions: place(&positions)?, groups })
    }

    /// The texts as they stand one behind the other.
    fn texts(&self) -> Vec<ops::Text> {
        let of = |group: &Group, &own: &usize| ops::Text { length: group.length as usize, own };
        self.groups.iter().flat_map(|group| group.lengths.iter().map(move |own| of(group, own))).collect()
    }

    /// What `attend` gives for each group's joined heads `[texts, length, 3 · heads · head_dim]`, of joint ones `[tokens,
    /// 3 · heads · head_dim]`: `[tokens, heads · head_dim]`. It gets the number of the group, too.
    fn attend(
        &self,
        joint: &Tensor,
        attend: impl Fn(usize, &Group, &Tensor) -> Result<Tensor, LmError>,
    ) -> Result<Tensor, LmError> {
        let groups = self.groups.iter().enumerate();
        let each = groups.map(|(index, group)| Ok(attend(index, group, &group.of(joint)?)?.f_flatten(0, 1)?));
        Ok(Tensor::f_cat(&each.collect::<Result<Vec<_>, LmError>>()?, 0)?)
    }

    /// Mean over each text's own tokens, of `[tokens, width]`: `[1, width]` f32 each.
    fn means(&self, hidden: &Tensor) -> Result<Vec<Tensor>, LmError> {
        let mut means = Vec::new();
        for group in &self.groups {
            let texts = group.of(hidden)?;
            for (text, &length) in group.lengths.iter().enumerate() {
                let own = texts.f_get(text as i64)?.f_narrow(0, 0, length as i64)?;
                means.push(own.f_to_kind(Kind::Float)?.f_mean_dim(0i64, true, Kind::Float)?);
            }
        }
        Ok(means)
    }
}

impl Group {
    fn new(first: i64, length: i64, lengths: Vec<usize>, compute: Compute) -> Result<Self, LmError> {
        let texts = lengths.len() as i64;
        let own = Tensor::f_from_slice(&lengths.iter().map(|&own| own as i64).collect::<Vec<_>>())?;
        let padding = Tensor::f_arange(length, (Kind::Int64, Device::Cpu))?.f_ge_tensor(&own.f_unsqueeze(1)?)?;
        let padding = padding.f_to_device(compute.device)?.f_reshape([texts, 1, 1, length])?;
        let blocked = Tensor::f_zeros([texts, 1, 1, length], (compute.kind, compute.device))?
            .f_masked_fill(&padding, f64::NEG_INFINITY)?;
        Ok(Self { first, length, lengths, blocked })
    }

    /// The group's part of `[tokens, width]`, as `[texts, length, width]`.
    fn of(&self, whole: &Tensor) -> Result<Tensor, LmError> {
        let texts = self.lengths.len() as i64;
        Ok(whole.f_narrow(0, self.first, texts * self.length)?.f_unflatten(0, [texts, self.length])?)
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

/// Indices by length, in batches of at most `tokens` padded tokens (at least one text each), longest first, so that
/// memory runs out at once or not at all.
fn batches(lengths: &[usize], padding: Padding, tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut held = 0;
    for index in order {
        held += padding.padded(lengths[index]);
        match batches.last_mut() {
            Some(batch) if held <= tokens => batch.push(index),
            _ => {
                held = padding.padded(lengths[index]);
                batches.push(vec![index]);
            }
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
        let own = settings.get("max_seq_length").filter(|limit| !limit.is_null());
        let stated = own.or_else(|| tokenizer.get("model_max_length"));
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
        self.refuse_other_features()?;
        match self.kind.as_str() {
            "Normalize" => Ok((Step::Normalize, width)),
            "Dense" => self.dense(width, device),
            other => Err(self.malformed(&format!("found {other}, expected Dense or Normalize after Pooling"))),
        }
    }

    /// Refuses a step that takes or gives anything but the vector of a text, or adds what it took to what it gives.
    fn refuse_other_features(&self) -> Result<(), LmError> {
        let config = self.optional_json("config.json")?;
        let expected = [
            ("module_input_name", Value::from("sentence_embedding")),
            ("module_output_name", Value::from("sentence_embedding")),
            ("use_residual", Value::from(false)),
        ];
        let other = |(key, expected): &(&str, Value)| !config[*key].is_null() && config[*key] != *expected;
        match expected.iter().find(|setting| other(setting)) {
            None => Ok(()),
            Some((key, expected)) => {
                let path = self.folder.join("config.json");
                Err(refused(&path, key, &config[*key], &expected.to_string(), "use another encoder"))
            }
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

/// Refuses what sentence-transformers would do besides the modules: a prompt before every text, and vectors cut short.
fn refuse_defaults(folder: &Path) -> Result<(), LmError> {
    let path = folder.join("config_sentence_transformers.json");
    if !path.is_file() {
        return Ok(());
    }
    let config = read_json(&path)?;
    let name = &config["default_prompt_name"];
    let prompt = config["prompts"][name.as_str().unwrap_or_default()].as_str().unwrap_or_default();
    if !prompt.is_empty() {
        let help = "texts are embedded as they are; use another encoder, or set it to null";
        return Err(refused(&path, "default_prompt_name", name, "none", help));
    }
    let cut = &config["truncate_dim"];
    if !cut.is_null() {
        let help = "vectors are taken whole; use another encoder, or set it to null";
        return Err(refused(&path, "truncate_dim", cut, "none", help));
    }
    Ok(())
}

/// A setting that would give other vectors than those computed here.
fn refused(path: &Path, key: &str, found: &Value, expected: &str, help: &str) -> LmError {
    LmError::Malformed(format!("{}: {key}: found {found}, expected {expected}\nhelp: {help}", path.display()))
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
    let files = ["config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"];
    let mut names = vec!["modules.json".to_string()];
    for module in modules {
        let prefix = module.path.trim_end_matches('/');
        let path = |file: &str| if prefix.is_empty() { file.to_string() } else { format!("{prefix}/{file}") };
        names.extend(files.iter().map(|file| path(file)).filter(|name| folder.join(name).is_file()));
        // A pooling has no weights.
        names.extend(weight_files(&module.folder).unwrap_or_default().iter().map(|file| path(file)));
    }
    digest_of(folder, &names)
}

#[cfg(test)]
mod tests;
