//! What a preflight finds.

use std::collections::BTreeMap;

use stage::Failure;

/// A finding, with the exit code that it would have had.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// What is wrong and what to do.
    pub message: String,
    /// Exit code of the stage contract.
    pub code: u8,
}

impl Finding {
    /// A finding about usage.
    pub fn usage(message: String) -> Self {
        Self { message, code: 2 }
    }
}

impl From<Failure> for Finding {
    fn from(failure: Failure) -> Self {
        Self { code: failure.exit_code(), message: failure.to_string() }
    }
}

impl From<&lake::LakeError> for Finding {
    fn from(error: &lake::LakeError) -> Self {
        Self { message: error.to_string(), code: error.exit_code() }
    }
}

/// No finding, or a failure with all of them.
pub fn verdict(findings: &[Finding]) -> Result<(), Failure> {
    // What only a person can mend comes before what may mend itself.
    let Some(code) = findings.iter().map(|finding| finding.code).min() else {
        return Ok(());
    };
    let many = if findings.len() == 1 { "1 finding".to_owned() } else { format!("{} findings", findings.len()) };
    let mut text = format!("the preflight has {many}; nothing was started");
    for finding in findings {
        text += &format!("\n- {}", finding.message.replace('\n', "\n  "));
    }
    Err(match code {
        3 => Failure::Input(text),
        4 => Failure::Budget(text),
        5 => Failure::Transient(text),
        _ => Failure::Usage(text),
    })
}

/// Findings of tasks, each once, after the names of all that it is about.
pub fn merged<'a>(found: impl Iterator<Item = (&'a str, Finding)>) -> Vec<Finding> {
    let mut tasks: BTreeMap<Finding, Vec<&str>> = BTreeMap::new();
    for (task, finding) in found {
        let tasks = tasks.entry(finding).or_default();
        if !tasks.contains(&task) {
            tasks.push(task);
        }
    }
    let named = |(finding, tasks): (Finding, Vec<&str>)| Finding {
        message: format!("{}: {}", tasks.join(", "), finding.message),
        ..finding
    };
    tasks.into_iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_of_many_tasks_is_told_once() {
        let finding = || Finding::usage("no `x`".into());
        let found = [("train", finding()), ("embed", finding()), ("train", finding())];
        let told: Vec<String> = merged(found.into_iter()).into_iter().map(|finding| finding.message).collect();
        assert_eq!(told, ["train, embed: no `x`"]);
    }

    #[test]
    fn the_verdict_is_what_a_person_must_mend_first() {
        assert!(verdict(&[]).is_ok());
        let finding = |code| Finding { message: format!("code {code}"), code };
        let failure = verdict(&[finding(5), finding(3)]).unwrap_err();
        assert_eq!(failure.exit_code(), 3);
        assert!(failure.to_string().contains("2 findings"));
    }
}
