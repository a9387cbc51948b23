use super::*;

const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}";
const LLAMA3: &str = "{{- bos_token }}{%- for message in messages %}\
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
    {%- endfor %}";
const LLAMA2: &str = "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
    {{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}\
    {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}\
    {% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

/// A byte-level tokenizer that knows some special tokens.
fn tokenizer(special: &[&str], template: Option<&str>) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let alphabet = (0x21u32..0x7f).chain(0xa1..0xad).chain(0xae..0x144).filter_map(char::from_u32);
    let mut vocabulary = serde_json::Map::new();
    for token in special.iter().map(|token| token.to_string()).chain(alphabet.map(String::from)) {
        let id = vocabulary.len();
        vocabulary.insert(token, id.into());
    }
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            serde_json::json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
        })
        .collect();
    let bytes =
        serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let definition = serde_json::json!({
        "version": "1.0", "added_tokens": added, "normalizer": null, "pre_tokenizer": bytes, "post_processor": null,
        "decoder": bytes, "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    });
    std::fs::write(folder.path().join("tokenizer.json"), definition.to_string()).unwrap();
    let config = serde_json::json!({ "chat_template": template, "bos_token": special[0], "eos_token": { "content": special[1] } });
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

fn config(eos: Vec<i64>) -> DecoderConfig {
    DecoderConfig {
        hidden_size: 1,
        intermediate_size: 1,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        vocab_size: 1,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        max_positions: 1,
        tied_embeddings: true,
        qkv_bias: false,
        eos,
    }
}

fn check(source: &str, special: &[&str], template: Template, prefix: &str, end: &str) {
    let tokenizer = tokenizer(special, Some(source));
    let prompt = Prompt::new(template, &tokenizer, &config(vec![1])).unwrap();
    assert_eq!(prompt.prefix, tokenizer.encode_template(prefix).unwrap(), "{prefix:?}");
    assert_eq!(Some(prompt.end), tokenizer.token_id(end));
}

const CHATML_TOKENS: [&str; 3] = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];
const LLAMA3_TOKENS: [&str; 5] =
    ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"];

#[test]
fn chatml_opens_at_the_user() {
    check(CHATML, &CHATML_TOKENS, Template::User, "<|im_start|>user\n", "<|im_end|>");
    let whole = "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\n";
    check(CHATML, &CHATML_TOKENS, Template::Chat, whole, "<|im_end|>");
}

#[test]
fn llama_3_keeps_its_bos_and_ends_with_the_turn() {
    let opened = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n";
    check(LLAMA3, &LLAMA3_TOKENS, Template::User, opened, "<|eot_id|>");
    check(LLAMA3, &LLAMA3_TOKENS, Template::Chat, opened, "<|eot_id|>");
}

#[test]
fn llama_2_has_no_token_that_ends_a_user_turn_and_takes_eos() {
    check(LLAMA2, &["<s>", "</s>"], Template::User, "<s>[INST] ", "</s>");
}

#[test]
fn tools_and_documents_are_none() {
    let optional = "{% if tools is not none or documents is not none %}{{ '<|im_start|>tools\n' }}{% endif %}";
    let source = format!("{optional}{CHATML}");
    let whole = "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\n";
    check(&source, &CHATML_TOKENS, Template::Chat, whole, "<|im_end|>");
}

#[test]
fn unconditional_begins_with_what_separated_documents() {
    let chatml = tokenizer(&CHATML_TOKENS, None);
    let prompt = Prompt::new(Template::None, &chatml, &config(vec![1])).unwrap();
    assert_eq!((prompt.prefix, prompt.end), (vec![2], 1));
    let other = tokenizer(&["<s>", "</s>"], None);
    let prompt = Prompt::new(Template::None, &other, &config(vec![1])).unwrap();
    assert_eq!((prompt.prefix, prompt.end), (vec![1], 1));
}

#[test]
fn what_cannot_work_is_an_error() {
    let plain = tokenizer(&CHATML_TOKENS, None);
    let error = |result: Result<Prompt, LmError>| result.unwrap_err().to_string();
    assert!(error(Prompt::new(Template::User, &plain, &config(vec![1]))).contains("no chat template"));
    assert!(error(Prompt::new(Template::None, &plain, &config(vec![]))).contains("no eos_token_id"));
    let broken = tokenizer(&CHATML_TOKENS, Some("{% for %}"));
    assert!(error(Prompt::new(Template::User, &broken, &config(vec![1]))).contains("chat template"));
    let silent = tokenizer(&CHATML_TOKENS, Some("hello"));
    assert!(error(Prompt::new(Template::Chat, &silent, &config(vec![1]))).contains("leaves out the user's words"));
}
