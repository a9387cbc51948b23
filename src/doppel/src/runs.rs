//! `doppel runs` and `doppel show`: what was run, from the manifests in the roots.

use std::collections::BTreeMap;
use std::time::Duration;

use lake::{Manifest, PrivateRoot, ReleaseRoot, StorageOptions, Zone};
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::cli::{RootsArgs, RunsArgs, ShowArgs};
use crate::table::table;

/// What one root knows.
struct Known {
    zone: &'static str,
    manifests: Vec<Manifest>,
    claims: Vec<lake::Claim>,
}

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
        let claims: Vec<&lake::Claim> = known.iter().flat_map(|known| &known.claims).collect();
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
    let mut text = Vec::new();
    let mut json = Vec::new();
    for Known { zone, manifests, claims } in &known {
        for manifest in manifests {
            text.push(manifest_text(zone, manifest));
            json.push(json!({ "zone": zone, "done": true, "manifest": manifest }));
        }
        for claim in claims {
            let same = |manifest: &Manifest| manifest.claim.stage == claim.stage && manifest.claim.shard == claim.shard;
            if !manifests.iter().any(same) {
                text.push(format!(
                    "{}  {zone}  not finished; begun {}",
                    stage(claim),
                    seconds(&claim.started.to_string())
                ));
                json.push(json!({ "zone": zone, "done": false, "claim": claim }));
            }
        }
    }
    Ok(Summary { text: text.join("\n\n"), json: json!({ "run": args.id, "stages": json }) })
}

fn stage(claim: &lake::Claim) -> String {
    match claim.shard {
        Some((index, count)) => format!("{} {index}/{count}", claim.stage),
        None => claim.stage.clone(),
    }
}

fn manifest_text(zone: &str, manifest: &Manifest) -> String {
    let claim = &manifest.claim;
    let took = (manifest.ended - claim.started).to_std().unwrap_or_default();
    let mut text = format!(
        "{}  {zone}  begun {}, took {}  by {}",
        stage(claim),
        seconds(&claim.started.to_string()),
        crate::table::duration(took),
        claim.binary
    );
    for input in &claim.inputs {
        let version = input.version.map(|version| format!(" at version {version}")).unwrap_or_default();
        text += &format!("\n  reads   {}: {}{version}", input.name, input.location);
    }
    for output in &manifest.outputs {
        let version = output.version.map(|version| format!(" at version {version}")).unwrap_or_default();
        text += &format!("\n  writes  {}: {}{version}", output.name, output.path);
    }
    text += &format!("\n  config  {}", claim.config);
    if !manifest.facts.is_null() {
        text += &format!("\n  facts   {}", manifest.facts);
    }
    text
}

/// A time without its fraction of a second.
fn seconds(time: &str) -> String {
    time.get(..19).unwrap_or(time).replace('T', " ")
}

/// The roots that were given.
struct Roots {
    private: Option<PrivateRoot>,
    release: Option<ReleaseRoot>,
}

impl Roots {
    async fn open(args: &RootsArgs) -> Result<Self, Failure> {
        let options = StorageOptions { timeout: Duration::from_secs(args.storage_timeout) };
        let given = |url: &Option<String>| url.clone().filter(|url| !url.is_empty());
        let private = match given(&args.private) {
            Some(url) => Some(PrivateRoot::open(&url, &options).await?),
            None => None,
        };
        let release = match given(&args.release) {
            Some(url) => Some(ReleaseRoot::open(&url, &options).await?),
            None => None,
        };
        if private.is_none() && release.is_none() {
            let message = "no root is given\nhelp: pass --release URL, --private URL, or both";
            return Err(Failure::Usage(message.to_owned()));
        }
        Ok(Self { private, release })
    }

    fn names(&self) -> String {
        let private = self.private.iter().map(|root| root.url().to_owned());
        private.chain(self.release.iter().map(|root| root.url().to_owned())).collect::<Vec<_>>().join(" and ")
    }

    async fn ids(&self) -> Result<Vec<String>, Failure> {
        let mut ids = Vec::new();
        if let Some(root) = &self.private {
            ids.extend(lake::manifest::list_runs(root).await?);
        }
        if let Some(root) = &self.release {
            ids.extend(lake::manifest::list_runs(root).await?);
        }
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    async fn known(&self, run: &str) -> Result<Vec<Known>, Failure> {
        let mut known = Vec::new();
        if let Some(root) = &self.private {
            known.push(read(root, run).await?);
        }
        if let Some(root) = &self.release {
            known.push(read(root, run).await?);
        }
        Ok(known)
    }
}

async fn read<Z: Zone>(root: &Z, run: &str) -> Result<Known, Failure> {
    let manifests = lake::manifest::manifests_of(root, run).await?;
    let claims = lake::manifest::claims_of(root, run).await?;
    Ok(Known { zone: Z::NAME, manifests, claims })
}
