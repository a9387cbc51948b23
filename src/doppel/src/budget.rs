//! `doppel budget`: what was spent on a corpus, and what may be.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use lake::{PrivateRoot, Zone};
use ledger::{Body, Ledger, LedgerError};
use privacy::event::Event;
use serde_json::json;
use stage::{Failure, Format, Summary, Verbosity};

use crate::plot::{self, Chart};
use crate::roots::{self, PrivateArgs};
use crate::table::{seconds, table};
use crate::values::{delta, positive};

/// Show what was spent on a corpus, or set its budget.
///
/// The ledger lies in the private root and is as private as the corpus: beside the parameters of mechanisms, which are
/// shown here, it holds digests that would confirm a right guess of the data.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BudgetArgs {
    /// Set a corpus's budget.
    #[command(subcommand)]
    pub command: Option<BudgetCommand>,
    /// What to show.
    #[command(flatten)]
    pub show: BudgetShowArgs,
}

/// Commands about the budget.
#[derive(Subcommand, Clone, Debug)]
#[expect(missing_docs, reason = "the help of a command is its arguments' comment")]
pub enum BudgetCommand {
    Set(BudgetSetArgs),
}

/// Show what was spent.
#[derive(Args, Clone, Debug)]
pub struct BudgetShowArgs {
    /// Corpus; all corpora of the root where none is named.
    #[arg(value_name = "CORPUS", group = "one")]
    pub name: Option<String>,
    /// The same as a flag.
    #[arg(long, value_name = "NAME", group = "one")]
    pub corpus: Option<String>,
    /// Write a plot of ε over the ledger's entries to this .svg or .png file.
    #[arg(long, value_name = "FILE", requires = "one")]
    pub plot: Option<PathBuf>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Where the private zone is.
    #[command(flatten)]
    pub root: PrivateArgs,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Set the budget of a corpus.
///
/// The budget is one (ε, δ) for all mechanisms that ever touch the corpus, composed. A stage that would exceed it is
/// refused with exit code 4 before it reads a record. Setting the same budget again does nothing.
#[derive(Args, Clone, Debug)]
pub struct BudgetSetArgs {
    /// Corpus.
    #[arg(long, value_name = "NAME")]
    pub corpus: String,
    /// Largest ε, under adding or removing one privacy unit; at most 1e6.
    #[arg(long, allow_negative_numbers = true, value_parser = positive)]
    pub epsilon: f64,
    /// The δ at which ε is taken.
    #[arg(long, allow_negative_numbers = true, value_parser = delta)]
    pub delta: f64,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Where the private zone is.
    #[command(flatten)]
    pub root: PrivateArgs,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// An ε above this bounds nothing.
const LARGEST_EPSILON: f64 = 1e6;

/// Sets the budget of a corpus.
pub async fn set(args: BudgetSetArgs) -> Result<Summary, Failure> {
    let root = args.root.open().await?.marked();
    let BudgetSetArgs { corpus, epsilon, delta, .. } = args;
    if epsilon > LARGEST_EPSILON {
        return Err(Failure::Usage(format!(
            "--epsilon {epsilon}: expected at most {LARGEST_EPSILON:e}\n\
             help: a bound this large promises nothing; useful ones are below 20"
        )));
    }
    let before = ledger::read(&root, &corpus).await.map_err(failure)?;
    ledger::set_budget(&root, &corpus, epsilon, delta).await.map_err(failure)?;
    let already = before.budget() == Some(ledger::Budget { epsilon, delta });
    let spent = crate::beside(move || before.epsilon(delta).map_err(failure)).await?.pld;
    let exceeded = exceeded(spent, epsilon);
    let done = if already { "done already; " } else { "" };
    let mut text = format!("{corpus}: {done}the budget is ε = {epsilon} at δ = {delta:e}");
    if let Some(by) = exceeded {
        text += &format!("\nwarning: ε = {} is spent already, {by:.3} more than that: nothing more fits", up(spent));
    }
    Ok(Summary {
        text,
        json: json!({
            "corpus": corpus, "already_done": already, "budget": { "epsilon": epsilon, "delta": delta },
            "exceeded": exceeded,
        }),
    })
}

/// By how much what was spent is more than the budget.
fn exceeded(spent: f64, budget: f64) -> Option<f64> {
    (spent > budget).then_some(spent - budget)
}

/// Shows what was spent.
pub async fn show(args: BudgetShowArgs) -> Result<Summary, Failure> {
    let root = args.root.open().await?;
    let corpora = ledger::corpora(&root).await.map_err(failure)?;
    let one = args.name.or(args.corpus);
    if one.is_none() && corpora.is_empty() && root.is_empty().await? {
        return Err(roots::nothing(root.url()));
    }
    let corpora = match &one {
        Some(corpus) if corpora.contains(corpus) => BTreeSet::from([corpus.clone()]),
        Some(corpus) => return Err(Failure::Input(unknown(&root, corpus, &corpora))),
        None => corpora,
    };
    let (mut statements, mut failures) = (Vec::new(), Vec::new());
    for corpus in &corpora {
        match statement(&root, corpus).await {
            Ok(statement) => statements.push(statement),
            // A ledger that is broken does not hide the others. What is wrong with the root is told once.
            Err(failure @ (Failure::Input(_) | Failure::Usage(_))) if failures.contains(&failure) => {}
            Err(failure @ (Failure::Input(_) | Failure::Usage(_))) => failures.push(failure),
            Err(failure) => return Err(failure),
        }
    }
    if let (Some(file), Some(statement)) = (&args.plot, statements.first()) {
        statement.plot(file)?;
    }
    let text = match statements.as_slice() {
        [] if failures.is_empty() => format!("{}: no corpus has a ledger here", root.url()),
        statements => statements.iter().map(Statement::text).collect::<Vec<_>>().join("\n\n"),
    };
    let list: Vec<_> = statements.iter().map(Statement::json).collect();
    let json = match (&one, list.as_slice()) {
        (Some(_), [one]) => one.clone(),
        _ => json!(list),
    };
    let summary = Summary { text, json };
    let Some(code) = failures.iter().map(Failure::exit_code).min() else {
        return Ok(summary);
    };
    if !statements.is_empty() {
        summary.print(args.format)?;
    }
    let told: Vec<String> = failures.iter().map(ToString::to_string).collect();
    Err(Failure::coded(code, told.join("\n")))
}

async fn statement(root: &PrivateRoot, corpus: &str) -> Result<Statement, Failure> {
    let ledger = ledger::read(root, corpus).await.map_err(failure)?;
    crate::beside(move || Statement::of(ledger)).await
}

fn unknown(root: &PrivateRoot, corpus: &str, known: &BTreeSet<String>) -> String {
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let hint = match workflow::finding::nearest(corpus, known.iter().copied()) {
        _ if corpus == "set" => "flags stand behind `set`: `doppel budget set --corpus NAME …`".to_owned(),
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => {
            format!("`doppel budget set --corpus {corpus} --epsilon E --delta D` begins one")
        }
        None => format!("ledgers are there for: {}", known.join(", ")),
    };
    format!("{}: the corpus `{corpus}` has no ledger\nhelp: {hint}", root.url())
}

/// The stage contract's failure for a ledger's error.
pub(crate) fn failure(error: LedgerError) -> Failure {
    Failure::coded(error.exit_code(), error)
}

/// One line of a statement.
struct Line {
    sequence: u64,
    at: String,
    run: String,
    stage: String,
    mechanism: String,
    event: Event,
    settled: bool,
    epsilon: Option<privacy::Epsilon>,
}

/// A budget that was set.
struct Change {
    sequence: u64,
    at: String,
    budget: ledger::Budget,
}

impl Line {
    fn row(&self) -> Vec<String> {
        let told = |epsilon: Option<f64>| epsilon.map(up).unwrap_or_default();
        vec![
            self.sequence.to_string(),
            seconds(&self.at),
            self.run.clone(),
            self.stage.clone(),
            self.mechanism.clone(),
            if self.settled { "settled" } else { "reserved" }.to_owned(),
            told(self.epsilon.map(|epsilon| epsilon.pld)),
            told(self.epsilon.map(|epsilon| epsilon.rdp)),
        ]
    }
}

impl Change {
    fn row(&self) -> Vec<String> {
        let told = format!("budget: ε = {} at δ = {:e}", self.budget.epsilon, self.budget.delta);
        let empty = String::new;
        vec![self.sequence.to_string(), seconds(&self.at), empty(), empty(), told, "set".to_owned(), empty(), empty()]
    }
}

/// What a corpus's ledger says.
struct Statement {
    corpus: String,
    unit: Option<String>,
    conditions: BTreeSet<String>,
    budget: Option<ledger::Budget>,
    verified: bool,
    changes: Vec<Change>,
    lines: Vec<Line>,
}

impl Statement {
    fn of(ledger: Ledger) -> Result<Self, Failure> {
        let budget = ledger.budget();
        let spent = match budget {
            Some(budget) => ledger.history(budget.delta).map_err(failure)?,
            // ε needs a δ, which only a budget names.
            None => Vec::new(),
        };
        let mut statement = Self {
            corpus: ledger.corpus.clone(),
            unit: None,
            conditions: BTreeSet::new(),
            budget,
            verified: ledger.verified,
            changes: Vec::new(),
            lines: Vec::new(),
        };
        for entry in &ledger.entries {
            let (run, stage, unit, event, conditions) = match &entry.body {
                Body::Reserve { run, stage, unit, event, conditions, .. } => (run, stage, unit, event, conditions),
                Body::Budget { epsilon, delta } => {
                    let budget = ledger::Budget { epsilon: *epsilon, delta: *delta };
                    statement.changes.push(Change { sequence: entry.sequence, at: entry.at.to_string(), budget });
                    continue;
                }
                // Told by the line of its reservation.
                Body::Settle { .. } => continue,
            };
            statement.unit = Some(unit.clone());
            statement.conditions.extend(conditions.iter().cloned());
            statement.lines.push(Line {
                sequence: entry.sequence,
                at: entry.at.to_string(),
                run: run.clone(),
                stage: stage.clone(),
                mechanism: mechanism(event),
                event: event.clone(),
                settled: ledger.is_settled(entry.sequence),
                epsilon: spent.iter().find(|spent| spent.sequence == entry.sequence).map(|spent| spent.epsilon),
            });
        }
        Ok(statement)
    }

    fn total(&self) -> privacy::Epsilon {
        self.lines.last().and_then(|line| line.epsilon).unwrap_or(privacy::Epsilon { pld: 0.0, rdp: 0.0 })
    }

    /// What is left of the budget: a guide only, since ε does not add up.
    fn remaining(&self) -> Option<f64> {
        Some((self.budget?.epsilon - self.total().pld).max(0.0))
    }

    fn exceeded(&self) -> Option<f64> {
        exceeded(self.total().pld, self.budget?.epsilon)
    }

    fn text(&self) -> String {
        let mut text = match (self.budget, self.remaining()) {
            (Some(budget), Some(remaining)) => {
                let left = match self.exceeded() {
                    Some(by) => format!("exceeded by {by:.3}"),
                    None => format!("about {remaining:.3} left"),
                };
                format!(
                    "{}: ε = {} of {} at δ = {:e} spent, {left} (RDP's second opinion: {})",
                    self.corpus,
                    up(self.total().pld),
                    budget.epsilon,
                    budget.delta,
                    up(self.total().rdp),
                )
            }
            _ => format!("{}: no budget is set", self.corpus),
        };
        if let Some(unit) = &self.unit {
            text += &format!("\nprivacy unit: {unit}; adjacency: add or remove one unit");
        }
        if !self.verified {
            text += "\nwarning: the noise key cannot be read here, so these entries may be forged by whoever can write them";
        }
        for condition in &self.conditions {
            text += &format!("\ncondition: {condition}");
        }
        let changes = self.changes.iter().map(|change| (change.sequence, change.row()));
        let mut rows: Vec<_> = changes.chain(self.lines.iter().map(|line| (line.sequence, line.row()))).collect();
        if rows.is_empty() {
            return text;
        }
        rows.sort_by_key(|(sequence, _)| *sequence);
        let rows: Vec<_> = rows.into_iter().map(|(_, row)| row).collect();
        let headings = ["entry", "time (UTC)", "run", "stage", "mechanism", "state", "ε so far", "by RDP"];
        format!("{text}\n\n{}", table(&headings, &rows, &[0, 6, 7]))
    }

    fn json(&self) -> serde_json::Value {
        let epsilon = |epsilon: privacy::Epsilon| json!({ "pld": epsilon.pld, "rdp": epsilon.rdp });
        let entries = self.lines.iter().map(|line| {
            json!({
                "sequence": line.sequence,
                "at": line.at,
                "run": line.run,
                "stage": line.stage,
                "event": serde_json::to_value(&line.event).unwrap_or_default(),
                "settled": line.settled,
                "epsilon": line.epsilon.map(epsilon),
            })
        });
        let budgets = self.changes.iter().map(|Change { sequence, at, budget }| {
            json!({ "sequence": sequence, "at": at, "epsilon": budget.epsilon, "delta": budget.delta })
        });
        json!({
            "corpus": self.corpus,
            "unit": self.unit,
            "adjacency": "add_or_remove_one",
            "conditions": self.conditions,
            "budget": self.budget.map(|budget| json!({ "epsilon": budget.epsilon, "delta": budget.delta })),
            "spent": self.budget.map(|_| epsilon(self.total())),
            "remaining": self.remaining(),
            "exceeded": self.exceeded(),
            "verified": self.verified,
            "budgets": budgets.collect::<Vec<_>>(),
            "entries": entries.collect::<Vec<_>>(),
        })
    }

    /// ε after every entry, against the budget.
    fn plot(&self, file: &Path) -> Result<(), Failure> {
        let Some(budget) = self.budget else {
            return Err(Failure::Usage(format!(
                "{}: no budget is set, so there is no δ to plot ε at\nhelp: `doppel budget set`",
                self.corpus
            )));
        };
        let steps = |value: fn(&privacy::Epsilon) -> f64| -> Vec<(f64, f64)> {
            let mut points = vec![(0.0, 0.0)];
            for (i, epsilon) in self.lines.iter().filter_map(|line| line.epsilon.as_ref()).enumerate() {
                let before = points.last().map_or(0.0, |point| point.1);
                points.extend([((i + 1) as f64, before), ((i + 1) as f64, value(epsilon))]);
            }
            points
        };
        let last = self.lines.len() as f64 + 0.5;
        plot::write(
            file,
            &Chart {
                title: format!("{}: ε at δ = {:e}", self.corpus, budget.delta),
                x: "reservations".to_owned(),
                y: "ε".to_owned(),
                lines: vec![
                    ("spent (PLD)".to_owned(), steps(|epsilon| epsilon.pld)),
                    ("spent (RDP)".to_owned(), steps(|epsilon| epsilon.rdp)),
                    ("budget".to_owned(), vec![(0.0, budget.epsilon), (last, budget.epsilon)]),
                ],
            },
        )
    }
}

/// ε to four digits, rounded up.
pub fn up(epsilon: f64) -> String {
    format!("{:.4}", (epsilon * 1e4).ceil() / 1e4)
}

/// An event in words.
pub fn mechanism(event: &Event) -> String {
    match event {
        Event::Gaussian { noise_multiplier } => format!("Gaussian σ={noise_multiplier}"),
        Event::DiscreteGaussian { noise_multiplier } => {
            format!("discrete Gaussian σ={noise_multiplier}")
        }
        Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps } => {
            format!("{steps} × Poisson-sampled Gaussian q={sampling_probability:?} σ={noise_multiplier}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_tells_changes_of_the_budget_and_by_how_much_it_is_exceeded() {
        let reserve = Body::Reserve {
            run: "demo".into(),
            stage: "vote".into(),
            version: 1,
            unit: "id".into(),
            adjacency: ledger::Adjacency::AddOrRemoveOne,
            conditions: Vec::new(),
            event: Event::DiscreteGaussian { noise_multiplier: 1.0 },
            fingerprint: String::new(),
        };
        let budget = |epsilon| Body::Budget { epsilon, delta: 1e-5 };
        let bodies = [budget(8.0), reserve, Body::Settle { reservation: 1 }, budget(1.0)];
        let entries = bodies.into_iter().zip(0..).map(|(body, sequence)| ledger::Entry {
            sequence,
            previous: None,
            at: chrono::DateTime::UNIX_EPOCH,
            corpus: "chats".into(),
            body,
            digest: String::new(),
        });
        let ledger = Ledger { corpus: "chats".into(), entries: entries.collect(), verified: false };
        let statement = Statement::of(ledger).unwrap();
        let by = statement.total().pld - 1.0;
        assert!(by > 0.0);
        let text = statement.text();
        assert!(text.contains(&format!("spent, exceeded by {by:.3} (RDP")), "{text}");
        assert!(text.contains("\nwarning: the noise key cannot be read here"), "{text}");
        let rows: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("entry")).skip(1).collect();
        assert_eq!(rows.len(), 3, "{text}");
        for (row, part) in rows.iter().zip(["budget: ε = 8 at δ = 1e-5", "settled", "budget: ε = 1 at δ = 1e-5"]) {
            assert!(row.contains(part), "expected {part:?} in:\n{text}");
        }
        let json = statement.json();
        assert_eq!(json["remaining"].as_f64(), Some(0.0));
        assert_eq!((json["exceeded"].as_f64(), json["entries"].as_array().map(Vec::len)), (Some(by), Some(1)));
        let budgets = json["budgets"].as_array().unwrap();
        assert_eq!((&budgets[0]["epsilon"], &budgets[1]["sequence"]), (&json!(8.0), &json!(3)));
    }
}
