//! `{{…}}` in texts.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::finding::{Findings, suggestion};
use crate::model::Text;

/// A stretch of a text.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece<'a> {
    /// Stands for itself.
    Plain(&'a str),
    /// What stood between `{{` and `}}`.
    Tag(&'a str),
}

/// Splits a text into its pieces.
pub(crate) fn pieces(mut raw: &str) -> Result<Vec<Piece<'_>>, String> {
    let mut pieces = Vec::new();
    while let Some(start) = raw.find("{{") {
        let Some(end) = raw[start..].find("}}") else {
            return Err("`{{` without `}}`".to_owned());
        };
        if start > 0 {
            pieces.push(Piece::Plain(&raw[..start]));
        }
        pieces.push(Piece::Tag(raw[start + 2..start + end].trim()));
        raw = &raw[start + end + 2..];
    }
    if !raw.is_empty() {
        pieces.push(Piece::Plain(raw));
    }
    Ok(pieces)
}

/// What names stand for at some place of the file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    /// `workflow.name`.
    pub workflow: String,
    /// `workflow.parameters.…`.
    pub parameters: BTreeMap<String, String>,
    /// `inputs.parameters.…`.
    pub inputs: BTreeMap<String, String>,
    /// `item`, inside a fan-out.
    pub item: Option<Value>,
}

impl Scope {
    /// The value of a tag, or why it has none.
    pub fn get(&self, tag: &str) -> Result<String, String> {
        if tag == "workflow.name" {
            return Ok(self.workflow.clone());
        }
        if let Some(name) = tag.strip_prefix("workflow.parameters.") {
            return lookup(&self.parameters, name, "the workflow has no parameter");
        }
        if let Some(name) = tag.strip_prefix("inputs.parameters.") {
            return lookup(&self.inputs, name, "this template has no input parameter");
        }
        if tag == "item" || tag.starts_with("item.") {
            return self.item(tag);
        }
        Err(refusal(tag))
    }

    fn item(&self, tag: &str) -> Result<String, String> {
        let Some(item) = &self.item else {
            return Err(format!("`{{{{{tag}}}}}` stands outside of a task with items"));
        };
        match tag.strip_prefix("item.") {
            None => Ok(written(item)),
            Some(key) => match item.get(key) {
                Some(value) => Ok(written(value)),
                None => Err(format!("the item {item} has no `{key}`")),
            },
        }
    }
}

/// Why a tag that is none of the supported ones is refused.
pub(crate) fn refusal(tag: &str) -> String {
    let supported = "`workflow.name`, `workflow.parameters.…`, `inputs.parameters.…`, `item` and `item.…`";
    if tag.starts_with('=') {
        format!("the local runner supports no expressions (`{{{{={{…}}}}}}`); it knows {supported}")
    } else {
        format!("`{{{{{tag}}}}}` is nothing the local runner knows; it knows {supported}")
    }
}

fn lookup(values: &BTreeMap<String, String>, name: &str, otherwise: &str) -> Result<String, String> {
    let found = values.get(name).cloned();
    found.ok_or_else(|| format!("{otherwise} `{name}`{}", suggestion(name, values.keys().map(String::as_str))))
}

/// A JSON value as Argo writes it into a text.
pub(crate) fn written(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `text` with its tags replaced; what cannot be replaced becomes a finding.
pub(crate) fn expand(text: &Text, scope: &Scope, findings: &mut Findings) -> String {
    let pieces = match pieces(&text.raw) {
        Ok(pieces) => pieces,
        Err(message) => {
            findings.add(text.at, &text.path, message);
            return String::new();
        }
    };
    let mut out = String::with_capacity(text.raw.len());
    for piece in pieces {
        match piece {
            Piece::Plain(plain) => out.push_str(plain),
            Piece::Tag(tag) => match scope.get(tag) {
                Ok(value) => out.push_str(&value),
                Err(message) => findings.add(text.at, &text.path, message),
            },
        }
    }
    out
}

/// `text` as Kubernetes hands it to a container: `$(NAME)` becomes what `value` knows, or stays; `$$` becomes `$`.
/// Source: <https://github.com/kubernetes/kubernetes/blob/master/third_party/forked/golang/expansion/expand.go>.
pub(crate) fn references<'v>(text: &str, mut value: impl FnMut(&str) -> Option<&'v str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        rest = after;
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = after.strip_prefix('(').and_then(|inside| inside.split_once(')')) {
            match value(name) {
                Some(value) => out.push_str(value),
                None => out.extend(["$(", name, ")"]),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(raw: &str) -> Text {
        Text { raw: raw.into(), at: Default::default(), path: String::new() }
    }

    fn scope() -> Scope {
        Scope {
            workflow: "demo".into(),
            parameters: [("run".to_owned(), "r1".to_owned())].into(),
            inputs: [("shard".to_owned(), "3".to_owned())].into(),
            item: Some(serde_json::json!({"of": 8, "name": "x"})),
        }
    }

    #[test]
    fn tags_are_replaced() {
        for (raw, expected) in [
            ("plain", "plain"),
            ("{{workflow.parameters.run}}-{{ inputs.parameters.shard }}/{{item.of}}", "r1-3/8"),
            ("{{workflow.name}}", "demo"),
            ("{{item}}", r#"{"of":8,"name":"x"}"#),
            ("}} {", "}} {"),
        ] {
            let mut findings = Findings::new("f");
            assert_eq!(
                expand(&text(raw), &scope(), &mut findings).replace(r#""name":"x","of":8"#, r#""of":8,"name":"x""#),
                expected
            );
            assert!(findings.list().is_empty(), "{findings}");
        }
    }

    /// Cases of Kubernetes' own table, `expand_test.go` beside its source.
    #[test]
    fn references_are_replaced_as_kubernetes_does() {
        let value = |name: &str| match name {
            "VAR_A" => Some("A"),
            "VAR_EMPTY" => Some(""),
            "VAR_REF" => Some("$(VAR_A)"),
            _ => None,
        };
        for (text, expected) in [
            ("$(VAR_A)", "A"),
            ("___$(VAR_REF)___", "___$(VAR_A)___"),
            ("foo$(VAR_EMPTY)bar", "foobar"),
            ("$(VAR_DNE)", "$(VAR_DNE)"),
            ("$$(VAR_A)_$(VAR_A)", "$(VAR_A)_A"),
            ("f000-$$VAR_A", "f000-$VAR_A"),
            ("$$$(VAR_A)", "$A"),
            ("$$$$(foo)$(bar)", "$$(foo)$(bar)"),
            ("$VAR_A) $ $(VAR_A", "$VAR_A) $ $(VAR_A"),
            ("$()$(VAR_A)$", "$()A$"),
        ] {
            assert_eq!(references(text, value), expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_replaced_is_a_finding_with_a_hint() {
        for (raw, expected) in [
            ("{{workflow.parameters.rum}}", "did you mean `run`?"),
            ("{{inputs.parameters.other}}", "no input parameter `other`"),
            ("{{tasks.a.outputs.result}}", "nothing the local runner knows"),
            ("{{=1+1}}", "no expressions"),
            ("{{item.missing}}", "has no `missing`"),
            ("{{item", "without"),
        ] {
            let mut findings = Findings::new("f");
            expand(&text(raw), &scope(), &mut findings);
            assert!(findings.to_string().contains(expected), "{raw}: {findings}");
        }
    }
}
