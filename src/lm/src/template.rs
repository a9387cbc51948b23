//! Prompt templates: what stands before an instruction, and what ends it.
//!
//! A chat template is a Jinja program that renders whole conversations. What it puts around a user's words is found by
//! rendering a conversation whose user turn is a marker, and cutting there.

use clap::ValueEnum;
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use crate::{LmError, checkpoint::DecoderConfig, tokenizer::Tokenizer};

/// Stands for the user's words while a template is worked out; no template contains it.
const MARKER: &str = "\u{E000}doppel\u{E001}";

/// What stands around an instruction.
// The variants' first paragraphs are the help of the flag.
#[derive(ValueEnum, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// Unconditional.
    ///
    /// BOS and EOS only, as in the paper.
    None,
    /// The chat template's user turn.
    ///
    /// For SmolLM2 `<|im_start|>user\n` … `<|im_end|>`.
    User,
    /// The whole chat template.
    ///
    /// Including the system prompt, up to the user's turn.
    Chat,
}

impl Template {
    /// As on the command line, and in the manifests of train and synthesize.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::User => "user",
            Self::Chat => "chat",
        }
    }
}

/// A template applied to one tokenizer: prompt ids, and the ids that end an instruction.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Ids before the instruction (never empty: at least BOS/EOS).
    pub prefix: Vec<i64>,
    /// The id that ends the instruction: label of the last position and stop token.
    pub end: i64,
}

impl Prompt {
    /// Works the template out for a tokenizer.
    pub fn new(template: Template, tokenizer: &Tokenizer, config: &DecoderConfig) -> Result<Self, LmError> {
        match template {
            Template::None => Self::unconditional(tokenizer, config),
            Template::Chat => Self::chat(tokenizer, config, |around| around),
            Template::User => Self::chat(tokenizer, config, user_turn),
        }
    }

    /// What the tokenizer puts before a text; failing that, the token that separated documents in pretraining, which
    /// for most models is `<|endoftext|>`; failing that, the end token itself.
    fn unconditional(tokenizer: &Tokenizer, config: &DecoderConfig) -> Result<Self, LmError> {
        let end = *config.eos.first().ok_or_else(|| {
            LmError::Malformed(
                "config.json: no eos_token_id: nothing can end a text\nhelp: add it to generation_config.json".into(),
            )
        })?;
        let mut prefix = tokenizer.encode("", true)?;
        prefix.retain(|id| *id != end);
        if prefix.is_empty() {
            prefix.push(tokenizer.token_id("<|endoftext|>").unwrap_or(end));
        }
        Ok(Self { prefix, end })
    }

    fn chat(tokenizer: &Tokenizer, config: &DecoderConfig, choose: impl Fn(Around) -> Around) -> Result<Self, LmError> {
        let source = tokenizer.chat_template().ok_or_else(|| {
            LmError::Usage(
                "--template: the model has no chat template\nhelp: use --template none, or an instruct model".into(),
            )
        })?;
        let around = choose(around_user(source, tokenizer)?);
        let prefix = tokenizer.encode_template(&around.before)?;
        let after = tokenizer.encode_template(&around.after)?;
        // What follows a user's words is the end token for ChatML and Llama 3; Llama 2 has ` [/INST]` there, many
        // tokens and none that ends, so the model's own end token is learned and waited for instead.
        let ends = after.first().copied().filter(|_| starts_with_special(&around.after, tokenizer));
        let end = ends.or(config.eos.first().copied()).ok_or_else(|| {
            LmError::Malformed("chat template: no token ends a user turn, and config.json has no eos_token_id".into())
        })?;
        if prefix.is_empty() {
            return Err(LmError::Usage(
                "--template: the chat template puts nothing before a user turn\nhelp: use --template none".into(),
            ));
        }
        Ok(Self { prefix, end })
    }
}

/// What a template puts before and after a user's words.
struct Around {
    before: String,
    /// The same without a system turn.
    turn: String,
    after: String,
}

fn user_turn(around: Around) -> Around {
    Around { before: around.turn.clone(), ..around }
}

/// Renders the template for one user turn, and for a later one, which shows what a turn alone looks like.
fn around_user(source: &str, tokenizer: &Tokenizer) -> Result<Around, LmError> {
    let first = render(source, tokenizer, &[("user", MARKER)])?;
    let (before, after) = cut(&first)?;
    let turn = later_turn(source, tokenizer).unwrap_or_else(|| before.to_string());
    // A text that the model has only seen behind a BOS keeps it.
    let bos = tokenizer.named().bos.as_deref().unwrap_or_default();
    let turn = if before.starts_with(bos) && !turn.starts_with(bos) { format!("{bos}{turn}") } else { turn };
    Ok(Around { before: before.to_string(), turn, after: after.to_string() })
}

/// What opens a user turn in the middle of a conversation, where no system prompt stands: the text between the
/// assistant's words and the user's, without that which ends the assistant's.
fn later_turn(source: &str, tokenizer: &Tokenizer) -> Option<String> {
    let answered = render(source, tokenizer, &[("user", "x"), ("assistant", MARKER)]).ok()?;
    let (_, answer_end) = answered.split_once(MARKER)?;
    let asked = render(source, tokenizer, &[("user", "x"), ("assistant", MARKER), ("user", MARKER)]).ok()?;
    let turn = asked.split(MARKER).nth(1)?.strip_prefix(answer_end)?;
    Some(turn.to_string()).filter(|turn| !turn.is_empty())
}

fn cut(text: &str) -> Result<(&str, &str), LmError> {
    text.split_once(MARKER).ok_or_else(|| {
        LmError::Malformed("chat template: it leaves out the user's words\nhelp: use --template none".into())
    })
}

fn starts_with_special(text: &str, tokenizer: &Tokenizer) -> bool {
    let with = tokenizer.encode_template(text).unwrap_or_default();
    let without = tokenizer.encode(text, false).unwrap_or_default();
    with.first() != without.first()
}

fn render(source: &str, tokenizer: &Tokenizer, turns: &[(&str, &str)]) -> Result<String, LmError> {
    let mut environment = Environment::new();
    // As transformers sets Jinja up for chat templates.
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(string_methods);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    // A date in a prompt would make two runs differ, so the one that templates fall back to is fixed.
    environment.add_function("strftime_now", |_: String| "26 Jul 2024".to_string());
    let messages: Vec<_> = turns.iter().map(|(role, content)| context! { role, content }).collect();
    let named = tokenizer.named();
    let rendered = environment.render_str(
        source,
        context! {
            messages,
            add_generation_prompt => false,
            // transformers passes both, with none where there are none.
            tools => (),
            documents => (),
            bos_token => named.bos.as_deref().unwrap_or_default(),
            eos_token => named.eos.as_deref().unwrap_or_default(),
        },
    );
    rendered.map_err(|error| {
        LmError::Malformed(format!("chat template: {error}\nhelp: use --template none, or mend the template"))
    })
}

/// Python's string methods that chat templates call.
fn string_methods(
    _: &minijinja::State<'_, '_>,
    value: &minijinja::Value,
    method: &str,
    arguments: &[minijinja::Value],
) -> Result<minijinja::Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("{method} is not supported"));
    let text = value.as_str().ok_or_else(unknown)?;
    let argument = || arguments.first().and_then(|argument| argument.as_str()).ok_or_else(unknown);
    Ok(match method {
        "strip" if arguments.is_empty() => text.trim().into(),
        "lstrip" if arguments.is_empty() => text.trim_start().into(),
        "rstrip" if arguments.is_empty() => text.trim_end().into(),
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "startswith" => text.starts_with(argument()?).into(),
        "endswith" => text.ends_with(argument()?).into(),
        "split" => text.split(argument()?).map(str::to_string).collect::<Vec<_>>().into(),
        _ => return Err(unknown()),
    })
}

#[cfg(test)]
mod tests;
