//! Random models so small that a stage runs them in seconds, in the formats that real ones come in.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const WIDTH: usize = 32;
const INNER: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const POSITIONS: usize = 256;

const BEGIN: &str = "<|begin|>";
const END: &str = "<|end|>";

/// Writes a Llama as a Hugging Face folder: two layers, printable ASCII as its vocabulary, weights from `seed`.
pub fn write_llama(folder: &Path, seed: u64) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let vocabulary = vocabulary();
    let (begin, end) = (vocabulary[BEGIN], vocabulary[END]);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTH / HEADS,
        "vocab_size": vocabulary.len(), "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": begin, "eos_token_id": end,
    });
    let kv_width = WIDTH / HEADS * KV_HEADS;
    let mut weights = Weights::new(seed);
    weights.random("model.embed_tokens.weight", &[vocabulary.len(), WIDTH]);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        weights.constant(&name("input_layernorm"), &[WIDTH], 1.0);
        weights.constant(&name("post_attention_layernorm"), &[WIDTH], 1.0);
        weights.random(&name("self_attn.q_proj"), &[WIDTH, WIDTH]);
        weights.random(&name("self_attn.k_proj"), &[kv_width, WIDTH]);
        weights.random(&name("self_attn.v_proj"), &[kv_width, WIDTH]);
        weights.random(&name("self_attn.o_proj"), &[WIDTH, WIDTH]);
        weights.random(&name("mlp.gate_proj"), &[INNER, WIDTH]);
        weights.random(&name("mlp.up_proj"), &[INNER, WIDTH]);
        weights.random(&name("mlp.down_proj"), &[WIDTH, INNER]);
    }
    weights.constant("model.norm.weight", &[WIDTH], 1.0);
    weights.write(&folder.join("model.safetensors"))?;
    write_json(&folder.join("config.json"), &config)?;
    write_tokenizer(folder, &vocabulary)
}

/// Writes a BERT as a sentence-transformers folder: mean pooling, normalised, weights from `seed`.
pub fn write_bert(folder: &Path, seed: u64) -> std::io::Result<()> {
    std::fs::create_dir_all(folder.join("1_Pooling"))?;
    let vocabulary = vocabulary();
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "vocab_size": vocabulary.len(), "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "position_embedding_type": "absolute",
    });
    let mut weights = Weights::new(seed);
    for (table, rows) in [("word", vocabulary.len()), ("position", POSITIONS), ("token_type", 2)] {
        weights.random(&format!("embeddings.{table}_embeddings.weight"), &[rows, WIDTH]);
    }
    weights.norm("embeddings.LayerNorm", WIDTH);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        for part in ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"] {
            weights.linear(&name(part), WIDTH, WIDTH);
        }
        weights.norm(&name("attention.output.LayerNorm"), WIDTH);
        weights.linear(&name("intermediate.dense"), INNER, WIDTH);
        weights.linear(&name("output.dense"), WIDTH, INNER);
        weights.norm(&name("output.LayerNorm"), WIDTH);
    }
    weights.write(&folder.join("model.safetensors"))?;
    write_json(&folder.join("config.json"), &config)?;
    write_json(&folder.join("sentence_bert_config.json"), &json!({ "max_seq_length": 128, "do_lower_case": false }))?;
    let pooling = json!({
        "word_embedding_dimension": WIDTH, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true,
        "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false,
    });
    write_json(&folder.join("1_Pooling/config.json"), &pooling)?;
    let module = |index: usize, path: &str, kind: &str| json!({ "idx": index, "name": index.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}") });
    let modules =
        json!([module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling"), module(2, "2_Normalize", "Normalize")]);
    write_json(&folder.join("modules.json"), &modules)?;
    write_tokenizer(folder, &vocabulary)
}

/// Printable ASCII, space and newline as byte-level BPE writes them, after two special tokens.
fn vocabulary() -> HashMap<String, usize> {
    let printable = (b'!'..=b'~').map(|byte| char::from(byte).to_string());
    let special = [BEGIN.to_string(), END.to_string()];
    special.into_iter().chain(["Ġ".to_string(), "Ċ".to_string()]).chain(printable).zip(0..).collect()
}

fn write_tokenizer(folder: &Path, vocabulary: &HashMap<String, usize>) -> std::io::Result<()> {
    let added = [BEGIN, END].map(|token| {
        json!({
            "id": vocabulary[token], "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": [],
        },
    });
    write_json(&folder.join("tokenizer.json"), &tokenizer)?;
    let template = "{% for message in messages %}<|begin|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n\
                    {% endfor %}";
    let config = json!({ "bos_token": BEGIN, "eos_token": END, "chat_template": template });
    write_json(&folder.join("tokenizer_config.json"), &config)
}

fn write_json(path: &Path, value: &Value) -> std::io::Result<()> {
    std::fs::write(path, format!("{value:#}"))
}

/// Named float32 tensors on their way into a safetensors file.
struct Weights {
    tensors: Vec<(String, Vec<usize>, Vec<u8>)>,
    state: u64,
}

impl Weights {
    fn new(seed: u64) -> Self {
        Self { tensors: Vec::new(), state: seed }
    }

    /// Uniform in ±0.2: spread enough that the models tell texts apart, and nothing saturates.
    fn random(&mut self, name: &str, shape: &[usize]) {
        let values = (0..shape.iter().product()).map(|_| (self.uniform() * 0.4 - 0.2) as f32).collect();
        self.push(name, shape, values);
    }

    fn constant(&mut self, name: &str, shape: &[usize], value: f32) {
        self.push(name, shape, vec![value; shape.iter().product()]);
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        self.random(&format!("{name}.weight"), &[outputs, inputs]);
        self.random(&format!("{name}.bias"), &[outputs]);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.constant(&format!("{name}.weight"), &[width], 1.0);
        self.constant(&format!("{name}.bias"), &[width], 0.0);
    }

    fn push(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        self.tensors.push((name.to_string(), shape.to_vec(), bytes));
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): the same weights from the same seed on every machine.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn write(&self, path: &Path) -> std::io::Result<()> {
        let views = self.tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("the shape fits the values");
            (name.as_str(), view)
        });
        safetensors::serialize_to_file(views, None, path).map_err(std::io::Error::other)
    }
}
