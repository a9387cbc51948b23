//! `doppel runs` and `doppel show`: what was run, from the manifests in the roots.

use std::collections::BTreeMap;

use lake::{Claim, Manifest};
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::cli::{RunsArgs, ShowArgs};
use crate::roots::{Known, Roots};
use crate::table::table;

/// Lists runs.
pub async fn list(args: RunsArgs) -> Result<Summary, Failure> {
    let mut runs: BTreeMap<String, Vec<Known>> = BTreeMap::new();
    let roots = Roots::open(&args.roots).await?;
    for run in roots.ids().await? {
        let known = roots.known(&run).await?;
        runs.insert(run, known);
    }
    let rows = runs.iter().map(|(run, known)| {
        let done: Vec<&Manifest> = known.iter().flat_map(|known| &known.manifests).collect();
        let claims: Vec<&Claim> = known.iter().flat_map(|known| &known.claims).collect();
        let started = claims.iter().map(|claim| claim.started).min().map(|time| time.to_string()).unwrap_or_default();
        let mut stages: Vec<&str> = Vec::new();
        for claim in &claims {
            if !stages.contains(&claim.stage.as_str()) {
                stages.push(&claim.stage);
            }
        }
        (run.clone(), started, stages.join(", "), done.len(), claims.len())
    });
    let rows: Vec<_> = rows.collect();
    let json = rows.iter().map(|(run, started, stages, done, begun)| {
        json!({ "run": run, "started": started, "stages": stages, "done": done, "begun": begun })
    });
    let json: Value = json.collect();
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(run, started, stages, done, begun)| {
            vec![run.clone(), seconds(started), format!("{done}/{begun}"), stages.clone()]
        })
        .collect();
    let text = if rows.is_empty() {
        "no runs here".to_owned()
    } else {
        table(&["run", "started (UTC)", "done", "stages"], &rows, &[2])
    };
    Ok(Summary { text, json })
}

/// Shows one run.
pub async fn show(args: ShowArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    let known = roots.known(&args.id).await?;
    if known.iter().all(|known| known.claims.is_empty() && known.manifests.is_empty()) {
        let message =
            format!("the run `{}` left nothing in {}\nhelp: `doppel runs` lists runs", args.id, roots.names());
        return Err(Failure::Input(message));
    }
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
    let (text, json): (Vec<String>, Vec<Value>) = stages.into_iter().map(|(_, text, json)| (text, json)).unzip();
    Ok(Summary { text: text.join("\n\n"), json: json!({ "run": args.id, "stages": json }) })
}

/// `0/2` of a sharded stage.
pub fn shard(claim: &Claim) -> Option<String> {
    claim.shard.map(|(index, count)| format!("{index}/{count}"))
}

/// As much of a digest as tells it from others.
pub fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
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

/// A time without its fraction of a second.
pub fn seconds(time: &str) -> String {
    time.get(..19).unwrap_or(time).replace('T', " ")
}
