//! `doppel budget`: what was spent on a corpus, and what may be.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lake::{PrivateRoot, Zone};
use ledger::{Body, Ledger, LedgerError};
use privacy::event::Event;
use privacy::training::{calibrated_noise, steps_of};
use serde_json::json;
use stage::{Failure, Summary};

use crate::cli::{BudgetSetArgs, BudgetShowArgs};
use crate::plot::{self, Chart};
use crate::preflight::{Finding, Invocation, storage};
use crate::roots;
use crate::runs::seconds;
use crate::table::table;

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
    let corpora = corpora(&root).await?;
    let one = args.name.or(args.corpus);
    if one.is_none() && corpora.is_empty() && root.is_empty().await? {
        return Err(roots::nothing(root.url()));
    }
    let corpora = match &one {
        Some(corpus) if corpora.contains(corpus) => BTreeSet::from([corpus.clone()]),
        Some(corpus) => return Err(Failure::Input(unknown(&root, corpus, &corpora))),
        None => corpora,
    };
    let mut statements = Vec::new();
    for corpus in &corpora {
        let ledger = ledger::read(&root, corpus).await.map_err(failure)?;
        statements.push(crate::beside(move || Statement::of(ledger)).await?);
    }
    if let (Some(file), Some(statement)) = (&args.plot, statements.first()) {
        statement.plot(file)?;
    }
    let text = match statements.as_slice() {
        [] => format!("{}: no corpus has a ledger here", root.url()),
        statements => statements.iter().map(Statement::text).collect::<Vec<_>>().join("\n\n"),
    };
    let list: Vec<_> = statements.iter().map(Statement::json).collect();
    let json = match (&one, list.as_slice()) {
        (Some(_), [one]) => one.clone(),
        _ => json!(list),
    };
    Ok(Summary { text, json })
}

/// Corpora that have a ledger.
async fn corpora(root: &PrivateRoot) -> Result<BTreeSet<String>, Failure> {
    let paths = root.list("ledger").await?;
    Ok(paths.iter().filter_map(|path| path.split('/').nth(1)).map(str::to_owned).collect())
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
fn failure(error: LedgerError) -> Failure {
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
    remaining: Option<f64>,
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
        let remaining = ledger.remaining().map_err(failure)?;
        let mut statement = Self {
            corpus: ledger.corpus.clone(),
            unit: None,
            conditions: BTreeSet::new(),
            budget,
            remaining,
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

    fn exceeded(&self) -> Option<f64> {
        exceeded(self.total().pld, self.budget?.epsilon)
    }

    fn text(&self) -> String {
        let mut text = match (self.budget, self.remaining) {
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
            "remaining": self.remaining,
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

/// Refuses what stages of `run` are about to reserve, `asked`, where the budget cannot pay all of it; what they
/// reserved before is paid.
pub async fn afford(root: &PrivateRoot, corpus: &str, run: &str, asked: &[(&str, Event)]) -> Result<(), Failure> {
    let ledger = ledger::read(root, corpus).await.map_err(failure)?;
    let reserved = |of: &str| {
        ledger
            .entries
            .iter()
            .any(|entry| matches!(&entry.body, Body::Reserve { run: other, stage, .. } if other == run && stage == of))
    };
    let asked: Vec<&Event> = asked.iter().filter(|(stage, _)| !reserved(stage)).map(|(_, event)| event).collect();
    let Some(budget) = ledger.budget().filter(|_| !asked.is_empty()) else {
        // Without a budget, the stage that reserves says what to do.
        return Ok(());
    };
    let events: Vec<Event> = ledger.spent().into_iter().chain(asked.iter().map(|event| (*event).clone())).collect();
    let total = privacy::epsilon(&events, budget.delta).map_err(|error| Failure::Usage(error.to_string()))?.pld;
    if total <= budget.epsilon {
        return Ok(());
    }
    let asked: Vec<String> = asked.iter().map(|event| mechanism(event)).collect();
    Err(Failure::Budget(format!(
        "{corpus}: run {run} would bring ε to {} at δ = {:e}; the budget is {}\nit would add: {}\n\
         help: `doppel budget {corpus}` shows what was spent; raise the budget if its owner agrees",
        up(total),
        budget.delta,
        budget.epsilon,
        asked.join("; ")
    )))
}

/// Whether the budgets suffice for what `invocations` will reserve, as far as their flags tell.
pub async fn preflight(invocations: &[Invocation<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut corpora: BTreeMap<(String, &str), Vec<&Invocation>> = BTreeMap::new();
    for invocation in invocations {
        if let (Some(root), Some(corpus)) = (invocation.given("private"), invocation.one("corpus")) {
            // One ledger, however its root is written.
            let root = lake::canonical_url(&root).unwrap_or(root);
            corpora.entry((root, corpus)).or_default().push(invocation);
        }
    }
    for ((root, corpus), invocations) in corpora {
        findings.extend(affordable(&root, corpus, &invocations).await);
    }
    findings
}

async fn affordable(root: &str, corpus: &str, invocations: &[&Invocation<'_>]) -> Vec<Finding> {
    // A root that cannot be opened is a finding of its own.
    let Ok(root) = PrivateRoot::open(root, &storage()).await else {
        return Vec::new();
    };
    let ledger = match ledger::read(&root, corpus).await {
        Ok(ledger) => ledger,
        Err(LedgerError::Lake(_)) => return Vec::new(),
        Err(error) => return vec![failure(error).into()],
    };
    let reserved = |invocation: &Invocation| {
        ledger.entries.iter().any(|entry| match &entry.body {
            Body::Reserve { run, stage, .. } => {
                invocation.given("run").as_deref() == Some(run) && stage == invocation.program
            }
            _ => false,
        })
    };
    let (mut asked, mut findings) = (Vec::new(), Vec::new());
    for invocation in invocations.iter().filter(|invocation| !reserved(invocation)) {
        let job = invocation.job.name.as_str();
        asked.extend(planned_event(invocation.program, &|flag| invocation.one(flag)).map(|event| (job, event)));
    }
    if asked.is_empty() {
        return findings;
    }
    let set = invocations.iter().rev().find(|one| one.program == "doppel" && one.words == ["budget", "set"]);
    let set = set.and_then(|set| Some((set.number("epsilon")?, set.number("delta")?)));
    let budget = set.or_else(|| ledger.budget().map(|budget| (budget.epsilon, budget.delta)));
    let Some((epsilon, delta)) = budget else {
        let message =
            format!("the corpus `{corpus}` has no privacy budget; `doppel budget set --corpus {corpus}` sets one");
        findings.push(Finding { message, code: 2 });
        return findings;
    };
    let mut events = ledger.spent();
    let before = events.len();
    events.extend(asked.iter().map(|(_, event)| event.clone()));
    match privacy::epsilon(&events, delta) {
        Ok(total) if total.pld <= epsilon => {}
        Ok(total) => {
            let mut message = format!(
                "{corpus}: the workflow would bring ε to {} at δ = {delta:e}; the budget is {epsilon}\n\
                 {before} earlier reservations",
                up(total.pld)
            );
            for (job, event) in &asked {
                message += &format!("\n{job}: {}", mechanism(event));
            }
            findings.push(Finding { message, code: 4 });
        }
        Err(error) => findings.push(Finding { message: format!("{corpus}: {error}"), code: 2 }),
    }
    findings
}

/// What a stage will reserve, where its flags tell: `flag` gives the value of each. What is wrong with the flags is for the
/// stage to say.
pub fn planned_event<'a>(program: &str, flag: &dyn Fn(&str) -> Option<&'a str>) -> Option<Event> {
    let number = |name: &str| flag(name)?.parse().ok();
    let event = match program {
        "vote" => Some(Event::DiscreteGaussian { noise_multiplier: number("sigma").unwrap_or(10.0) }),
        "train" if flag("no-dp").is_none() => planned_training(&number),
        _ => None,
    };
    event.filter(|event| event.validate().is_ok())
}

fn planned_training(number: &dyn Fn(&str) -> Option<f64>) -> Option<Event> {
    let probability = || Some(number("expected-batch-size")? / number("records")?);
    let sampling_probability = number("sampling-probability").or_else(probability)?;
    let epochs = || Some(steps_of(number("epochs")?, sampling_probability));
    let steps = number("steps").map(|steps| steps as u64).or_else(epochs)?;
    let event = |noise_multiplier| Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps };
    let noise_multiplier = match (number("noise-multiplier"), number("target-epsilon"), number("delta")) {
        (Some(noise_multiplier), ..) => noise_multiplier,
        // Anything else wrong with the training is found with any noise.
        (None, Some(target), Some(delta)) if event(1.0).validate().is_ok() => {
            calibrated_noise(sampling_probability, steps, number("vote-sigma"), target, delta).ok()?
        }
        _ => return None,
    };
    Some(event(noise_multiplier))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stage_will_reserve_follows_from_its_flags() {
        let planned = |program: &str, given: &[(&str, &'static str)]| {
            let flag = |name: &str| given.iter().find(|(flag, _)| *flag == name).map(|(_, value)| *value);
            planned_event(program, &flag)
        };
        let vote = |noise_multiplier| Some(Event::DiscreteGaussian { noise_multiplier });
        assert_eq!(planned("vote", &[]), vote(10.0));
        assert_eq!(planned("vote", &[("sigma", "5")]), vote(5.0));
        let train = [("sampling-probability", "0.2"), ("steps", "3"), ("noise-multiplier", "1.5")];
        let event = Event::PoissonSampledGaussian { sampling_probability: 0.2, noise_multiplier: 1.5, steps: 3 };
        assert_eq!(planned("train", &train), Some(event));
        assert_eq!(planned("train", &[&train[..], &[("no-dp", "")]].concat()), None);
        let targets = [("records", "50"), ("expected-batch-size", "10"), ("epochs", "0.6"), ("vote-sigma", "5")];
        let event = planned("train", &[&targets[..], &[("target-epsilon", "3"), ("delta", "1e-5")]].concat());
        let noise_multiplier = calibrated_noise(0.2, 3, Some(5.0), 3.0, 1e-5).unwrap();
        assert_eq!(
            event,
            Some(Event::PoissonSampledGaussian { sampling_probability: 0.2, noise_multiplier, steps: 3 })
        );
        assert_eq!(planned("embed", &train), None);
    }

    #[tokio::test]
    async fn a_root_written_in_two_ways_has_one_budget() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("private").display().to_string();
        let text = format!(
            "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {{name: t}}\nspec:\n  entrypoint: main\n  templates:\n  \
             - name: main\n    dag: {{tasks: [{{name: set, template: set}}, {{name: vote, template: vote}}]}}\n  \
             - name: set\n    container: {{command: [doppel, budget, set, --corpus=c, --epsilon=8, --delta=1e-5, \
             '--private={root}']}}\n  \
             - name: vote\n    container: {{command: [doppel, vote, --corpus=c, --sigma=10, '--private=file://{root}/']}}\n"
        );
        let plan = workflow::load("w.yaml", &text, &[]).unwrap();
        let invocations: Vec<Invocation> = plan.jobs.iter().filter_map(Invocation::new).collect();
        assert_eq!(preflight(&invocations).await, []);
    }

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
        assert_eq!((json["exceeded"].as_f64(), json["entries"].as_array().map(Vec::len)), (Some(by), Some(1)));
        let budgets = json["budgets"].as_array().unwrap();
        assert_eq!((&budgets[0]["epsilon"], &budgets[1]["sequence"]), (&json!(8.0), &json!(3)));
    }
}
