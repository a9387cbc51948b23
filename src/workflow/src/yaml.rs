//! YAML as a tree whose every node knows its line and column.
//!
//! Plain scalars resolve as Kubernetes resolves them (YAML 1.1 words such as `yes` are booleans), so that a value that
//! a cluster would refuse for its type is refused here too.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use crate::finding::{Finding, Position};

/// A node with its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Where it starts.
    pub at: Position,
    /// What it is.
    pub value: Value,
}

/// The value of a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `null`, `~` or nothing.
    Null,
    /// A boolean.
    Bool(bool),
    /// A number, as written.
    Number(String),
    /// A string.
    String(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in order.
    Map(Vec<Entry>),
}

/// One entry of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Where the key stands.
    pub at: Position,
    /// Value.
    pub value: Node,
}

impl Node {
    /// What kind of value this is, for messages.
    pub fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

/// Nested deeper than this is refused: nothing real is, and recursion over the tree must not exhaust the stack.
const MAX_DEPTH: usize = 64;
/// Aliases are copied; this bounds what a small file can expand to.
const MAX_NODES: usize = 200_000;

/// Parses one YAML document.
pub fn parse(text: &str) -> Result<Node, Finding> {
    let mut tree = Tree::default();
    let mut documents = 0;
    for event in Parser::new_from_str(text) {
        let (event, span) =
            event.map_err(|error| finding(position(error.marker()), format!("not valid YAML: {}", error.info())))?;
        let at = position(&span.start);
        match event {
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    return Err(finding(at, "a second document starts here; a workflow file holds one".into()));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let forced = match tag.as_deref() {
                    None => style != ScalarStyle::Plain,
                    Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => true,
                    Some(_) => return Err(finding(at, "only the tag !!str is supported".into())),
                };
                let value = if forced { Value::String(text.into_owned()) } else { plain(&text) };
                tree.add(Node { at, value }, anchor)?;
            }
            Event::SequenceStart(anchor, _) => tree.open(at, anchor, false)?,
            Event::MappingStart(anchor, _) => tree.open(at, anchor, true)?,
            Event::SequenceEnd | Event::MappingEnd => tree.close()?,
            Event::Alias(anchor) => {
                let Some(node) = tree.anchors.get(&anchor).cloned() else {
                    return Err(finding(at, "this alias stands inside its own anchor".into()));
                };
                tree.nodes += count(&node);
                tree.add(node, 0)?;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
    }
    tree.root.ok_or_else(|| finding(Position { line: 1, column: 1 }, "the file is empty".into()))
}

fn finding(at: Position, message: String) -> Finding {
    Finding { at, path: String::new(), message }
}

fn position(marker: &Marker) -> Position {
    Position { line: marker.line().max(1), column: marker.col() + 1 }
}

fn count(node: &Node) -> usize {
    1 + match &node.value {
        Value::List(list) => list.iter().map(count).sum(),
        Value::Map(entries) => entries.iter().map(|entry| count(&entry.value)).sum(),
        _ => 0,
    }
}

/// Resolves a plain scalar.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "true" | "True" | "TRUE" => Value::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "false" | "False" | "FALSE" => Value::Bool(false),
        _ if is_number(text) => Value::Number(text.to_owned()),
        _ => Value::String(text.to_owned()),
    }
}

fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if let Some(hex) = digits.strip_prefix("0x") {
        return !hex.is_empty() && hex.chars().all(|c| c.is_ascii_hexdigit());
    }
    // Rust also reads `inf` and `nan`, which YAML spells `.inf` and `.nan`: those stay strings.
    digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && digits.contains(|c: char| c.is_ascii_digit())
        && digits.parse::<f64>().is_ok()
}

/// A collection that is still open.
struct Open {
    node: Node,
    anchor: usize,
    key: Option<(String, Position)>,
}

#[derive(Default)]
struct Tree {
    stack: Vec<Open>,
    anchors: HashMap<usize, Node>,
    root: Option<Node>,
    nodes: usize,
}

impl Tree {
    fn open(&mut self, at: Position, anchor: usize, map: bool) -> Result<(), Finding> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(finding(at, format!("nested deeper than {MAX_DEPTH} levels")));
        }
        let value = if map { Value::Map(Vec::new()) } else { Value::List(Vec::new()) };
        self.stack.push(Open { node: Node { at, value }, anchor, key: None });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Finding> {
        match self.stack.pop() {
            Some(open) => self.add(open.node, open.anchor),
            None => Ok(()),
        }
    }

    /// Puts a finished node where it belongs: the next key, value or item of the innermost open collection.
    fn add(&mut self, node: Node, anchor: usize) -> Result<(), Finding> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(finding(node.at, format!("expands to more than {MAX_NODES} nodes")));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.node.value {
            Value::List(list) => list.push(node),
            Value::Map(entries) => match open.key.take() {
                Some((key, at)) => entries.push(Entry { key, at, value: node }),
                None => {
                    let at = node.at;
                    let key = key_text(node)?;
                    if entries.iter().any(|entry| entry.key == key) {
                        return Err(finding(at, format!("the key `{key}` stands here a second time")));
                    }
                    open.key = Some((key, at));
                }
            },
            _ => {}
        }
        Ok(())
    }
}

fn key_text(node: Node) -> Result<String, Finding> {
    match node.value {
        Value::String(text) | Value::Number(text) => Ok(text),
        Value::Bool(value) => Ok(value.to_string()),
        _ => Err(finding(node.at, format!("a key must be a string, not {}", node.kind()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> Vec<Entry> {
        match parse(text).unwrap().value {
            Value::Map(entries) => entries,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn scalars_resolve_as_kubernetes_resolves_them() {
        let entries = map("a: yes\nb: 'yes'\nc: 1e-3\nd: inf\ne:\nf: 0x1f\ng: 1.2.3\nh: !!str 5\ni: -7\n");
        let values: Vec<Value> = entries.into_iter().map(|entry| entry.value.value).collect();
        let string = |text: &str| Value::String(text.into());
        let number = |text: &str| Value::Number(text.into());
        assert_eq!(
            values,
            [
                Value::Bool(true),
                string("yes"),
                number("1e-3"),
                string("inf"),
                Value::Null,
                number("0x1f"),
                string("1.2.3"),
                string("5"),
                number("-7")
            ]
        );
    }

    #[test]
    fn every_node_knows_its_place() {
        let entries = map("a: 1\nbee:\n  - x\n  - y: z\n");
        assert_eq!(entries[1].at, Position { line: 2, column: 1 });
        let Value::List(list) = &entries[1].value.value else { panic!() };
        assert_eq!(list[1].at, Position { line: 4, column: 5 });
    }

    #[test]
    fn anchors_are_copied_and_bombs_refused() {
        assert_eq!(map("a: &x [1, 2]\nb: *x\n")[1].value.kind(), "a list");
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..9 {
            let aliases = vec![format!("*a{}", i - 1); 10].join(",");
            bomb += &format!("a{i}: &a{i} [{aliases}]\n");
        }
        assert!(parse(&bomb).unwrap_err().message.contains("expands to more"));
    }

    #[test]
    fn bad_documents_are_refused_with_a_place() {
        for (text, message, line) in [
            ("", "empty", 1),
            ("a: 1\na: 2\n", "second time", 2),
            ("a: [1\n", "not valid YAML", 2),
            ("a: 1\n---\nb: 2\n", "second document", 2),
            ("a: !!binary x\n", "tag", 1),
            ("? [a]\n: b\n", "key must be a string", 1),
        ] {
            let found = parse(text).unwrap_err();
            assert!(found.message.contains(message), "{text:?}: {found:?}");
            assert!(found.at.line >= line, "{text:?}: {found:?}");
        }
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(&nested(65)).unwrap_err().message.contains("deeper"));
        assert!(parse(&nested(64)).is_ok());
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}
