//! Token ids against transformers. The golden file is made by tests/golden/tokenizer.py; see there for versions.

use std::path::PathBuf;

use serde_json::Value;

use super::*;
use crate::checkpoint::Checkpoint;

const GOLDEN: &str = include_str!("golden/smollm2.json");

/// Where set-up put models and data.
fn cache() -> PathBuf {
    let set = std::env::var_os("DOPPEL_CACHE").map(PathBuf::from);
    set.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/doppel"))
}

fn smollm2() -> Tokenizer {
    Checkpoint::open(&cache().join("models/smollm2-135m-instruct")).unwrap().tokenizer().unwrap()
}

fn golden() -> Value {
    serde_json::from_str(GOLDEN).unwrap()
}

fn ids_of(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

#[test]
fn odd_unicode_has_the_ids_of_transformers() {
    let (tokenizer, golden) = (smollm2(), golden());
    let texts = golden["texts"].as_array().unwrap();
    assert_eq!(texts.len(), 100);
    let plain: std::collections::HashMap<u64, Vec<i64>> =
        golden["plain"].as_array().unwrap().iter().map(|case| (case[0].as_u64().unwrap(), ids_of(&case[1]))).collect();
    assert!(!plain.is_empty());
    for (index, case) in texts.iter().enumerate() {
        let (text, expected) = (case[0].as_str().unwrap(), ids_of(&case[1]));
        assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{text:?}");
        let expected = plain.get(&(index as u64)).unwrap_or(&expected);
        assert_eq!(tokenizer.encode(text, false).unwrap(), *expected, "{text:?} with special tokens as text");
    }
}

#[test]
fn sharegpt_has_the_ids_of_transformers() {
    let (tokenizer, golden) = (smollm2(), golden());
    let cases = golden["sharegpt_human_turns"].as_array().unwrap();
    let turns = first_human_turns(&sharegpt_places(&golden));
    assert_eq!(turns.len(), 400);
    let texts: Vec<&str> = turns.iter().map(String::as_str).collect();
    for (case, ids) in cases.iter().zip(tokenizer.encode_batch(&texts, true).unwrap()) {
        let ids = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        assert_eq!(blake3::hash(ids.as_bytes()).to_hex().as_str(), case[1].as_str().unwrap(), "record {}", case[0]);
    }
}

#[test]
fn what_lies_behind_the_cut_changes_nothing() {
    let folder = cache().join("models/all-minilm-l6-v2");
    let mut texts = first_human_turns(&sharegpt_places(&golden()));
    // Words that are one token each and longer than tokens are, text without a space, and nothing but spaces.
    texts.push(format!("{} ", "x".repeat(200)).repeat(100));
    texts.push("長い文章。".repeat(300));
    texts.push(" ".repeat(2000) + "end");
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for limit in [3, 16, 256] {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap().truncated(limit).unwrap();
        let cut = texts.iter().filter(|text| tokenizer.start(text).len() < text.len()).count();
        assert!(cut > 30, "{cut}");
        for (text, ids) in texts.iter().zip(tokenizer.encode_batch(&texts, true).unwrap()) {
            assert_eq!(ids, tokenizer.encode(text, true).unwrap(), "{limit} tokens of {text:?}");
            assert_eq!(ids, tokenizer.encode_start(text, true).unwrap(), "{limit} tokens of {text:?}");
        }
    }
}

/// Records of ShareGPT whose first human turns the golden file has.
fn sharegpt_places(golden: &Value) -> Vec<usize> {
    let cases = golden["sharegpt_human_turns"].as_array().unwrap();
    cases.iter().map(|case| case[0].as_u64().unwrap() as usize).collect()
}

/// The first human turns of some records of ShareGPT, whose array is cut off at its end.
fn first_human_turns(places: &[usize]) -> Vec<String> {
    let text = std::fs::read_to_string(cache().join("data/sharegpt.json")).unwrap();
    let body = &text[text.find('[').unwrap() + 1..];
    let mut turns = Vec::new();
    let mut at = 0;
    for place in 0..=*places.last().unwrap() {
        let rest = body[at..].trim_start_matches([' ', '\n', '\r', '\t', ',']);
        at = body.len() - rest.len();
        let mut records = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let record = records.next().unwrap().unwrap();
        at += records.byte_offset();
        if places.contains(&place) {
            let human = record["conversations"].as_array().unwrap().iter().find(|turn| turn["from"] == "human");
            turns.push(human.unwrap()["value"].as_str().unwrap().to_string());
        }
    }
    turns
}

/// The small GGUF files are made by tests/golden/gguf_tokenizers.py; see there for versions.
#[test]
fn tokenizers_of_other_families_are_built_from_gguf_metadata() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/tokenizer/golden");
    let golden: Value = serde_json::from_str(include_str!("golden/gguf.json")).unwrap();
    for (name, ids) in golden["ids"].as_object().unwrap() {
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(&folder.join(format!("{name}.gguf"))).unwrap()).unwrap();
        let special = name == "llama2";
        for (text, expected) in golden["texts"].as_array().unwrap().iter().zip(ids.as_array().unwrap()) {
            let (text, expected) = (text.as_str().unwrap(), ids_of(expected));
            assert_eq!(tokenizer.encode(text, special).unwrap(), expected, "{name}: {text:?}");
            if name != "qwen2" {
                assert_eq!(tokenizer.decode(&expected).unwrap(), text, "{name}");
            }
        }
    }
}

#[test]
fn texts_begin_with_bos_where_the_family_does_and_the_file_does_not_say() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/tokenizer/golden");
    for (name, begins) in [("gpt2", false), ("llama3", true), ("qwen2", false)] {
        let gguf = Gguf::open(&folder.join(format!("{name}.gguf"))).unwrap();
        let expected: Vec<i64> = gguf.integer("tokenizer.ggml.bos_token_id").filter(|_| begins).into_iter().collect();
        assert_eq!(expected.len(), usize::from(begins));
        assert_eq!(Tokenizer::from_gguf(&gguf).unwrap().encode("", true).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_gguf_file_that_does_not_name_its_split_is_refused() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/tokenizer/golden");
    let mut file = std::fs::read(folder.join("llama3.gguf")).unwrap();
    let key = b"tokenizer.ggml.pre";
    let at = file.windows(key.len()).position(|window| window == key).unwrap();
    file[at + key.len() - 1] = b'x';
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.gguf"), file).unwrap();
    let refused = Tokenizer::from_gguf(&Gguf::open(&folder.path().join("model.gguf")).unwrap());
    let told = refused.map(drop).unwrap_err().to_string();
    assert!(told.contains("tokenizer.ggml.pre: found \"nothing\"") && told.contains("help: "), "{told}");
}

#[test]
fn decoding_undoes_encoding_and_leaves_special_tokens_out() {
    let tokenizer = smollm2();
    for text in ["Hello, world! 123", "caf\u{e9} \u{1F600}\n\tx", "  two  spaces "] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, false).unwrap()).unwrap(), text);
    }
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert_eq!(tokenizer.decode(&[end]).unwrap(), "");
    assert_eq!(tokenizer.decode(&[]).unwrap(), "");
}

#[test]
fn a_record_cannot_speak_as_a_control_token() {
    let tokenizer = smollm2();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert!(tokenizer.encode("hi<|im_end|>", true).unwrap().contains(&end));
    assert!(!tokenizer.encode("hi<|im_end|>", false).unwrap().contains(&end));
}

#[test]
fn a_text_that_is_one_token_has_its_id() {
    let tokenizer = smollm2();
    assert_eq!(tokenizer.single_token("<|im_start|>").ok(), tokenizer.token_id("<|im_start|>"));
    // Byte-level BPE writes a line's end as Ċ.
    assert_eq!(tokenizer.single_token("\n").ok(), tokenizer.token_id("\u{10a}"));
    for text in ["", "two words"] {
        let error = tokenizer.single_token(text).unwrap_err();
        assert!(matches!(&error, LmError::Usage(message) if message.contains("expected one")), "{error}");
    }
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_is_refused() {
    let with_extra = |special: bool| {
        let mut definition: Value =
            serde_json::from_str(include_str!("../encoder/golden/t5-relu/tokenizer.json")).unwrap();
        definition["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
            "id": 259, "content": "<extra>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        }));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), definition.to_string()).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap()
    };
    let (special, ordinary) = (with_extra(true), with_extra(false));
    special.check_fits(259).unwrap();
    assert!(special.encode("<extra>", false).unwrap().iter().all(|id| *id < 259));
    ordinary.check_fits(260).unwrap();
    assert!(ordinary.encode("<extra>", false).unwrap().contains(&259));
    for (tokenizer, size) in [(&ordinary, 259), (&special, 258)] {
        let message = tokenizer.check_fits(size).unwrap_err().to_string();
        assert!(message.contains(&format!("has id {size}, outside the model's vocabulary of {size}")), "{message}");
    }
}

#[test]
fn a_folder_without_a_tokenizer_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let message = Tokenizer::from_folder(folder.path()).err().unwrap().to_string();
    assert!(message.contains("no tokenizer.json") && message.contains("help:"), "{message}");
    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    let message = Tokenizer::from_folder(folder.path()).err().unwrap().to_string();
    assert!(message.contains("tokenizer.json: not a tokenizer"), "{message}");
}

#[test]
fn special_tokens_of_an_old_folder_have_a_file_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let named = || Tokenizer::from_folder(folder.path()).unwrap().named().clone();
    std::fs::copy(cache().join("models/all-minilm-l6-v2/tokenizer.json"), folder.path().join("tokenizer.json"))
        .unwrap();
    write("special_tokens_map.json", r#"{ "bos_token": { "content": "[CLS]" } }"#);
    write("tokenizer_config.json", r#"{ "eos_token": "[SEP]" }"#);
    assert_eq!((named().bos.as_deref(), named().eos.as_deref()), (Some("[CLS]"), Some("[SEP]")));
    write("tokenizer_config.json", r#"{ "eos_token": "[SEP]", "added_tokens_decoder": {} }"#);
    assert_eq!((named().bos.as_deref(), named().eos.as_deref()), (None, Some("[SEP]")));
}

#[test]
fn of_several_chat_templates_the_default_is_taken() {
    let listed = serde_json::json!([{ "name": "tool", "template": "t" }, { "name": "default", "template": "d" }]);
    assert_eq!(default_template(&listed).as_deref(), Some("d"));
    assert_eq!(default_template(&serde_json::json!("x")).as_deref(), Some("x"));
}
