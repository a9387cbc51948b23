//! Text to token ids and back, by the `tokenizers` library.
//!
//! Two readings of a text exist. Parsing: `<|im_end|>` in it is the control token. Plain: it is ten ordinary
//! characters. Training on people's text takes the plain one, or a record could end itself or open a system turn.

mod from_gguf;

use std::path::Path;

use serde_json::Value;
use tokenizers::TruncationParams;

use crate::LmError;
use crate::checkpoint::folder::read_json;
use crate::gguf::Gguf;

/// A tokenizer with its special tokens and chat template.
#[derive(Clone)]
pub struct Tokenizer {
    /// Parses special tokens in a text.
    parsing: tokenizers::Tokenizer,
    /// Takes special tokens in a text for ordinary characters.
    plain: tokenizers::Tokenizer,
    /// Tokens that texts are cut at, if they are.
    limit: Option<usize>,
    chat_template: Option<String>,
    named: NamedTokens,
}

/// Bytes of a text that are looked at for each token that is wanted. Few texts have longer tokens than this on average; in
/// those the rest is looked at, too.
const BYTES_PER_TOKEN: usize = 6;

/// Special tokens that chat templates call by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamedTokens {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
}

impl Tokenizer {
    /// From `tokenizer.json` of a Hugging Face folder, with `tokenizer_config.json`, `special_tokens_map.json` and
    /// `chat_template.jinja`.
    pub fn from_folder(folder: &Path) -> Result<Self, LmError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(LmError::Malformed(format!(
                "{}: no tokenizer.json\nhelp: save the model's tokenizer there with `save_pretrained` of a fast \
                 tokenizer, or use a GGUF file, which carries its own",
                folder.display()
            )));
        }
        let mut tokenizer = tokenizers::Tokenizer::from_file(&path).map_err(|error| {
            LmError::Malformed(format!("{}: not a tokenizer: {error}\nhelp: download the model again", path.display()))
        })?;
        // A file may carry the truncation and padding of whoever saved it; here, the caller decides both.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| LmError::Malformed(format!("{}: {error}", path.display())))?;
        let config = folder.join("tokenizer_config.json");
        let config = if config.is_file() { read_json(&config)? } else { Value::Null };
        let template = folder.join("chat_template.jinja");
        let chat_template = match template.is_file() {
            true => Some(
                std::fs::read_to_string(&template)
                    .map_err(|error| LmError::Malformed(format!("{}: {error}", template.display())))?,
            ),
            false => config.get("chat_template").and_then(default_template),
        };
        // As in transformers: what lists no added tokens is of a time when special ones had a file of their own.
        let special = folder.join("special_tokens_map.json");
        let is_old = config.get("added_tokens_decoder").is_none() && special.is_file();
        let special = if is_old { read_json(&special)? } else { Value::Null };
        let named = |key: &str| token_text(&special, key).or_else(|| token_text(&config, key));
        let named = NamedTokens { bos: named("bos_token"), eos: named("eos_token") };
        Ok(Self::new(tokenizer, chat_template, named))
    }

    /// From the metadata of a GGUF file.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, LmError> {
        let definition = from_gguf::definition(gguf)?;
        let tokenizer = serde_json::from_value(definition)
            .map_err(|error| gguf.malformed(&format!("tokenizer.ggml.*: not a tokenizer: {error}")))?;
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let named = |key: &str| {
            let id = gguf.integer(key).and_then(|id| usize::try_from(id).ok())?;
            tokens.get(id).map(|token| token.to_string())
        };
        let named =
            NamedTokens { bos: named("tokenizer.ggml.bos_token_id"), eos: named("tokenizer.ggml.eos_token_id") };
        let chat_template = gguf.text("tokenizer.chat_template").ok().map(str::to_string);
        Ok(Self::new(tokenizer, chat_template, named))
    }

    fn new(parsing: tokenizers::Tokenizer, chat_template: Option<String>, named: NamedTokens) -> Self {
        let mut plain = parsing.clone();
        plain.set_encode_special_tokens(true);
        Self { parsing, plain, limit: None, chat_template, named }
    }

    /// The same tokenizer, cutting texts at `limit` tokens, those that it adds included.
    pub(crate) fn truncated(mut self, limit: usize) -> Result<Self, LmError> {
        let added = self.encode("", true)?.len();
        let no_room = || {
            LmError::Malformed(format!(
                "sentence_bert_config.json: max_seq_length, or else tokenizer_config.json: model_max_length: found \
                 {limit}, expected more than {added}, which begin and end a text\nhelp: raise it"
            ))
        };
        // The library would subtract below zero, and cut nothing.
        if limit <= added {
            return Err(no_room());
        }
        for tokenizer in [&mut self.parsing, &mut self.plain] {
            let truncation = TruncationParams { max_length: limit, ..TruncationParams::default() };
            tokenizer.with_truncation(Some(truncation)).map_err(|_| no_room())?;
        }
        self.limit = Some(limit);
        Ok(self)
    }

    /// Tokens that texts are cut at, if they are.
    pub(crate) fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// Token ids of `text`; `special` adds the model's own begin/end tokens and parses special tokens in the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<i64>, LmError> {
        let encoding = self.reading(special).encode_fast(text, special).map_err(failed)?;
        Ok(ids(&encoding))
    }

    /// The same, sooner: where texts are cut, what lies far behind the cut is not looked at.
    pub(crate) fn encode_start(&self, text: &str, special: bool) -> Result<Vec<i64>, LmError> {
        let start = self.start(text);
        let ids = self.encode(start, special)?;
        match start.len() < text.len() && Some(ids.len()) < self.limit {
            true => self.encode(text, special),
            false => Ok(ids),
        }
    }

    /// Many texts, on several threads. Where texts are cut, what lies far behind the cut is not looked at.
    pub fn encode_batch(&self, texts: &[&str], special: bool) -> Result<Vec<Vec<i64>>, LmError> {
        let starts: Vec<&str> = texts.iter().map(|text| self.start(text)).collect();
        let mut found = self.encode_all(&starts, special)?;
        let too_few =
            |&index: &usize| starts[index].len() < texts[index].len() && Some(found[index].len()) < self.limit;
        let again: Vec<usize> = (0..texts.len()).filter(too_few).collect();
        let whole: Vec<&str> = again.iter().map(|&index| texts[index]).collect();
        for (index, ids) in again.into_iter().zip(self.encode_all(&whole, special)?) {
            found[index] = ids;
        }
        Ok(found)
    }

    fn encode_all(&self, texts: &[&str], special: bool) -> Result<Vec<Vec<i64>>, LmError> {
        let encodings = self.reading(special).encode_batch_fast(texts.to_vec(), special).map_err(failed)?;
        Ok(encodings.iter().map(ids).collect())
    }

    /// As much of a text as most probably has the tokens that are wanted. It ends between two words: tokenizers split texts
    /// at single spaces before all else, so what follows does not change the tokens before.
    fn start<'a>(&self, text: &'a str) -> &'a str {
        let enough = self.limit.map_or(text.len(), |limit| limit.saturating_mul(BYTES_PER_TOKEN)).max(1);
        let between = |at: &usize| match text.as_bytes()[at - 1..] {
            [before, b' ', after, ..] => before.is_ascii_graphic() && after.is_ascii_graphic(),
            _ => false,
        };
        (enough..text.len()).find(between).map_or(text, |end| &text[..end])
    }

    /// Token ids of `text` with its special tokens parsed, and nothing added: for text that a template made.
    pub fn encode_template(&self, text: &str) -> Result<Vec<i64>, LmError> {
        let encoding = self.parsing.encode_fast(text, false).map_err(failed)?;
        Ok(ids(&encoding))
    }

    fn reading(&self, special: bool) -> &tokenizers::Tokenizer {
        if special { &self.parsing } else { &self.plain }
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[i64]) -> Result<String, LmError> {
        let ids: Vec<u32> = ids.iter().map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect();
        self.parsing.decode(&ids, true).map_err(failed)
    }

    /// The model's chat template (Jinja), if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Id of a special token such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<i64> {
        self.parsing.token_to_id(token).map(i64::from)
    }

    /// The id of a text that is one token, special or not.
    pub fn single_token(&self, text: &str) -> Result<i64, LmError> {
        match (self.token_id(text), self.encode_template(text)?.as_slice()) {
            (Some(id), _) => Ok(id),
            (None, [id]) => Ok(*id),
            (None, ids) => Err(LmError::Usage(format!(
                "{text:?} is {} tokens of this model, expected one\n\
                 help: the tokens of a model are listed in its tokenizer.json; special ones stand in added_tokens",
                ids.len()
            ))),
        }
    }

    /// An error where a text could come to have an id that is not of a vocabulary of `size`. Special tokens may: in a
    /// text that is read plainly there are none.
    pub fn check_fits(&self, size: i64) -> Result<(), LmError> {
        let added = self.plain.get_added_tokens_decoder();
        let special = |id: &u32| added.get(id).is_some_and(|token| token.special);
        let outside = |(_, id): &(String, u32)| i64::from(*id) >= size && !special(id);
        match self.plain.get_vocab(true).into_iter().filter(outside).min_by_key(|(_, id)| *id) {
            None => Ok(()),
            Some((token, id)) => Err(LmError::Malformed(format!(
                "tokenizer: token {token:?} has id {id}, outside the model's vocabulary of {size}\n\
                 help: the tokenizer does not belong to this model, or has a token that the model was not given"
            ))),
        }
    }

    /// Special tokens that chat templates call by name.
    pub(crate) fn named(&self) -> &NamedTokens {
        &self.named
    }
}

// The library's errors can quote text, which may be private: what failed is said, the message is not passed on.
fn failed(_: tokenizers::Error) -> LmError {
    LmError::Malformed(
        "tokenizer.json: the tokenizer cannot handle a text\nhelp: it may lack an unknown token or a byte fallback"
            .into(),
    )
}

fn ids(encoding: &tokenizers::Encoding) -> Vec<i64> {
    encoding.get_ids().iter().map(|&id| i64::from(id)).collect()
}

/// A special token of `tokenizer_config.json` or `special_tokens_map.json`: a string, or an object with its content.
fn token_text(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// `chat_template` of `tokenizer_config.json`: one template, or a list of named ones.
fn default_template(value: &Value) -> Option<String> {
    let named = |items: &Vec<Value>| {
        let default = items.iter().find(|item| item.get("name").is_some_and(|name| name == "default"))?;
        Some(default.get("template")?.as_str()?.to_string())
    };
    value.as_str().map(str::to_string).or_else(|| value.as_array().and_then(named))
}

#[cfg(test)]
mod tests;
