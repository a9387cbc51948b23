//! `doppel runs` and `doppel show`: what was run, from the manifests in the roots.

use clap::Args;
use lake::{Claim, Manifest};
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::roots::{Known, Roots, RootsArgs};
use crate::table::{seconds, short, table};

/// List the runs of both roots.
#[derive(Args, Clone, Debug)]
pub struct RunsArgs {
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Show the stages of one run, with inputs, outputs and configuration.
#[derive(Args, Clone, Debug)]
pub struct ShowArgs {
    /// Run id.
    #[arg(value_parser = stage::common::run_id)]
    pub id: String,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Lists runs.
pub async fn list(args: RunsArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    let mut runs = Vec::new();
    for run in roots.ids().await? {
        runs.push(Run::of(&roots.known(&run).await?, run));
    }
    if runs.is_empty() {
        roots.refuse_nothing().await?;
    }
    let json = runs.iter().map(Run::json).collect();
    let rows: Vec<Vec<String>> = runs.iter().map(Run::row).collect();
    let text = match rows.is_empty() {
        true => format!("no runs in {}", roots.names()),
        false => table(&["run", "started (UTC)", "done", "stages"], &rows, &[2]),
    };
    Ok(Summary { text, json })
}

/// A run in the list.
struct Run {
    run: String,
    started: String,
    /// In the order in which they began.
    stages: Vec<String>,
    done: usize,
    begun: usize,
    dropped: bool,
}

impl Run {
    fn of(known: &[Known], run: String) -> Self {
        let mut claims: Vec<&Claim> = known.iter().flat_map(|known| &known.claims).collect();
        claims.sort_by_key(|claim| claim.started);
        let mut stages: Vec<String> = Vec::new();
        for claim in &claims {
            if !stages.contains(&claim.stage) {
                stages.push(claim.stage.clone());
            }
        }
        Self {
            run,
            started: claims.first().map(|claim| claim.started.to_string()).unwrap_or_default(),
            stages,
            done: known.iter().map(|known| known.manifests.len()).sum(),
            begun: claims.len(),
            dropped: is_dropped(known),
        }
    }

    fn row(&self) -> Vec<String> {
        let done = if self.dropped { "dropped".to_owned() } else { format!("{}/{}", self.done, self.begun) };
        vec![self.run.clone(), seconds(&self.started), done, self.stages.join(", ")]
    }

    fn json(&self) -> Value {
        json!({
            "run": self.run, "started": self.started, "stages": self.stages.join(", "), "done": self.done,
            "begun": self.begun, "dropped": self.dropped,
        })
    }
}

fn is_dropped(known: &[Known]) -> bool {
    known.iter().any(|known| known.dropped)
}

/// Shows one run.
pub async fn show(args: ShowArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    let known = roots.run(&args.id).await?;
    let dropped = is_dropped(&known);
    let mut stages = Vec::new();
    for Known { zone, manifests, claims, .. } in &known {
        for manifest in manifests {
            let json = json!({ "zone": zone, "done": true, "manifest": manifest });
            stages.push((manifest.claim.started, stage_text(zone, &manifest.claim, Some(manifest)), json));
        }
        for claim in claims {
            let same = |manifest: &Manifest| manifest.claim.stage == claim.stage && manifest.claim.shard == claim.shard;
            if !manifests.iter().any(same) {
                let json = json!({ "zone": zone, "done": false, "claim": claim });
                stages.push((claim.started, stage_text(zone, claim, None), json));
            }
        }
    }
    stages.sort_by_key(|(started, ..)| *started);
    let (mut text, json): (Vec<String>, Vec<Value>) = stages.into_iter().map(|(_, text, json)| (text, json)).unzip();
    if dropped {
        text.insert(0, format!("run {} was dropped: what it wrote is removed, but for what others need", args.id));
    }
    Ok(Summary { text: text.join("\n\n"), json: json!({ "run": args.id, "dropped": dropped, "stages": json }) })
}

/// `0/2` of a sharded stage.
pub fn shard(claim: &Claim) -> Option<String> {
    claim.shard.map(|(index, count)| format!("{index}/{count}"))
}

fn stage_text(zone: &str, claim: &Claim, manifest: Option<&Manifest>) -> String {
    let shard = shard(claim).map(|shard| format!(" {shard}")).unwrap_or_default();
    let began = seconds(&claim.started.to_string());
    let time = match manifest {
        Some(manifest) => {
            let took = (manifest.ended - claim.started).to_std().unwrap_or_default();
            format!("began {began}, ended {} ({})", seconds(&manifest.ended.to_string()), crate::table::duration(took))
        }
        None => format!("began {began}, did not end"),
    };
    let mut lines = vec![format!("{}{shard}  {time}", claim.stage)];
    let mut line = |heading: &str, told: String| lines.push(format!("  {heading:<8}  {told}"));
    let version = |version: Option<i64>| version.map(|version| format!(" at version {version}")).unwrap_or_default();
    line("zone", zone.to_owned());
    line("binary", claim.binary.clone());
    if !claim.command.is_empty() {
        line("command", claim.command.join(" "));
    }
    for input in &claim.inputs {
        let digest = input.digest.as_deref().map(|digest| format!(", digest {}", short(digest))).unwrap_or_default();
        line("reads", format!("{}: {}{}{digest}", input.name, input.location, version(input.version)));
    }
    for output in manifest.iter().flat_map(|manifest| &manifest.outputs) {
        line("writes", format!("{}: {}{}", output.name, output.path, version(output.version)));
    }
    line("settings", claim.config.to_string());
    if !claim.seeds.is_empty() {
        line("seeds", claim.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "));
    }
    if let Some(manifest) = manifest.filter(|manifest| !manifest.facts.is_null()) {
        line("facts", manifest.facts.to_string());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(stage: &str, second: i64) -> Claim {
        Claim {
            run: "demo".into(),
            stage: stage.into(),
            shard: None,
            inputs: Vec::new(),
            config: Value::Null,
            seeds: Vec::new(),
            binary: String::new(),
            started: chrono::DateTime::from_timestamp(second, 0).unwrap(),
            command: Vec::new(),
        }
    }

    #[test]
    fn a_run_lists_its_stages_as_they_began_and_that_it_was_dropped() {
        let known = |zone, dropped, claims| Known { zone, run: "demo".into(), dropped, claims, manifests: Vec::new() };
        let private = vec![claim("embed-corpus", 3), claim("partition", 1)];
        let known = |dropped| {
            let release = known("release", dropped, vec![claim("train", 2), claim("vote", 4)]);
            Run::of(&[known("private", dropped, private.clone()), release], "demo".into())
        };
        let stages = "partition, train, embed-corpus, vote";
        assert_eq!(known(false).row(), ["demo", "1970-01-01 00:00:01", "0/4", stages]);
        assert_eq!(known(true).row(), ["demo", "1970-01-01 00:00:01", "dropped", stages]);
        assert_eq!(known(true).json()["dropped"], true);
    }
}
