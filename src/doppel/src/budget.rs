//! `doppel budget`: what was spent on a corpus, and what may be.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lake::{PrivateRoot, Zone};
use ledger::{Body, Ledger, LedgerError};
use privacy::AccountingError;
use privacy::event::Event;
use serde_json::json;
use stage::{Failure, Summary};

use crate::cli::{BudgetSetArgs, BudgetShowArgs};
use crate::plot::{self, Chart};
use crate::preflight::{Finding, Invocation, storage};
use crate::table::table;

/// Sets the budget of a corpus.
pub async fn set(args: BudgetSetArgs) -> Result<Summary, Failure> {
    let root = args.root.open().await?;
    let BudgetSetArgs { corpus, epsilon, delta, .. } = args;
    let before = ledger::read(&root, &corpus).await.map_err(failure)?.budget();
    let already = before == Some(ledger::Budget { epsilon, delta });
    ledger::set_budget(&root, &corpus, epsilon, delta).await.map_err(failure)?;
    let done = if already { "done already; " } else { "" };
    Ok(Summary {
        text: format!("{corpus}: {done}the budget is ε = {epsilon} at δ = {delta:e}"),
        json: json!({
            "corpus": corpus, "already_done": already, "budget": { "epsilon": epsilon, "delta": delta },
        }),
    })
}

/// Shows what was spent.
pub async fn show(args: BudgetShowArgs) -> Result<Summary, Failure> {
    let root = args.root.open().await?;
    let corpora = corpora(&root).await?;
    let one = args.name.or(args.corpus);
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
    let message = error.to_string();
    match error {
        LedgerError::OverBudget(_) => Failure::Budget(message),
        LedgerError::Usage(_) | LedgerError::Accounting(_) => Failure::Usage(message),
        LedgerError::Lake(error) => error.into(),
        _ => Failure::Input(message),
    }
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

/// What a corpus's ledger says.
struct Statement {
    corpus: String,
    unit: Option<String>,
    conditions: BTreeSet<String>,
    budget: Option<ledger::Budget>,
    remaining: Option<f64>,
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
            lines: Vec::new(),
        };
        for entry in &ledger.entries {
            let Body::Reserve { run, stage, unit, event, conditions, .. } = &entry.body else {
                continue;
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

    fn text(&self) -> String {
        let mut text = match (self.budget, self.remaining) {
            (Some(budget), Some(remaining)) => format!(
                "{}: ε = {} of {} at δ = {:e} spent, about {remaining:.3} left (RDP's second opinion: {})",
                self.corpus,
                up(self.total().pld),
                budget.epsilon,
                budget.delta,
                up(self.total().rdp),
            ),
            _ => format!("{}: no budget is set", self.corpus),
        };
        if let Some(unit) = &self.unit {
            text += &format!("\nprivacy unit: {unit}; adjacency: add or remove one unit");
        }
        for condition in &self.conditions {
            text += &format!("\ncondition: {condition}");
        }
        if self.lines.is_empty() {
            return text;
        }
        let told = |epsilon: Option<f64>| epsilon.map(up).unwrap_or_default();
        let rows = self.lines.iter().map(|line| {
            vec![
                line.sequence.to_string(),
                line.at.get(..19).unwrap_or(&line.at).replace('T', " "),
                line.run.clone(),
                line.stage.clone(),
                line.mechanism.clone(),
                if line.settled { "settled" } else { "reserved" }.to_owned(),
                told(line.epsilon.map(|epsilon| epsilon.pld)),
                told(line.epsilon.map(|epsilon| epsilon.rdp)),
            ]
        });
        let headings = ["entry", "time (UTC)", "run", "stage", "mechanism", "state", "ε so far", "by RDP"];
        format!("{text}\n\n{}", table(&headings, &rows.collect::<Vec<_>>(), &[0, 6, 7]))
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
        json!({
            "corpus": self.corpus,
            "unit": self.unit,
            "adjacency": "add_or_remove_one",
            "conditions": self.conditions,
            "budget": self.budget.map(|budget| json!({ "epsilon": budget.epsilon, "delta": budget.delta })),
            "spent": self.budget.map(|_| epsilon(self.total())),
            "remaining": self.remaining,
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
            format!("{steps} × Poisson-sampled Gaussian q={sampling_probability:.6} σ={noise_multiplier}")
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
        match planned_event(invocation) {
            Ok(event) => asked.extend(event.map(|event| (job, event))),
            Err(error) => findings.push(Finding { message: format!("{job}: {error}"), code: 2 }),
        }
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

/// What an invocation will reserve, where its flags tell. An ε that no noise attains is an error; what is wrong with
/// a single flag is for its stage to say.
fn planned_event(invocation: &Invocation) -> Result<Option<Event>, AccountingError> {
    let event = match invocation.program {
        "vote" => Some(Event::DiscreteGaussian { noise_multiplier: invocation.number("sigma").unwrap_or(10.0) }),
        "train" if invocation.one("no-dp").is_none() => planned_training(invocation)?,
        _ => None,
    };
    Ok(event.filter(|event| event.validate().is_ok()))
}

fn planned_training(invocation: &Invocation) -> Result<Option<Event>, AccountingError> {
    let number = |flag| invocation.number(flag);
    let probability = || Some(number("expected-batch-size")? / number("records")?);
    let Some(sampling_probability) = number("sampling-probability").or_else(probability) else {
        return Ok(None);
    };
    let epochs = || Some((number("epochs")? / sampling_probability - 1e-9).ceil().max(1.0));
    let Some(steps) = number("steps").or_else(epochs) else {
        return Ok(None);
    };
    let event = |noise_multiplier| Event::PoissonSampledGaussian {
        sampling_probability,
        noise_multiplier,
        steps: steps as u64,
    };
    let noise_multiplier = match (number("noise-multiplier"), number("target-epsilon"), number("delta")) {
        (Some(noise_multiplier), ..) => noise_multiplier,
        // Anything else wrong with the training is found with any noise.
        (None, Some(target), Some(delta)) if event(1.0).validate().is_ok() => {
            let vote = number("vote-sigma").map(|noise_multiplier| Event::DiscreteGaussian { noise_multiplier });
            privacy::calibrate(|noise| std::iter::once(event(noise)).chain(vote.clone()).collect(), target, delta)?
        }
        _ => return Ok(None),
    };
    Ok(Some(event(noise_multiplier)))
}
