//! One conversation as the later steps see it, and how it is laid out in the four shapes that we read.

use crate::config::{Config, Language, Shape, UnitRule};

/// A conversation, reduced to what the steps need. No `Debug`: it holds private text.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Raw value of the unit column; empty under `--unit-rule record`.
    pub source: String,
    /// The first user turn, or `None` where the conversation does not open with one.
    pub text: Option<String>,
    /// Value of the language column, where there is one.
    pub language: Option<String>,
    /// Whether personal information was redacted from it.
    pub redacted: bool,
    /// Whether moderation flagged any of its turns.
    pub flagged: bool,
}

/// What is wrong with a field, without its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldProblem {
    /// The field, with the way to it.
    pub field: String,
    /// Type that was found, `missing` or `empty`.
    pub found: &'static str,
    /// What was expected.
    pub expected: &'static str,
    /// What to do.
    pub help: &'static str,
}

impl FieldProblem {
    /// The ordinary case: the input does not have the shape that it was said to have.
    pub fn new(field: impl Into<String>, found: &'static str, expected: &'static str) -> Self {
        let help = "check --shape and the column flags against the input, or repair the row";
        Self { field: field.into(), found, expected, help }
    }

    /// The unit column is missing, empty or not an id.
    pub fn unit(column: &str, found: &'static str) -> Self {
        Self {
            field: column.to_owned(),
            found,
            expected: "a string or an integer that names the privacy unit",
            help: "name the column with --unit-column, or protect each record on its own with --unit-rule record",
        }
    }
}

/// Names of the fields of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnFields {
    /// Who speaks.
    pub role: &'static str,
    /// What is said.
    pub content: &'static str,
}

/// Where the parts of a record are in one input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Column of the turns, or of the text.
    pub body: String,
    /// Fields of a turn; `None` for plain text.
    pub turns: Option<TurnFields>,
    /// Column of the privacy unit; `None` under `--unit-rule record`.
    pub unit: Option<String>,
    /// How the unit follows from its column.
    pub unit_rule: UnitRule,
    /// Column of the language; `None` where all languages stay and no column was named.
    pub language: Option<String>,
    /// Whether a row without a language is an error, since the operator named the column.
    pub language_required: bool,
}

/// Columns that mark records to drop, wherever they occur; named as in LMSYS-Chat-1M.
pub const REDACTED: &str = "redacted";
/// See [`REDACTED`].
pub const MODERATION: &str = "openai_moderation";

/// What is found where a row has two fields of one name: nobody can say which one is meant.
pub const TWICE: &str = "given twice";

impl Layout {
    /// Finds the layout of an input whose columns `has` tells; `Err` lists what was looked for.
    pub fn resolve(config: &Config, has: impl Fn(&str) -> bool) -> Result<Self, String> {
        let shape = match config.shape {
            Shape::Auto => detect(config, &has)?,
            given => given,
        };
        let (body, turns, default_unit) = match shape {
            Shape::Auto | Shape::Text => (config.text_column.as_deref().unwrap_or("text"), None, "id"),
            Shape::Lmsys => ("conversation", Some(OPENAI_TURN), "conversation_id"),
            Shape::Sharegpt => ("conversations", Some(SHAREGPT_TURN), "id"),
            Shape::Openai => ("messages", Some(OPENAI_TURN), "id"),
        };
        let unit = config.unit_column.as_deref().unwrap_or(default_unit);
        let default_language = (config.language != Language::Any).then(|| "language".to_owned());
        let layout = Self {
            body: body.to_owned(),
            turns,
            unit: (!config.unit_rule.is_record()).then(|| unit.to_owned()),
            unit_rule: config.unit_rule.clone(),
            language: config.language_column.clone().or(default_language),
            language_required: config.language_column.is_some(),
        };
        let mut columns = layout.columns();
        columns.sort_unstable();
        let twice = columns.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0].to_owned());
        match twice {
            Some(column) => Err(format!("column `{column}` cannot be two of text, privacy unit, language and mark")),
            None => Ok(layout),
        }
    }

    /// Refuses a value of the unit column that leaves no unit: all records like it would be one.
    pub fn check_unit(&self, source: &str) -> Result<(), FieldProblem> {
        match &self.unit {
            Some(column) if source.trim().is_empty() => Err(FieldProblem::unit(column, "empty")),
            Some(column) if self.unit_rule.unit(source, "").trim().is_empty() => {
                Err(FieldProblem::unit(column, "empty before its first separator"))
            }
            _ => Ok(()),
        }
    }

    /// All columns that this layout reads where they exist.
    pub fn columns(&self) -> Vec<&str> {
        let mut columns = vec![self.body.as_str(), REDACTED, MODERATION];
        columns.extend(self.language.as_deref());
        columns.extend(self.unit.as_deref());
        columns
    }
}

const OPENAI_TURN: TurnFields = TurnFields { role: "role", content: "content" };
const SHAREGPT_TURN: TurnFields = TurnFields { role: "from", content: "value" };

fn detect(config: &Config, has: impl Fn(&str) -> bool) -> Result<Shape, String> {
    if let Some(column) = &config.text_column {
        return if has(column) { Ok(Shape::Text) } else { Err(format!("there is no column `{column}`")) };
    }
    [
        ("conversation", Shape::Lmsys),
        ("conversations", Shape::Sharegpt),
        ("messages", Shape::Openai),
        ("text", Shape::Text),
    ]
    .into_iter()
    .find_map(|(column, shape)| has(column).then_some(shape))
    .ok_or_else(|| "there is no column `conversation`, `conversations`, `messages` or `text`".to_owned())
}

/// What a turn's role means to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The person whose instructions we learn from.
    User,
    /// The operator of the model: passed over when it comes before the first user turn.
    System,
    /// The model, or anything else: a conversation that opens with it has lost its first user turn.
    Other,
}

impl Speaker {
    /// Reads a role as the three chat shapes spell it.
    pub fn of(role: &str) -> Self {
        match role {
            "user" | "human" => Speaker::User,
            "system" | "developer" => Speaker::System,
            _ => Speaker::Other,
        }
    }
}
