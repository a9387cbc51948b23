//! The tiny shapes as GGUF files, against the folders that they were converted from.
//!
//! The conversion follows llama.cpp's `convert_hf_to_gguf.py` (`LlamaModel`, `Qwen2Model`): names, the order of rows of q
//! and k, and RoPE's divisors are written down here once more, not taken from the code that reads them.

use safetensors::SafeTensors;

use super::*;

/// A file in the making. All its tensors are F32.
#[derive(Default)]
struct Writer {
    counts: [u64; 2],
    metadata: Vec<u8>,
    tensors: Vec<u8>,
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Writer {
    /// A metadata value of one of GGUF's types.
    fn value(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.metadata.extend([&text(key), &kind.to_le_bytes()[..], value].concat());
        self.counts[1] += 1;
    }

    fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.tensors.extend(text(name));
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        self.tensors.extend(shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        self.tensors.extend(0u32.to_le_bytes());
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.counts[0] += 1;
    }

    fn bytes(self) -> Vec<u8> {
        let counts = self.counts.map(u64::to_le_bytes).concat();
        let mut file = [b"GGUF", &3u32.to_le_bytes()[..], &counts, &self.metadata, &self.tensors].concat();
        file.resize(file.len().next_multiple_of(32), 0);
        [file, self.data].concat()
    }
}

/// `gguf-py`, `tensor_mapping.py`.
fn renamed(name: &str) -> String {
    let names = [
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ];
    names.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// `LlamaModel.permute`: of each head, the rows of both halves in turn.
fn permuted(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (row, width) = (values.len() / rows, rows / heads);
    let source = |at: usize| at / width * width + (at % 2) * (width / 2) + at % width / 2;
    (0..rows).flat_map(|at| values[source(at) * row..(source(at) + 1) * row].to_vec()).collect()
}

/// The model in `folder` as the content of a GGUF file, with RoPE's divisors where there are some.
fn converted(folder: &Path, divisors: &[f32]) -> Vec<u8> {
    let mut file = written(folder);
    if !divisors.is_empty() {
        file.tensor("rope_freqs.weight", &[divisors.len()], divisors);
    }
    file.bytes()
}

/// The model in `folder` as a GGUF file to which more may be written.
fn written(folder: &Path) -> Writer {
    let config = json(&folder.join("config.json"));
    let architecture = config["model_type"].as_str().unwrap();
    let mut file = Writer::default();
    file.value("general.architecture", 8, &text(architecture));
    for (key, field) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ] {
        file.value(&format!("{architecture}.{key}"), 4, &(config[field].as_u64().unwrap() as u32).to_le_bytes());
    }
    for (key, value) in [
        ("attention.layer_norm_rms_epsilon", &config["rms_norm_eps"]),
        ("rope.freq_base", &config["rope_parameters"]["rope_theta"]),
    ] {
        file.value(&format!("{architecture}.{key}"), 6, &(value.as_f64().unwrap() as f32).to_le_bytes());
    }
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let mut values: Vec<f32> =
            view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        let heads = match name.rsplit('.').nth(1).unwrap() {
            "q_proj" => &config["num_attention_heads"],
            "k_proj" => &config["num_key_value_heads"],
            _ => &Value::Null,
        };
        if let (Some(heads), "llama") = (heads.as_u64(), architecture) {
            values = permuted(&values, view.shape()[0], heads as usize);
        }
        file.tensor(&renamed(&name), view.shape(), &values);
    }
    file
}

fn logits_of(file: &[u8], ids: &Tensor) -> Tensor {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.gguf"), file).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    Decoder::load(&checkpoint, cpu(DtypeChoice::F32)).unwrap().logits(ids).unwrap()
}

#[test]
fn a_gguf_file_has_the_logits_of_its_folder() {
    // An output of its own (llama2), biases on q, k and v (qwen2), grouped queries (qwen2, smollm2).
    for name in ["llama2", "qwen2", "smollm2"] {
        let (ids, expected) = golden_values(name);
        let found = logits_of(&converted(&golden(name), &[]), &ids);
        let difference = largest_difference(&found, &expected);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn what_a_gguf_file_has_beyond_what_is_computed_is_refused() {
    let refused = |more: &dyn Fn(&mut Writer)| {
        let mut file = written(&golden("llama2"));
        more(&mut file);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.gguf"), file.bytes()).unwrap();
        let config = Checkpoint::open(folder.path()).and_then(|checkpoint| checkpoint.decoder_config());
        config.map(drop).err().map(|error| error.to_string())
    };
    let factor = |key: &'static str, factor: f32| refused(&move |file| file.value(key, 6, &factor.to_le_bytes()));
    assert_eq!(refused(&|_| {}), None);
    assert_eq!(factor("llama.rope.scaling.factor", 1.0), None);
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let told = factor(key, 4.0).unwrap();
        assert!(told.contains(key) && told.contains("found 4.0, expected none"), "{told}");
    }
    for name in ["blk.0.attn_output.bias", "blk.1.ffn_up.bias", "blk.9.attn_q.weight", "blk.0.attn_q_norm.weight"] {
        let told = refused(&|file: &mut Writer| file.tensor(name, &[2], &[0.0, 1.0])).unwrap();
        assert!(told.contains(name) && told.contains("help: "), "{told}");
    }
}

#[test]
fn divisors_of_rope_in_a_gguf_file_are_llama_3s_scaling() {
    // The published models were trained on 8,192 positions, and GGUF does not say on how many.
    let folder = tempfile::tempdir().unwrap();
    let mut config = json(&golden("llama3").join("config.json"));
    config["rope_parameters"]["original_max_position_embeddings"] = 8192.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(golden("llama3").join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let (ids, _) = golden_values("llama3");
    let decoder = Decoder::load(&Checkpoint::open(folder.path()).unwrap(), cpu(DtypeChoice::F32)).unwrap();
    let expected = decoder.logits(&ids).unwrap();
    // `LlamaModel.generate_extra_tensors`, with factor 8 and wavelengths of 6, 167, 4,443 and 118,143 positions: kept, kept,
    // between, stretched.
    let wavelength = 2.0 * std::f32::consts::PI * 500_000f32.powf(0.5);
    let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
    let divisors = [1.0, 1.0, 1.0 / ((1.0 - smooth) / 8.0 + smooth), 8.0];
    let found = logits_of(&converted(folder.path(), &divisors), &ids);
    assert!(largest_difference(&found, &expected) < 1e-5, "{}", largest_difference(&found, &expected));
    let without = logits_of(&converted(folder.path(), &[]), &ids);
    assert!(largest_difference(&without, &expected) > 1e-3, "{}", largest_difference(&without, &expected));
}
