//! Reads the fields of a mapping and accounts for every one of them: used, only for a cluster, not supported here, or
//! unknown.

use crate::finding::{Findings, suggestion};
use crate::model::Text;
use crate::yaml::{Entry, Node, Value};

/// The Argo fields of one kind of object that this crate does not use.
pub(crate) struct Known {
    /// They place or describe pods and change nothing of what a task computes.
    pub cluster: &'static [&'static str],
    /// They would change what happens, so they are refused.
    pub unsupported: &'static [&'static str],
}

/// A mapping whose fields are being read.
pub(crate) struct Fields<'a, 'f> {
    entries: Vec<(&'a Entry, bool)>,
    asked: Vec<&'static str>,
    pub path: String,
    node: &'a Node,
    pub findings: &'f mut Findings,
}

/// Path of a field below `path`.
pub(crate) fn below(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Position and path of a node as a [`Text`] with no content.
pub(crate) fn place(node: &Node, path: &str) -> Text {
    Text { raw: String::new(), at: node.at, path: path.to_owned() }
}

/// The value under `key` of a mapping, without accounting for it; `null` counts as absent.
pub(crate) fn entry<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    let Value::Map(entries) = &node.value else {
        return None;
    };
    let entry = entries.iter().find(|entry| entry.key == key)?;
    (entry.value.value != Value::Null).then_some(&entry.value)
}

impl<'a, 'f> Fields<'a, 'f> {
    /// Opens `node`, which must be a mapping.
    pub fn open(node: &'a Node, path: &str, findings: &'f mut Findings) -> Option<Self> {
        let Value::Map(entries) = &node.value else {
            findings.add(node.at, path, format!("must be a mapping, not {}", node.kind()));
            return None;
        };
        let entries = entries.iter().map(|entry| (entry, false)).collect();
        Some(Self { entries, asked: Vec::new(), path: path.to_owned(), node, findings })
    }

    /// The value under `key`; `null` counts as absent.
    pub fn get(&mut self, key: &'static str) -> Option<&'a Node> {
        self.asked.push(key);
        let (entry, used) = self.entries.iter_mut().find(|(entry, _)| entry.key == key)?;
        *used = true;
        (entry.value.value != Value::Null).then_some(&entry.value)
    }

    /// Path of `key` in this mapping.
    pub fn at(&self, key: &str) -> String {
        below(&self.path, key)
    }

    /// The value under `key`, whose absence is a finding.
    pub fn required(&mut self, key: &'static str) -> Option<&'a Node> {
        let node = self.get(key);
        if node.is_none() {
            self.findings.add(self.node.at, &self.path, format!("the field `{key}` is missing"));
        }
        node
    }

    /// A string.
    pub fn text(&mut self, key: &'static str) -> Option<Text> {
        let node = self.get(key)?;
        text(node, &self.at(key), self.findings)
    }

    /// A string, whose absence is a finding.
    pub fn required_text(&mut self, key: &'static str) -> Option<Text> {
        let node = self.required(key)?;
        text(node, &self.at(key), self.findings)
    }

    /// A string, number or boolean, as Argo's `IntOrString` and `AnyString` take.
    pub fn scalar(&mut self, key: &'static str) -> Option<Text> {
        let node = self.get(key)?;
        scalar(node, &self.at(key), self.findings)
    }

    /// A boolean.
    pub fn flag(&mut self, key: &'static str) -> Option<bool> {
        let node = self.get(key)?;
        match node.value {
            Value::Bool(value) => Some(value),
            _ => {
                self.findings.add(
                    node.at,
                    &below(&self.path, key),
                    format!("must be true or false, not {}", node.kind()),
                );
                None
            }
        }
    }

    /// A list, empty where absent: each item with its path.
    pub fn list(&mut self, key: &'static str) -> Vec<(&'a Node, String)> {
        let path = self.at(key);
        match self.get(key) {
            None => Vec::new(),
            Some(Node { value: Value::List(items), .. }) => {
                items.iter().enumerate().map(|(i, node)| (node, format!("{path}[{i}]"))).collect()
            }
            Some(node) => {
                self.findings.add(node.at, &path, format!("must be a list, not {}", node.kind()));
                Vec::new()
            }
        }
    }

    /// A list of strings.
    pub fn texts(&mut self, key: &'static str) -> Vec<Text> {
        let items = self.list(key);
        items.into_iter().filter_map(|(node, path)| text(node, &path, self.findings)).collect()
    }

    /// Judges the fields that nobody asked for.
    pub fn finish(self, known: &Known) {
        for (entry, used) in &self.entries {
            let key = entry.key.as_str();
            if *used || known.cluster.contains(&key) {
                continue;
            }
            let message = if known.unsupported.contains(&key) {
                "the local runner does not support this field, and it would change what happens".to_owned()
            } else {
                let names = self.asked.iter().chain(known.cluster).chain(known.unsupported).copied();
                format!("unknown field{}", suggestion(key, names))
            };
            self.findings.add(entry.at, &below(&self.path, key), message);
        }
    }
}

/// A node that must be a string.
pub(crate) fn text(node: &Node, path: &str, findings: &mut Findings) -> Option<Text> {
    match &node.value {
        Value::String(raw) => Some(Text { raw: raw.clone(), at: node.at, path: path.to_owned() }),
        Value::Number(raw) => {
            findings.add(node.at, path, format!("must be a string, not a number; write \"{raw}\""));
            None
        }
        _ => {
            findings.add(node.at, path, format!("must be a string, not {}", node.kind()));
            None
        }
    }
}

/// A node that must be a string, number or boolean.
pub(crate) fn scalar(node: &Node, path: &str, findings: &mut Findings) -> Option<Text> {
    let raw = match &node.value {
        Value::String(raw) | Value::Number(raw) => raw.clone(),
        Value::Bool(value) => value.to_string(),
        _ => {
            findings.add(node.at, path, format!("must be a string or a number, not {}", node.kind()));
            return None;
        }
    };
    Some(Text { raw, at: node.at, path: path.to_owned() })
}
