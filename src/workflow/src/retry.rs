//! When a failed attempt is tried again.
//!
//! Argo's `retryStrategy`, with one local default: where no `expression` says otherwise, exit codes 2, 3 and 4 (wrong
//! usage, bad input, refused by a budget) are final, since the same command would only fail again.

use std::time::Duration;

use crate::finding::Findings;
use crate::model::{self, Text};
use crate::quantity;
use crate::substitute::{Scope, expand};

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this exit code.
    Exit(i32),
    /// Killed by this signal.
    Signal(i32),
    /// The process could not be started.
    NotStarted(String),
}

impl Outcome {
    /// Whether the attempt did its work.
    pub fn success(&self) -> bool {
        *self == Outcome::Exit(0)
    }

    /// The exit code as a shell and a cluster report it.
    pub fn code(&self) -> i32 {
        match self {
            Outcome::Exit(code) => *code,
            Outcome::Signal(signal) => 128 + signal,
            Outcome::NotStarted(_) => 127,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Exit(code) => write!(f, "exit code {code}"),
            Outcome::Signal(signal) => write!(f, "killed by signal {signal}"),
            Outcome::NotStarted(why) => write!(f, "not started: {why}"),
        }
    }
}

/// `retryPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Whatever happened.
    Always,
    /// When the command failed.
    OnFailure,
    /// When the platform failed: here, when the process could not be started.
    OnError,
    /// When the command says that trying again may help: exit code 5 of the stage contract.
    OnTransientError,
}

/// `retryStrategy`, resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// Most retries; `None` is no limit.
    pub limit: Option<u32>,
    /// Which failures are retried.
    pub policy: Policy,
    /// First pause.
    pub pause: Duration,
    /// What each further pause multiplies by.
    pub factor: u32,
    /// Longest pause.
    pub cap: Option<Duration>,
    /// Condition on the exit code.
    pub condition: Option<Condition>,
}

impl Retry {
    /// No retries.
    pub fn never() -> Self {
        Self { limit: Some(0), policy: Policy::OnFailure, pause: Duration::ZERO, factor: 1, cap: None, condition: None }
    }

    /// The pause before the next attempt after `attempts` of them, the last with `outcome`; `None` where it is final.
    pub fn next(&self, attempts: u32, outcome: &Outcome) -> Option<Duration> {
        if outcome.success() || self.limit.is_some_and(|limit| attempts > limit) {
            return None;
        }
        let wanted = match (self.policy, outcome) {
            (Policy::Always, _) => true,
            (Policy::OnFailure, outcome) => !matches!(outcome, Outcome::NotStarted(_)),
            (Policy::OnError, outcome) => matches!(outcome, Outcome::NotStarted(_)),
            (Policy::OnTransientError, outcome) => *outcome == Outcome::Exit(5),
        };
        let allowed = match &self.condition {
            Some(condition) => condition.holds(outcome.code()),
            None => !matches!(outcome, Outcome::Exit(2..=4)),
        };
        if !wanted || !allowed {
            return None;
        }
        let growth = self.factor.max(1).checked_pow(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
        Some(self.pause.saturating_mul(growth).min(self.cap.unwrap_or(Duration::MAX)))
    }
}

/// Resolves a declaration; what cannot be read becomes a finding.
pub(crate) fn resolve(declared: &model::Retry, scope: &Scope, findings: &mut Findings) -> Retry {
    let mut read = |text: &Option<Text>| text.as_ref().map(|text| (text.clone(), expand(text, scope, findings)));
    let [limit, policy, pause, factor, cap, expression] = [
        read(&declared.limit),
        read(&declared.policy),
        read(&declared.duration),
        read(&declared.factor),
        read(&declared.cap),
        read(&declared.expression),
    ];
    let limit = parsed(limit, "a whole number", |text| text.parse().ok(), findings);
    let condition = parsed(expression, CONDITION, Condition::parse, findings);
    // Argo's default too: with an expression, the expression alone decides.
    let default = if condition.is_some() { Policy::Always } else { Policy::OnFailure };
    let policy = parsed(policy, "Always, OnFailure, OnError or OnTransientError", policy_named, findings);
    let factor = parsed(factor, "a whole number", |text| text.parse().ok(), findings);
    Retry {
        limit,
        policy: policy.unwrap_or(default),
        pause: parsed(pause, DURATION, quantity::duration, findings).unwrap_or_default(),
        factor: factor.unwrap_or(1),
        cap: parsed(cap, DURATION, quantity::duration, findings),
        condition,
    }
}

const DURATION: &str = "a duration such as 30s or 1h30m";
const CONDITION: &str = "comparisons of `asInt(lastRetry.exitCode)` with numbers joined by `&&` or `||`, or \
                         `asInt(lastRetry.exitCode) not in [2, 3, 4]` (the local runner supports no other expression)";

fn policy_named(name: &str) -> Option<Policy> {
    match name {
        "Always" => Some(Policy::Always),
        "OnFailure" => Some(Policy::OnFailure),
        "OnError" => Some(Policy::OnError),
        "OnTransientError" => Some(Policy::OnTransientError),
        _ => None,
    }
}

/// Parses the expanded value of a text.
pub(crate) fn parsed<T>(
    value: Option<(Text, String)>,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
    findings: &mut Findings,
) -> Option<T> {
    let (text, value) = value?;
    let result = parse(&value);
    if result.is_none() {
        findings.add(text.at, &text.path, format!("must be {expected}, not `{value}`"));
    }
    result
}

/// A condition on an exit code: the part of Argo's expression language that says which failures are final.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Any of these groups must hold, of which all comparisons must hold.
    any: Vec<Vec<Comparison>>,
}

#[derive(Clone, Debug, PartialEq)]
enum Comparison {
    In(Vec<i32>),
    NotIn(Vec<i32>),
    Less(i32),
    Greater(i32),
}

impl Condition {
    /// Parses `asInt(lastRetry.exitCode) == 5 || asInt(lastRetry.exitCode) > 100` and the like.
    pub fn parse(text: &str) -> Option<Self> {
        let group = |group: &str| group.split("&&").map(comparison).collect();
        let any: Option<Vec<Vec<Comparison>>> = text.split("||").map(group).collect();
        any.map(|any| Self { any })
    }

    /// Whether it holds for `code`.
    pub fn holds(&self, code: i32) -> bool {
        self.any.iter().any(|all| all.iter().all(|comparison| comparison.holds(code)))
    }
}

impl Comparison {
    fn holds(&self, code: i32) -> bool {
        match self {
            Comparison::In(codes) => codes.contains(&code),
            Comparison::NotIn(codes) => !codes.contains(&code),
            Comparison::Less(bound) => code < *bound,
            Comparison::Greater(bound) => code > *bound,
        }
    }
}

fn comparison(text: &str) -> Option<Comparison> {
    let rest = text.trim().strip_prefix("asInt(lastRetry.exitCode)")?.trim();
    if let Some(list) = rest.strip_prefix("not in") {
        return codes(list).map(Comparison::NotIn);
    }
    if let Some(list) = rest.strip_prefix("in") {
        return codes(list).map(Comparison::In);
    }
    let split = rest.find(|c: char| !"=!<>".contains(c))?;
    let (operator, number) = rest.split_at(split);
    let number: i32 = number.trim().parse().ok()?;
    match operator {
        "==" => Some(Comparison::In(vec![number])),
        "!=" => Some(Comparison::NotIn(vec![number])),
        "<" => Some(Comparison::Less(number)),
        ">" => Some(Comparison::Greater(number)),
        "<=" => number.checked_add(1).map(Comparison::Less),
        ">=" => number.checked_sub(1).map(Comparison::Greater),
        _ => None,
    }
}

fn codes(list: &str) -> Option<Vec<i32>> {
    let list = list.trim().strip_prefix('[')?.strip_suffix(']')?;
    list.split(',').map(|code| code.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(limit: u32) -> Retry {
        Retry { limit: Some(limit), pause: Duration::from_secs(1), factor: 2, ..Retry::never() }
    }

    fn seconds(retry: &Retry, attempts: u32, outcome: Outcome) -> Option<u64> {
        retry.next(attempts, &outcome).map(|pause| pause.as_secs())
    }

    #[test]
    fn retries_until_the_limit_with_growing_pauses() {
        let pauses: Vec<_> = (1..=4).map(|attempts| seconds(&retry(3), attempts, Outcome::Exit(1))).collect();
        assert_eq!(pauses, [Some(1), Some(2), Some(4), None]);
        let capped = Retry { cap: Some(Duration::from_secs(3)), ..retry(9) };
        assert_eq!(seconds(&capped, 5, Outcome::Signal(9)), Some(3));
        let endless = Retry { limit: None, ..retry(0) };
        assert_eq!(seconds(&endless, 64, Outcome::Exit(5)), Some(u64::from(u32::MAX)));
    }

    #[test]
    fn what_cannot_succeed_is_final() {
        for code in [0, 2, 3, 4] {
            assert_eq!(seconds(&retry(3), 1, Outcome::Exit(code)), None, "{code}");
        }
        for code in [1, 5, 101] {
            assert_eq!(seconds(&retry(3), 1, Outcome::Exit(code)), Some(1), "{code}");
        }
        assert_eq!(seconds(&retry(3), 1, Outcome::NotStarted(String::new())), None);
    }

    #[test]
    fn policies() {
        let with = |policy| Retry { policy, ..retry(3) };
        assert_eq!(seconds(&with(Policy::OnTransientError), 1, Outcome::Exit(5)), Some(1));
        assert_eq!(seconds(&with(Policy::OnTransientError), 1, Outcome::Exit(1)), None);
        assert_eq!(seconds(&with(Policy::OnError), 1, Outcome::Exit(1)), None);
        assert_eq!(seconds(&with(Policy::OnError), 1, Outcome::NotStarted(String::new())), Some(1));
        assert_eq!(seconds(&with(Policy::Always), 1, Outcome::Signal(15)), Some(1));
    }

    #[test]
    fn conditions_decide_by_exit_code() {
        for (text, holds, fails) in [
            ("asInt(lastRetry.exitCode) not in [2, 3, 4]", [1, 5], [2, 4]),
            ("asInt(lastRetry.exitCode) == 5", [5, 5], [1, 2]),
            ("asInt(lastRetry.exitCode) < 2 || asInt(lastRetry.exitCode) >= 5", [1, 137], [2, 4]),
            ("asInt(lastRetry.exitCode) > 1 && asInt(lastRetry.exitCode) <= 5", [2, 5], [1, 6]),
            ("asInt(lastRetry.exitCode) in [5]", [5, 5], [1, 2]),
        ] {
            let condition = Condition::parse(text).unwrap();
            assert!(holds.iter().all(|code| condition.holds(*code)), "{text}");
            assert!(!fails.iter().any(|code| condition.holds(*code)), "{text}");
        }
        for text in ["", "lastRetry.status == \"Error\"", "asInt(lastRetry.exitCode) ~ 2", "true"] {
            assert_eq!(Condition::parse(text), None, "{text}");
        }
        let condition = Condition::parse("asInt(lastRetry.exitCode) == 3");
        assert_eq!(seconds(&Retry { condition, ..retry(3) }, 1, Outcome::Exit(3)), Some(1));
    }
}
