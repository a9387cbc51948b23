//! What a command tells on standard output.

use std::io::{self, Write};

use crate::{Failure, Format};

/// What a stage tells at its end, on standard output: public facts only.
#[derive(Clone, Debug)]
pub struct Summary {
    /// One sentence for people; empty for nothing.
    pub text: String,
    /// The same for machines; null for nothing.
    pub json: serde_json::Value,
}

impl Summary {
    /// For commands whose output went out already: tells nothing more.
    pub fn silent() -> Self {
        Self { text: String::new(), json: serde_json::Value::Null }
    }

    /// Writes it to standard output. The shell does so where a command succeeds; one that fails beside what it has to tell
    /// does it itself.
    pub fn print(&self, format: Format) -> Result<(), Failure> {
        match self.render(format) {
            Some(text) => print(text.as_bytes()),
            None => Ok(()),
        }
    }

    fn render(&self, format: Format) -> Option<String> {
        match format {
            Format::Text => (!self.text.is_empty()).then(|| format!("{}\n", self.text)),
            Format::Json => (!self.json.is_null()).then(|| format!("{}\n", self.json)),
        }
    }
}

/// Whether this line of a command's summary says that everything was done before it came: in the words of a text
/// summary, or the field of a JSON one, that all stages use.
pub fn tells_already_done(line: &str) -> bool {
    line.contains("done already") || line.contains(r#""already_done":true"#)
}

/// Writes data to standard output. A reader that went away, as in `doppel query … | head`, is not a failure.
pub fn print(data: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(data).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Transient(format!("standard output: {error}\nhelp: is the disk behind it full?")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_comes_in_the_format_asked_for() {
        let summary = Summary { text: "done".into(), json: serde_json::json!({ "rows": 3 }) };
        assert_eq!(summary.render(Format::Text).as_deref(), Some("done\n"));
        assert_eq!(summary.render(Format::Json).as_deref(), Some("{\"rows\":3}\n"));
        assert_eq!(Summary::silent().render(Format::Text), None);
        assert_eq!(Summary::silent().render(Format::Json), None);
    }

    #[test]
    fn a_stage_that_had_nothing_to_do_is_known_by_its_summary() {
        let json = serde_json::json!({ "stage": "train", "already_done": true });
        let already = Summary { text: "train: run demo is done already".into(), json };
        for format in [Format::Text, Format::Json] {
            assert!(already.render(format).is_some_and(|line| tells_already_done(&line)));
        }
        assert!(!tells_already_done("train: the adapter is in the release zone"));
        assert!(!tells_already_done(r#"{"already_done":false}"#));
    }
}
