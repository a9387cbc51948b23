//! `doppel rerun RUN --as NEW`: a new release from the snapshots and settings of an old one.
//!
//! The recorded commands under a new run id, on the tables of before: noise and reservation are bound to the run id, so
//! they are new. Partition is left out, since the corpus stays.

use std::collections::{BTreeMap, BTreeSet};

use lake::{Claim, Manifest, layout, manifest};
use privacy::event::Event;
use serde_json::json;
use stage::{Failure, Summary};

use crate::afford;
use crate::recorded::{Kind, MODELS, Parameters, Recorded, Stage, Starter, flag_and_value};
use crate::table::short;

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
    let work = work(recorded, &stages, new, &parameters);
    refuse_other(starter, new, &work).await?;
    afford(starter, &work, new).await?;
    for Work { kind, words, .. } in &work {
        tracing::info!(stage = kind.name, run = new, "starting");
        starter.start(*kind, words, None).await?;
    }
    let models = other_models(&work, &claims(starter, new).await?);
    // Where a model lies is no change; whether it is another, its digest tells.
    let changed = given.iter().filter(|(flag, _)| !MODELS.contains(&flag.as_str()));
    let changed: BTreeMap<&str, &str> = changed.map(|(flag, value)| (flag.as_str(), value.as_str())).collect();
    let names: Vec<&str> = stages.iter().map(|stage| stage.kind.name).collect();
    let mut text =
        format!("run {new}: a new release from the snapshots and settings of {}: {}", recorded.run, names.join(", "));
    for (flag, value) in &changed {
        text += &format!("\nchanged: --{flag}={value}");
    }
    for model in &models {
        text += &format!("\nchanged: {model}");
    }
    for (stage, reason) in &recorded.unfinished {
        text += &format!("\nleft out: {stage}, of which {reason}");
    }
    let json = json!({
        "run": new, "from": recorded.run, "stages": names, "changed": changed, "other_models": models,
    });
    Ok(Summary { text, json })
}

/// One shard to run, or a stage that has none.
struct Work<'a> {
    kind: Kind,
    recorded: &'a Manifest,
    /// The flags to start it with.
    words: Vec<String>,
}

/// All shards, in the order of the stages.
fn work<'a>(recorded: &'a Recorded, stages: &[&'a Stage], new: &str, parameters: &Parameters) -> Vec<Work<'a>> {
    // The corpus is made by the run, too, and stays.
    let made: BTreeSet<&str> =
        recorded.made().into_iter().filter(|path| layout::run_of(path) == Some(&recorded.run)).collect();
    let shards = stages.iter().flat_map(|stage| stage.shards.iter().map(|shard| (stage.kind, shard)));
    let work = |(kind, recorded): (Kind, &'a Manifest)| {
        let words = parameters.apply(&renamed(&recorded.claim, &made, new));
        Work { kind, recorded, words }
    };
    shards.map(work).collect()
}

/// The recorded flags of `claim` for the run `new`: what the old run made, the new one makes for itself; all other
/// tables are pinned to what was read.
fn renamed(claim: &Claim, made: &BTreeSet<&str>, new: &str) -> Vec<String> {
    let (old, below) = (claim.run.as_str(), layout::of_run(&claim.run, ""));
    let rename = |word: &String| match flag_and_value(word) {
        ("pin", _) => None,
        (flag, value) if value == old && (flag == "run" || flag.ends_with("-run")) => Some(format!("--{flag}={new}")),
        (flag, value) => match value.strip_prefix(&below) {
            Some(name) if made.contains(value) => Some(format!("--{flag}={}", layout::of_run(new, name))),
            _ => Some(word.clone()),
        },
    };
    let mut words: Vec<String> = claim.command.iter().filter_map(rename).collect();
    let pins = claim.inputs.iter().filter(|input| !made.contains(input.location.as_str()));
    let pins = pins.filter_map(|input| Some(format!("--pin={}={}", input.location, input.version?)));
    words.extend(pins.collect::<BTreeSet<_>>());
    words
}

/// What `new` began so far.
async fn claims(starter: &Starter, new: &str) -> Result<Vec<Claim>, Failure> {
    let mut claims = manifest::claims_of(&starter.private, new).await?;
    claims.extend(manifest::claims_of(&starter.release, new).await?);
    Ok(claims)
}

/// Refuses a run id that stands for something else. One that was begun by this very command goes on: the stages know
/// what is done.
async fn refuse_other(starter: &Starter, new: &str, work: &[Work<'_>]) -> Result<(), Failure> {
    match claims(starter, new).await?.iter().find(|claim| !is_of(claim, work)) {
        None => Ok(()),
        Some(claim) => Err(Failure::Usage(format!(
            "--as {new}: the run {new} exists, and its {} was not begun by this command\n\
             help: choose a run id that `doppel runs` does not list",
            claim.stage
        ))),
    }
}

/// Whether `claim` is what came of one of `work`.
fn is_of(claim: &Claim, work: &[Work<'_>]) -> bool {
    // A model may lie elsewhere by now; its digest is for the stage to compare.
    let essence = |words: &[String]| -> BTreeSet<String> {
        let is_place = |word: &&String| MODELS.contains(&flag_and_value(word).0);
        words.iter().filter(|word| !is_place(word)).cloned().collect()
    };
    work.iter().any(|one| one.kind.name == claim.stage && essence(&one.words) == essence(&claim.command))
}

/// Refuses what the budgets cannot pay, before anything starts.
async fn afford(starter: &Starter, work: &[Work<'_>], new: &str) -> Result<(), Failure> {
    let mut asked: BTreeMap<&str, Vec<(&str, Event)>> = BTreeMap::new();
    for one in work {
        let Some(corpus) = one.recorded.claim.config["corpus"].as_str() else { continue };
        let events = events(one).into_iter().map(|event| (one.kind.name, event));
        asked.entry(corpus).or_default().extend(events);
    }
    for (corpus, events) in asked {
        afford::afford(&starter.private, corpus, new, &events).await?;
    }
    Ok(())
}

/// What `work` will reserve: by its flags, which may have changed, or else what was reserved before.
fn events(work: &Work<'_>) -> Vec<Event> {
    let flag = |name: &str| work.words.iter().map(|word| flag_and_value(word)).find(|word| word.0 == name);
    if let Some(event) = afford::planned_event(work.kind.binary, &|name| flag(name).map(|(_, value)| value)) {
        return vec![event];
    }
    let events = work.recorded.facts["events"].as_array().into_iter().flatten();
    events.filter_map(|event| serde_json::from_value(event.clone()).ok()).collect()
}

/// Models of the new run's `claims` that are not those of the old one: the stages take any for a new run.
fn other_models(work: &[Work<'_>], claims: &[Claim]) -> BTreeSet<String> {
    let mut others = BTreeSet::new();
    for (recorded, claim) in work.iter().flat_map(|one| claims.iter().map(|claim| (&one.recorded.claim, claim))) {
        if (&recorded.stage, recorded.shard) != (&claim.stage, claim.shard) {
            continue;
        }
        for name in MODELS {
            if let (Some(before), Some(now)) = (digest(recorded, name), digest(claim, name))
                && before != now
            {
                others.insert(format!("{name} of {}: digest {}, earlier {}", claim.stage, short(now), short(before)));
            }
        }
    }
    others
}

fn digest<'a>(claim: &'a Claim, input: &str) -> Option<&'a str> {
    claim.inputs.iter().find(|one| one.name == input)?.digest.as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorded::kind;

    fn claim(stage: &str, command: &[&str]) -> Claim {
        Claim {
            run: "demo".into(),
            stage: stage.into(),
            shard: None,
            inputs: Vec::new(),
            config: serde_json::Value::Null,
            seeds: Vec::new(),
            binary: String::new(),
            started: chrono::DateTime::UNIX_EPOCH,
            command: command.iter().map(|word| (*word).to_owned()).collect(),
        }
    }

    /// A run whose training took three steps.
    fn trained(model_digest: &str) -> Recorded {
        let command = [
            "--run=demo",
            "--corpus=chats",
            "--model=llama",
            "--sampling-probability=0.2",
            "--steps=3",
            "--noise-multiplier=1.5",
        ];
        let mut claim = claim("train", &command);
        let digest = Some(model_digest.into());
        claim.inputs = vec![lake::Input { name: "model".into(), location: "llama".into(), version: None, digest }];
        let event = Event::PoissonSampledGaussian { sampling_probability: 0.2, noise_multiplier: 1.5, steps: 3 };
        let shard = Manifest { ended: claim.started, claim, outputs: Vec::new(), facts: json!({ "events": [event] }) };
        let stage = Stage { kind: kind("train").unwrap(), zone: "release", shards: vec![shard] };
        Recorded { run: "demo".into(), stages: vec![stage], unfinished: Vec::new() }
    }

    #[test]
    fn changed_flags_are_started_continued_and_priced() {
        let recorded = trained("c0ffee");
        let stages: Vec<&Stage> = recorded.stages.iter().collect();
        let work = |given: &[(&str, &str)]| {
            let given: Vec<(String, String)> =
                given.iter().map(|(flag, value)| ((*flag).to_owned(), (*value).to_owned())).collect();
            work(&recorded, &stages, "new", &Parameters::new(&given, &stages).unwrap())
        };
        let changed = work(&[("steps", "5"), ("model", "/models/llama")]);
        assert!(changed[0].words.contains(&"--steps=5".to_owned()), "{:?}", changed[0].words);
        // What the stage recorded when the same command began it, but for where the model lay.
        let begun = [
            "--run=new",
            "--corpus=chats",
            "--model=elsewhere",
            "--sampling-probability=0.2",
            "--steps=5",
            "--noise-multiplier=1.5",
        ];
        let begun = claim("train", &begun);
        assert!(is_of(&begun, &changed));
        assert!(!is_of(&begun, &work(&[])) && !is_of(&begun, &work(&[("steps", "7")])));
        let steps = |work: &Work| match &events(work)[..] {
            [Event::PoissonSampledGaussian { steps, .. }] => *steps,
            other => panic!("{other:?}"),
        };
        assert_eq!((steps(&changed[0]), steps(&work(&[])[0])), (5, 3));
    }

    #[test]
    fn another_model_of_a_new_release_is_told() {
        let (recorded, other) = (trained("c0ffee"), trained("f00d"));
        let stages: Vec<&Stage> = recorded.stages.iter().collect();
        let work = work(&recorded, &stages, "new", &Parameters::default());
        let claim = |recorded: &Recorded| recorded.stages[0].shards[0].claim.clone();
        assert!(other_models(&work, &[claim(&recorded)]).is_empty());
        let told = other_models(&work, &[claim(&other)]);
        assert_eq!(told, BTreeSet::from(["model of train: digest f00d, earlier c0ffee".to_owned()]));
    }

    #[test]
    fn what_the_old_run_made_is_made_anew_and_the_rest_is_pinned() {
        let input = |name: &str, location: &str, version| lake::Input {
            name: name.into(),
            location: location.into(),
            version,
            digest: None,
        };
        let command = [
            "--run=demo",
            "--pin=corpora/chats=0",
            "--corpus=demo",
            "--adapter-run=demo",
            "--baseline-run=demo-base",
            "--candidates=runs/demo/synthetic",
            "--table=runs/demo/by-hand",
            "--no-dp",
        ];
        let mut claim = claim("vote", &command);
        claim.inputs = vec![
            input("candidates", "runs/demo/synthetic", Some(3)),
            input("corpus", "corpora/chats", Some(0)),
            input("corpus-embeddings", "runs/demo/embeddings", None),
            input("baseline-embeddings", "runs/demo-base/embeddings", Some(2)),
        ];
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
