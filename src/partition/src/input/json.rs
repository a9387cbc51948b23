//! One JSON record, read in a single pass over its bytes.
//!
//! Every value of interest is first taken for what it is ([`Scalar`], [`Body`], [`Moderation`]) and judged afterwards,
//! so that serde never gets to word a type error: its messages quote the value that it found.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::record::{FieldProblem, Layout, MODERATION, REDACTED, Record, Speaker, TWICE, TurnFields};

/// Why a record could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JsonProblem {
    /// Not JSON, at an offset in the record.
    Syntax {
        /// Byte offset in the record.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
        /// Whether the record ended too early, as in a file that was cut off.
        cut_off: bool,
    },
    /// JSON of another shape.
    Field(FieldProblem),
}

/// Reads one record.
pub fn read(bytes: &[u8], layout: &Layout) -> Result<Record, JsonProblem> {
    parse(bytes, RecordSeed(layout))?.into_record(layout).map_err(JsonProblem::Field)
}

/// Names of the fields of one record.
pub fn keys(bytes: &[u8]) -> Result<Vec<String>, JsonProblem> {
    parse(bytes, KeysSeed)
}

fn parse<'de, S: DeserializeSeed<'de>>(bytes: &'de [u8], seed: S) -> Result<S::Value, JsonProblem> {
    // Checked for the whole record, since serde_json does not look into the strings that it skips.
    let text = std::str::from_utf8(bytes).map_err(|error| JsonProblem::Syntax {
        offset: error.valid_up_to() as u64,
        problem: "invalid UTF-8",
        cut_off: error.error_len().is_none(),
    })?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = seed.deserialize(&mut deserializer).map_err(|error| syntax(text, &error))?;
    deserializer.end().map_err(|error| syntax(text, &error))?;
    Ok(value)
}

fn syntax(text: &str, error: &serde_json::Error) -> JsonProblem {
    let line_start = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum::<usize>();
    let (problem, cut_off) = match error.classify() {
        serde_json::error::Category::Eof => ("the record ends too early", true),
        serde_json::error::Category::Data => ("expected a JSON object", false),
        _ => ("invalid JSON", false),
    };
    JsonProblem::Syntax { offset: (line_start + error.column().saturating_sub(1)) as u64, problem, cut_off }
}

/// A value that should be a string, a number or a truth value.
enum Scalar<'de> {
    Missing,
    Text(Cow<'de, str>),
    Bool(bool),
    Integer(String),
    Other(&'static str),
}

impl<'de> Scalar<'de> {
    fn kind(&self) -> &'static str {
        match self {
            Scalar::Missing => "missing",
            Scalar::Text(_) => "a string",
            Scalar::Bool(_) => "a truth value",
            Scalar::Integer(_) => "an integer",
            Scalar::Other(kind) => kind,
        }
    }

    fn is_absent(&self) -> bool {
        matches!(self, Scalar::Missing | Scalar::Other(NULL))
    }

    fn text(self, field: &str) -> Result<Cow<'de, str>, FieldProblem> {
        match self {
            Scalar::Text(text) => Ok(text),
            other => Err(FieldProblem::new(field, other.kind(), "a string")),
        }
    }
}

const NULL: &str = "null";

/// Reads the value of a key into its place.
fn put<'de, A: MapAccess<'de>>(object: &mut A, place: &mut Scalar<'de>) -> Result<(), A::Error> {
    let value = object.next_value_seed(ScalarSeed)?;
    *place = if let Scalar::Missing = place { value } else { Scalar::Other(TWICE) };
    Ok(())
}

/// Accepts any value; implements the [`Visitor`] methods by which scalars and others arrive.
macro_rules! visit_scalars {
    ($scalar:expr) => {
        fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Text(Cow::Borrowed(value))))
        }
        fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Text(Cow::Owned(value.to_owned()))))
        }
        fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Bool(value)))
        }
        fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Integer(value.to_string())))
        }
        fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Integer(value.to_string())))
        }
        fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Other("a number")))
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok($scalar(Scalar::Other(NULL)))
        }
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a value")
        }
    };
}

/// Consumes what remains of an array and says that it was one.
fn skip_array<'de, A: SeqAccess<'de>>(mut array: A) -> Result<Scalar<'de>, A::Error> {
    while array.next_element::<IgnoredAny>()?.is_some() {}
    Ok(Scalar::Other("an array"))
}

/// Consumes what remains of an object and says that it was one.
fn skip_object<'de, A: MapAccess<'de>>(mut object: A) -> Result<Scalar<'de>, A::Error> {
    while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
    Ok(Scalar::Other("an object"))
}

struct ScalarSeed;

impl<'de> DeserializeSeed<'de> for ScalarSeed {
    type Value = Scalar<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ScalarSeed {
    type Value = Scalar<'de>;
    visit_scalars!(std::convert::identity);
    fn visit_seq<A: SeqAccess<'de>>(self, array: A) -> Result<Self::Value, A::Error> {
        skip_array(array)
    }
    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Self::Value, A::Error> {
        skip_object(object)
    }
}

/// A key of an object, borrowed where it has no escapes.
struct KeySeed;

impl<'de> DeserializeSeed<'de> for KeySeed {
    type Value = Cow<'de, str>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for KeySeed {
    type Value = Cow<'de, str>;
    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(value))
    }
    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(value.to_owned()))
    }
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
}

/// The column of the turns or of the text.
enum Body<'de> {
    Scalar(Scalar<'de>),
    Turns(Result<Option<Cow<'de, str>>, FieldProblem>),
}

struct BodySeed<'l>(&'l Layout, TurnFields);

impl<'de> DeserializeSeed<'de> for BodySeed<'_> {
    type Value = Body<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for BodySeed<'_> {
    type Value = Body<'de>;
    visit_scalars!(Body::Scalar);

    /// Reads turns up to the first that is not the system's; the rest is skipped.
    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
        let Self(layout, fields) = self;
        let mut first = Ok(FirstTurn::PassOver);
        let mut index = 0;
        while let Some(turn) = array.next_element_seed(TurnSeed(fields))? {
            let field = |name: &str| format!("{}[{index}].{name}", layout.body);
            first = turn.first_user_text(fields, field);
            index += 1;
            if !matches!(first, Ok(FirstTurn::PassOver)) {
                break;
            }
        }
        skip_array(array)?;
        Ok(Body::Turns(first.map(|turn| if let FirstTurn::User(text) = turn { Some(text) } else { None })))
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Self::Value, A::Error> {
        skip_object(object).map(Body::Scalar)
    }
}

enum Turn<'de> {
    Fields { role: Scalar<'de>, content: Scalar<'de> },
    Other(&'static str),
}

enum FirstTurn<'de> {
    /// The system speaks: look further.
    PassOver,
    /// The first user turn.
    User(Cow<'de, str>),
    /// The conversation does not open with the user.
    NotUser,
}

impl<'de> Turn<'de> {
    fn first_user_text(
        self,
        fields: TurnFields,
        field: impl Fn(&str) -> String,
    ) -> Result<FirstTurn<'de>, FieldProblem> {
        let (role, content) = match self {
            Turn::Fields { role, content } => (role, content),
            Turn::Other(kind) => {
                let place = field("").trim_end_matches('.').to_owned();
                return Err(FieldProblem::new(place, kind, "an object"));
            }
        };
        match Speaker::of(&role.text(&field(fields.role))?) {
            Speaker::System => Ok(FirstTurn::PassOver),
            Speaker::Other => Ok(FirstTurn::NotUser),
            Speaker::User => content.text(&field(fields.content)).map(FirstTurn::User),
        }
    }
}

struct TurnSeed(TurnFields);

impl<'de> DeserializeSeed<'de> for TurnSeed {
    type Value = Turn<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TurnSeed {
    type Value = Turn<'de>;
    visit_scalars!(|scalar: Scalar<'_>| Turn::Other(scalar.kind()));

    fn visit_seq<A: SeqAccess<'de>>(self, array: A) -> Result<Self::Value, A::Error> {
        skip_array(array).map(|scalar| Turn::Other(scalar.kind()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let (mut role, mut content) = (Scalar::Missing, Scalar::Missing);
        while let Some(key) = object.next_key_seed(KeySeed)? {
            if key == self.0.role {
                put(&mut object, &mut role)?;
            } else if key == self.0.content {
                put(&mut object, &mut content)?;
            } else {
                object.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Turn::Fields { role, content })
    }
}

/// Whether any turn was flagged; `Err` is what stood there instead of an array of objects with `flagged`.
type Moderation = Result<bool, FieldProblem>;

struct ModerationSeed;

impl<'de> DeserializeSeed<'de> for ModerationSeed {
    type Value = Moderation;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

fn no_moderation(scalar: Scalar<'_>) -> Moderation {
    if scalar.is_absent() {
        Ok(false)
    } else {
        Err(FieldProblem::new(MODERATION, scalar.kind(), "an array with a truth value `flagged` in each object"))
    }
}

impl<'de> Visitor<'de> for ModerationSeed {
    type Value = Moderation;
    visit_scalars!(no_moderation);

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
        const FLAGGED: TurnFields = TurnFields { role: "flagged", content: "" };
        let mut any = Ok(false);
        while let Some(turn) = array.next_element_seed(TurnSeed(FLAGGED))? {
            match turn {
                Turn::Fields { role: Scalar::Bool(flagged), .. } => any = any.map(|any| any || flagged),
                Turn::Fields { role: other, .. } => {
                    any = Err(FieldProblem::new(format!("{MODERATION}[].flagged"), other.kind(), "a truth value"));
                }
                Turn::Other(kind) => any = Err(FieldProblem::new(format!("{MODERATION}[]"), kind, "an object")),
            }
        }
        Ok(any)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Self::Value, A::Error> {
        skip_object(object).map(no_moderation)
    }
}

struct RawRecord<'de> {
    body: Body<'de>,
    unit: Scalar<'de>,
    language: Scalar<'de>,
    redacted: Scalar<'de>,
    moderation: Option<Moderation>,
}

impl RawRecord<'_> {
    fn into_record(self, layout: &Layout) -> Result<Record, FieldProblem> {
        let source = match (&layout.unit, self.unit) {
            (None, _) => String::new(),
            (Some(_), Scalar::Text(id)) => id.into_owned(),
            (Some(_), Scalar::Integer(id)) => id,
            (Some(column), other) => return Err(FieldProblem::unit(column, other.kind())),
        };
        let text = match (self.body, layout.turns) {
            (Body::Scalar(scalar), None) => Some(scalar.text(&layout.body)?.into_owned()),
            (Body::Scalar(scalar), Some(_)) => {
                return Err(FieldProblem::new(&layout.body, scalar.kind(), "an array of turns"));
            }
            (Body::Turns(text), _) => text?.map(Cow::into_owned),
        };
        let language = match (&layout.language, self.language) {
            (None, _) => None,
            (Some(_), absent) if absent.is_absent() && !layout.language_required => None,
            (Some(column), given) => Some(given.text(column)?.into_owned()),
        };
        let redacted = match self.redacted {
            Scalar::Bool(redacted) => redacted,
            absent if absent.is_absent() => false,
            other => return Err(FieldProblem::new(REDACTED, other.kind(), "a truth value")),
        };
        Ok(Record { source, text, language, redacted, flagged: self.moderation.unwrap_or(Ok(false))? })
    }
}

struct RecordSeed<'l>(&'l Layout);

impl<'de> DeserializeSeed<'de> for RecordSeed<'_> {
    type Value = RawRecord<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RecordSeed<'_> {
    type Value = RawRecord<'de>;

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let layout = self.0;
        let mut raw = RawRecord {
            body: Body::Scalar(Scalar::Missing),
            unit: Scalar::Missing,
            language: Scalar::Missing,
            redacted: Scalar::Missing,
            moderation: None,
        };
        while let Some(key) = object.next_key_seed(KeySeed)? {
            if key == layout.body {
                let body = match layout.turns {
                    Some(fields) => object.next_value_seed(BodySeed(layout, fields))?,
                    None => Body::Scalar(object.next_value_seed(ScalarSeed)?),
                };
                let first = matches!(raw.body, Body::Scalar(Scalar::Missing));
                raw.body = if first { body } else { Body::Scalar(Scalar::Other(TWICE)) };
            } else if layout.unit.as_deref() == Some(&*key) {
                put(&mut object, &mut raw.unit)?;
            } else if layout.language.as_deref() == Some(&*key) {
                put(&mut object, &mut raw.language)?;
            } else if key == REDACTED {
                put(&mut object, &mut raw.redacted)?;
            } else if key == MODERATION {
                let moderation = object.next_value_seed(ModerationSeed)?;
                raw.moderation = match raw.moderation {
                    None => Some(moderation),
                    Some(_) => Some(no_moderation(Scalar::Other(TWICE))),
                };
            } else {
                object.next_value::<IgnoredAny>()?;
            }
        }
        Ok(raw)
    }

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
}

struct KeysSeed;

impl<'de> DeserializeSeed<'de> for KeysSeed {
    type Value = Vec<String>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for KeysSeed {
    type Value = Vec<String>;

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut keys = Vec::new();
        while let Some(key) = object.next_key_seed(KeySeed)? {
            keys.push(key.into_owned());
            object.next_value::<IgnoredAny>()?;
        }
        Ok(keys)
    }

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
