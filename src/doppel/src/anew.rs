//! `doppel rerun RUN --as NEW`: a new release from the snapshots and settings of an old one.
//!
//! The recorded commands under a new run id, on the tables of before: noise and reservation are bound to the run id, so
//! they are new. Partition is left out, since the corpus stays.

use std::collections::{BTreeMap, BTreeSet};

use lake::{Claim, manifest};
use privacy::event::Event;
use serde_json::json;
use stage::{Failure, Summary};

use crate::budget;
use crate::recorded::{Kind, Parameters, Recorded, Stage, Starter, flag_and_value};

/// Runs the finished stages of `recorded` as `new`.
pub async fn release(
    starter: &Starter,
    recorded: &Recorded,
    new: &str,
    given: &[(String, String)],
) -> Result<Summary, Failure> {
    let stages: Vec<&Stage> = recorded.stages.iter().filter(|stage| stage.kind.name != "partition").collect();
    if stages.is_empty() {
        let run = &recorded.run;
        return Err(Failure::Input(format!("run {run}: no stage but partition has ended\nhelp: `doppel show {run}`")));
    }
    let parameters = Parameters::new(given, &stages)?;
    parameters.check(&stages)?;
    let commands = commands(recorded, &stages, new);
    refuse_other(starter, new, &commands).await?;
    afford(starter, &stages, new).await?;
    for (kind, command) in &commands {
        tracing::info!(stage = kind.name, run = new, "starting");
        starter.start(*kind, &parameters.apply(command), None).await?;
    }
    let names: Vec<&str> = stages.iter().map(|stage| stage.kind.name).collect();
    let mut text =
        format!("run {new}: a new release from the snapshots and settings of {}: {}", recorded.run, names.join(", "));
    for (stage, reason) in &recorded.unfinished {
        text += &format!("\nleft out: {stage}, of which {reason}");
    }
    Ok(Summary { text, json: json!({ "run": new, "from": recorded.run, "stages": names }) })
}

/// The commands of all shards, in the order of the stages.
fn commands(recorded: &Recorded, stages: &[&Stage], new: &str) -> Vec<(Kind, Vec<String>)> {
    let below = format!("runs/{}/", recorded.run);
    // The corpus is made by the run, too, and stays.
    let made: BTreeSet<&str> = recorded.made().into_iter().filter(|path| path.starts_with(&below)).collect();
    let shards = stages.iter().flat_map(|stage| stage.shards.iter().map(|shard| (stage.kind, &shard.claim)));
    shards.map(|(kind, claim)| (kind, renamed(claim, &made, new))).collect()
}

/// The recorded flags of `claim` for the run `new`: what the old run made, the new one makes for itself; all other
/// tables are pinned to what was read.
fn renamed(claim: &Claim, made: &BTreeSet<&str>, new: &str) -> Vec<String> {
    let (old, below) = (claim.run.as_str(), format!("runs/{}/", claim.run));
    let rename = |word: &String| match flag_and_value(word) {
        ("pin", _) => None,
        (flag, value) if value == old && (flag == "run" || flag.ends_with("-run")) => Some(format!("--{flag}={new}")),
        (flag, value) => match value.strip_prefix(&below) {
            Some(name) if made.contains(value) => Some(format!("--{flag}=runs/{new}/{name}")),
            _ => Some(word.clone()),
        },
    };
    let mut words: Vec<String> = claim.command.iter().filter_map(rename).collect();
    let pins = claim.inputs.iter().filter(|input| !made.contains(input.location.as_str()));
    let pins = pins.filter_map(|input| Some(format!("--pin={}={}", input.location, input.version?)));
    words.extend(pins.collect::<BTreeSet<_>>());
    words
}

/// Refuses a run id that stands for something else. One that was begun by this very command goes on: the stages know
/// what is done.
async fn refuse_other(starter: &Starter, new: &str, commands: &[(Kind, Vec<String>)]) -> Result<(), Failure> {
    let mut claims = manifest::claims_of(&starter.private, new).await?;
    claims.extend(manifest::claims_of(&starter.release, new).await?);
    // A model may lie elsewhere by now; its digest is for the stage to compare.
    let essence = |words: &[String]| -> BTreeSet<String> {
        let is_place = |word: &&String| matches!(flag_and_value(word).0, "model" | "encoder");
        words.iter().filter(|word| !is_place(word)).cloned().collect()
    };
    let ours = |claim: &Claim| {
        commands.iter().any(|(kind, words)| kind.name == claim.stage && essence(words) == essence(&claim.command))
    };
    match claims.iter().find(|claim| !ours(claim)) {
        None => Ok(()),
        Some(claim) => Err(Failure::Usage(format!(
            "--as {new}: the run {new} exists, and its {} was not begun by this command\n\
             help: choose a run id that `doppel runs` does not list",
            claim.stage
        ))),
    }
}

/// Refuses what the budgets cannot pay, before anything starts.
async fn afford(starter: &Starter, stages: &[&Stage], new: &str) -> Result<(), Failure> {
    let mut asked: BTreeMap<&str, Vec<(&str, Event)>> = BTreeMap::new();
    for stage in stages {
        for shard in &stage.shards {
            let Some(corpus) = shard.claim.config["corpus"].as_str() else { continue };
            let events = shard.facts["events"].as_array().into_iter().flatten();
            let events = events.filter_map(|event| serde_json::from_value(event.clone()).ok());
            asked.entry(corpus).or_default().extend(events.map(|event| (stage.kind.name, event)));
        }
    }
    for (corpus, events) in asked {
        budget::afford(&starter.private, corpus, new, &events).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_old_run_made_is_made_anew_and_the_rest_is_pinned() {
        let input = |name: &str, location: &str, version| lake::Input {
            name: name.into(),
            location: location.into(),
            version,
            digest: None,
        };
        let claim = Claim {
            run: "demo".into(),
            stage: "vote".into(),
            shard: None,
            inputs: vec![
                input("candidates", "runs/demo/synthetic", Some(3)),
                input("corpus", "corpora/chats", Some(0)),
                input("corpus-embeddings", "runs/demo/embeddings", None),
                input("baseline-embeddings", "runs/demo-base/embeddings", Some(2)),
            ],
            config: serde_json::Value::Null,
            seeds: Vec::new(),
            binary: String::new(),
            started: chrono::DateTime::UNIX_EPOCH,
            command: [
                "--run=demo",
                "--pin=corpora/chats=0",
                "--corpus=demo",
                "--adapter-run=demo",
                "--baseline-run=demo-base",
                "--candidates=runs/demo/synthetic",
                "--table=runs/demo/by-hand",
                "--no-dp",
            ]
            .map(str::to_owned)
            .to_vec(),
        };
        let made = BTreeSet::from(["runs/demo/synthetic", "runs/demo/embeddings"]);
        let expected = [
            "--run=new",
            "--corpus=demo",
            "--adapter-run=new",
            "--baseline-run=demo-base",
            "--candidates=runs/new/synthetic",
            "--table=runs/demo/by-hand",
            "--no-dp",
            "--pin=corpora/chats=0",
            "--pin=runs/demo-base/embeddings=2",
        ];
        assert_eq!(renamed(&claim, &made, "new"), expected);
    }
}
