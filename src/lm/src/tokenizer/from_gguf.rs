//! `tokenizer.json` as a GGUF file's metadata imply it.
//!
//! GGUF names the split of text into words (`tokenizer.ggml.pre`) without spelling it out; the regular expressions are
//! those of llama.cpp's `llama-vocab.cpp`, in the form of the tokenizers that the models' authors published.
//! SmolLM's split (each digit alone, then GPT-2's) follows the published `tokenizer.json`; transformers 5.23 misses the
//! digits when it reads a GGUF file.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::LmError;
use crate::gguf::Gguf;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `token_type` of a control token, and of one that the user added.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// A sentencepiece word boundary.
const BOUNDARY: &str = "\u{2581}";

/// The content of `tokenizer.json`.
pub(super) fn definition(gguf: &Gguf) -> Result<Value, LmError> {
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let parts = match gguf.text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(gguf, &tokens)?,
        "llama" => sentencepiece(gguf, &tokens)?,
        other => {
            return Err(gguf.malformed(&format!(
                "tokenizer.ggml.model: found {other:?}, expected gpt2 or llama\n\
                 help: use the Hugging Face folder of the model, which has a tokenizer.json"
            )));
        }
    };
    Ok(json!({
        "version": "1.0",
        "added_tokens": added_tokens(gguf, &tokens)?,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(gguf, &tokens, parts.begins_by_default),
        "decoder": parts.decoder,
        "model": parts.model,
    }))
}

struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether texts begin with BOS in a file that does not say.
    begins_by_default: bool,
}

/// GPT-2's byte-level BPE.
fn byte_level(gguf: &Gguf, tokens: &[&str]) -> Result<Parts, LmError> {
    let bytes = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let split = |pattern: &str| {
        let split =
            json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        json!({ "type": "Sequence", "pretokenizers": [split, bytes(false)] })
    };
    // Files from before the key was there name no split, of models with several: llama.cpp guesses, and warns that what
    // comes of it is degraded.
    let pre = gguf.text("tokenizer.ggml.pre").unwrap_or("nothing");
    let pre_tokenizer = match pre {
        "gpt-2" => bytes(true),
        "smollm" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] })
        }
        "llama-bpe" | "llama3" | "llama-v3" => split(LLAMA3),
        "qwen2" | "deepseek-r1-qwen" => split(QWEN2),
        other => {
            return Err(gguf.malformed(&format!(
                "tokenizer.ggml.pre: found {other:?}, expected gpt-2, smollm, llama-bpe or qwen2\n\
                 help: convert the model again, or use its Hugging Face folder, which has a tokenizer.json"
            )));
        }
    };
    let merges = gguf.texts("tokenizer.ggml.merges")?;
    let merges: Option<Vec<Value>> =
        merges.iter().map(|merge| merge.split_once(' ').map(|(left, right)| json!([left, right]))).collect();
    let merges = merges.ok_or_else(|| gguf.malformed("tokenizer.ggml.merges: expected pairs with a space between"))?;
    // Llama 3's published tokenizer takes a word that is a token whole, whatever the merges say, and begins with BOS. Its
    // files leave both to the reader, such as llama.cpp's `llama-vocab.cpp`.
    let is_llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    Ok(Parts {
        normalizer: if pre.contains("qwen") { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer,
        decoder: bytes(true),
        model: model(vocabulary(tokens), merges, json!({ "ignore_merges": is_llama3 })),
        begins_by_default: is_llama3,
    })
}

/// Llama 2's sentencepiece BPE: a file lists scores instead of merges.
fn sentencepiece(gguf: &Gguf, tokens: &[&str]) -> Result<Parts, LmError> {
    let scores = gguf.numbers("tokenizer.ggml.scores")?;
    if scores.len() != tokens.len() {
        return Err(gguf.malformed(&format!(
            "tokenizer.ggml.scores has {} items, tokenizer.ggml.tokens {}\nhelp: convert the model again",
            scores.len(),
            tokens.len()
        )));
    }
    let prefix = gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": BOUNDARY });
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": BOUNDARY }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": BOUNDARY }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = gguf.integer("tokenizer.ggml.unknown_token_id").and_then(|id| tokens.get(usize::try_from(id).ok()?));
    let options = json!({ "byte_fallback": true, "fuse_unk": true, "unk_token": unknown });
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: model(vocabulary(tokens), merges_of(tokens, &scores), options),
        begins_by_default: true,
    })
}

/// The merges that a sentencepiece vocabulary implies, best score first.
/// Source: transformers, `tokenization_utils_base.py`, `generate_merges`.
fn merges_of(tokens: &[&str], scores: &[f64]) -> Vec<Value> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut known: Vec<_> =
            splits.filter_map(|(left, right)| Some(((*ids.get(left)?, *ids.get(right)?), (left, right)))).collect();
        known.sort();
        merges.extend(known.into_iter().map(|(_, pair)| (score, pair)));
    }
    let length = |text: &str| text.chars().count();
    merges.sort_by(|(score, (left, right)), (other, (other_left, other_right))| {
        let lengths = (length(other_left), length(other_right)).cmp(&(length(left), length(right)));
        other.total_cmp(score).then(lengths)
    });
    merges.into_iter().map(|(_, (left, right))| json!([left, right])).collect()
}

fn vocabulary(tokens: &[&str]) -> Value {
    tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.to_string(), json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn model(vocabulary: Value, merges: Vec<Value>, options: Value) -> Value {
    let mut model = json!({ "type": "BPE", "dropout": null, "vocab": vocabulary, "merges": merges });
    if let (Some(model), Value::Object(options)) = (model.as_object_mut(), options) {
        model.extend(options);
    }
    model
}

fn added_tokens(gguf: &Gguf, tokens: &[&str]) -> Result<Vec<Value>, LmError> {
    let kinds = gguf.integers("tokenizer.ggml.token_type")?;
    let added = tokens.iter().zip(kinds).enumerate().filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind));
    Ok(added
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            })
        })
        .collect())
}

/// Adds the begin and end tokens that the file asks for.
fn post_processor(gguf: &Gguf, tokens: &[&str], begins_by_default: bool) -> Value {
    let token = |flag: &str, default: bool, key: &str| {
        let wanted = gguf.flag(flag).unwrap_or(default);
        let id = gguf.integer(key).filter(|_| wanted)?;
        Some((id, *tokens.get(usize::try_from(id).ok()?)?))
    };
    let begin = token("tokenizer.ggml.add_bos_token", begins_by_default, "tokenizer.ggml.bos_token_id");
    let end = token("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id");
    if begin.is_none() && end.is_none() {
        return Value::Null;
    }
    let special =
        |token: Option<(i64, &str)>| token.map(|(_, token)| json!({ "SpecialToken": { "id": token, "type_id": 0 } }));
    let text = |name: &str| Some(json!({ "Sequence": { "id": name, "type_id": 0 } }));
    let sequence = |items: &[Option<Value>]| items.iter().flatten().cloned().collect::<Vec<_>>();
    let single = sequence(&[special(begin), text("A"), special(end)]);
    let pair = sequence(&[special(begin), text("A"), special(end), special(begin), text("B"), special(end)]);
    let used: serde_json::Map<String, Value> = [begin, end]
        .into_iter()
        .flatten()
        .map(|(id, token)| (token.to_string(), json!({ "id": token, "ids": [id], "tokens": [token] })))
        .collect();
    json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used })
}
