//! What is wrong with a workflow file, and where.

use std::fmt;

/// A place in the file, counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where in the file.
    pub at: Position,
    /// Where in the document, such as `spec.templates[2].container.args[0]`; may be empty.
    pub path: String,
    /// What is wrong and what to do.
    pub message: String,
}

/// Everything that is wrong with one file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Findings {
    file: String,
    list: Vec<Finding>,
}

impl Findings {
    /// No findings yet about `file`.
    pub fn new(file: &str) -> Self {
        Self { file: file.to_owned(), list: Vec::new() }
    }

    /// All findings in the order of the file.
    pub fn list(&self) -> &[Finding] {
        &self.list
    }

    /// Adds a finding.
    pub fn push(&mut self, finding: Finding) {
        if !self.list.contains(&finding) {
            self.list.push(finding);
        }
    }

    /// Adds a finding at `at`.
    pub fn add(&mut self, at: Position, path: &str, message: impl Into<String>) {
        self.push(Finding { at, path: path.to_owned(), message: message.into() });
    }

    /// `value` if nothing was found, else the findings so far.
    pub(crate) fn done<T>(&mut self, value: Option<T>) -> Result<T, Findings> {
        match value {
            Some(value) if self.list.is_empty() => Ok(value),
            _ => {
                self.list.sort_by_key(|finding| finding.at);
                Err(self.clone())
            }
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = if self.list.len() == 1 { "1 finding".to_owned() } else { format!("{} findings", self.list.len()) };
        write!(f, "{}: {many}", self.file)?;
        for Finding { at, path, message } in &self.list {
            write!(f, "\n  {}:{}:{}: ", self.file, at.line, at.column)?;
            if !path.is_empty() {
                write!(f, "{path}: ")?;
            }
            f.write_str(message)?;
        }
        Ok(())
    }
}

/// The candidate closest to `word`, if it is close enough to be what was meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (distance(&word.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len().max(word.len()) / 4)
        .min()
        .map(|(_, candidate)| candidate)
}

/// `; did you mean …?`, or nothing.
pub(crate) fn suggestion<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map(|name| format!("; did you mean `{name}`?")).unwrap_or_default()
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitution = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_a_typo_and_nothing_far_away() {
        assert_eq!(nearest("dependancies", ["dependencies", "depends"]), Some("dependencies"));
        assert_eq!(nearest("colour", ["dependencies", "name"]), None);
    }

    #[test]
    fn findings_print_file_line_and_path() {
        let mut findings = Findings::new("a.yaml");
        findings.add(Position { line: 3, column: 5 }, "spec.x", "unknown field");
        assert_eq!(findings.to_string(), "a.yaml: 1 finding\n  a.yaml:3:5: spec.x: unknown field");
    }
}
