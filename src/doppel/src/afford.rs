//! Whether the budget suffices for what is about to be reserved.

use std::collections::BTreeMap;

use lake::PrivateRoot;
use ledger::{Body, LedgerError};
use privacy::event::Event;
use privacy::training::{calibrated_noise, steps_of};
use stage::Failure;

use crate::budget::{failure, mechanism, up};
use crate::finding::Finding;
use crate::invocation::Invocation;
use crate::roots::impatient;

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
pub async fn check(invocations: &[Invocation<'_>]) -> Vec<Finding> {
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
    let Ok(root) = PrivateRoot::open(root, &impatient()).await else {
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
        assert_eq!(check(&invocations).await, []);
    }
}
