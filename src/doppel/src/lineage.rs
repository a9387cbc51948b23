//! `doppel lineage`: from a table back to the raw input, by what the manifests say.

use std::collections::BTreeSet;

use clap::Args;
use lake::{Claim, Input, Manifest, PrivateRoot, Zone, layout};
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::roots::{self, Known, Roots, RootsArgs};
use crate::runs::shard;
use crate::table::{seconds, short};

/// Walk back from a table to the raw input.
///
/// By the manifests in both roots: which stage of which run wrote the table, by which binary, with which settings, and
/// from which versions; and so on for each of those. With one root, the walk ends where the other would be read.
#[derive(Args, Clone, Debug)]
pub struct LineageArgs {
    /// Table or other output, by its path below its root, such as runs/demo/selected, demo/selected or corpora/chats;
    /// TABLE@VERSION for a version other than the latest.
    pub table: String,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Tells where a table comes from.
pub async fn lineage(args: LineageArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    let finished = Finished::read(&roots).await?;
    let (path, version) = named(&args.table)?;
    let mut trees = Vec::new();
    for zone in roots.zones() {
        let latest = roots.version(zone, &path).await?;
        if latest.is_none() && finished.writers(zone, &path).is_empty() {
            continue;
        }
        if let (Some(version), Some(latest)) = (version, latest)
            && version > latest
        {
            let help = "help: `doppel lineage TABLE` without @VERSION takes the latest";
            return Err(Failure::Input(format!("{path}: its latest version is {latest}, not {version}\n{help}")));
        }
        trees.push(finished.walk(zone, &path, version.or(latest), &mut Vec::new()));
    }
    if trees.is_empty() {
        return Err(Failure::Input(finished.unknown(&path, &roots)));
    }
    let mut text = Vec::new();
    for tree in &trees {
        let mut told = BTreeSet::new();
        text.push(tree.text(0, "", &mut told));
    }
    let json = match trees.as_slice() {
        [tree] => tree.json(),
        trees => trees.iter().map(Node::json).collect(),
    };
    Ok(Summary { text: text.join("\n\n"), json })
}

/// The path and version of `TABLE[@VERSION]`; a path that begins with neither `runs` nor `corpora` begins with a run.
fn named(text: &str) -> Result<(String, Option<i64>), Failure> {
    let (table, version) = match text.rsplit_once('@') {
        Some((table, version)) => (table, Some(version)),
        None => (text, None),
    };
    let version = version.map(|version| version.parse().ok().filter(|version: &i64| *version >= 0));
    let parts: Vec<&str> = table.split('/').filter(|part| !part.is_empty()).collect();
    let wrong = parts.iter().any(|part| matches!(*part, "." | "..")) || version == Some(None);
    match (parts.as_slice(), wrong) {
        ([], _) | (_, true) => Err(Failure::Usage(format!(
            "{text}: expected TABLE or TABLE@VERSION, such as runs/demo/selected, demo/selected@1 or corpora/chats"
        ))),
        ([layout::RUNS | layout::CORPORA, _, ..] | [_], _) => Ok((parts.join("/"), version.flatten())),
        ([run, rest @ ..], _) => Ok((layout::of_run(run, &rest.join("/")), version.flatten())),
    }
}

/// A stage, or one shard of it, that ended.
struct Done {
    zone: &'static str,
    manifest: Manifest,
    /// The binary that began it, where another one ended it.
    begun_by: Option<String>,
    /// Whether its run was dropped since.
    dropped: bool,
}

impl Done {
    fn all(known: Known) -> Vec<Self> {
        let Known { zone, dropped, claims, manifests, .. } = known;
        let begun_by = |manifest: &Manifest| {
            let of = |claim: &Claim| (claim.stage.clone(), claim.shard);
            let claim = claims.iter().find(|claim| of(claim) == of(&manifest.claim))?;
            (claim.binary != manifest.claim.binary).then(|| claim.binary.clone())
        };
        let done = |manifest| Self { zone, begun_by: begun_by(&manifest), manifest, dropped };
        manifests.into_iter().map(done).collect()
    }

    fn claim(&self) -> &Claim {
        &self.manifest.claim
    }

    fn is_same_stage(&self, other: &Self) -> bool {
        (&self.claim().run, &self.claim().stage) == (&other.claim().run, &other.claim().stage)
    }

    /// Whether both were made by the same binaries with the same settings; their commands differ in the shard.
    fn is_made_alike(&self, other: &Self) -> bool {
        let making = |one: &Self| (one.claim().binary.clone(), one.begun_by.clone(), one.claim().seeds.clone());
        making(self) == making(other) && self.claim().config == other.claim().config
    }
}

/// `all` in groups of those that are `alike`.
fn groups(all: Vec<&Done>, alike: fn(&Done, &Done) -> bool) -> Vec<Vec<&Done>> {
    let mut groups: Vec<Vec<&Done>> = Vec::new();
    for one in all {
        match groups.iter_mut().find(|group| alike(group[0], one)) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }
    groups
}

/// All finished stages of both roots.
struct Finished {
    stages: Vec<Done>,
    zones: Vec<&'static str>,
}

impl Finished {
    async fn read(roots: &Roots) -> Result<Self, Failure> {
        let mut known = Vec::new();
        if let Some(root) = &roots.private {
            known.extend(roots::all(root).await?);
        }
        if let Some(root) = &roots.release {
            known.extend(roots::all(root).await?);
        }
        Ok(Self { stages: known.into_iter().flat_map(Done::all).collect(), zones: roots.zones() })
    }

    /// The stages that name `path` of `zone` as an output.
    fn writers(&self, zone: &str, path: &str) -> Vec<&Done> {
        let writes = |one: &Manifest| one.outputs.iter().any(|output| output.path == path);
        self.stages.iter().filter(|one| one.zone == zone && writes(&one.manifest)).collect()
    }

    /// What `path` came from. `above` is the way from the table that was asked for: manifests edited by hand could
    /// lead in a circle.
    fn walk(&self, zone: &'static str, path: &str, version: Option<i64>, above: &mut Vec<String>) -> Node {
        let mut node = Node { zone, path: path.to_owned(), version, digest: None, note: None, makers: Vec::new() };
        let name = format!("{zone} {path}");
        if above.contains(&name) {
            node.note = Some("it is made of itself: a manifest was edited".to_owned());
            return node;
        }
        above.push(name);
        for shards in groups(self.writers(zone, path), Done::is_same_stage) {
            let Claim { run, stage, .. } = shards[0].claim();
            let outputs = shards.iter().flat_map(|one| &one.manifest.outputs).filter(|output| output.path == path);
            let ended = outputs.filter_map(|output| output.version).max();
            if let (Some(version), Some(ended)) = (version, ended)
                && version != ended
            {
                node.note = Some(format!(
                    "no stage ended with this version: {stage} of run {run} wrote the table, last version {ended}"
                ));
            }
            let alike = groups(shards, Done::is_made_alike);
            node.makers.extend(alike.into_iter().map(|shards| self.maker(zone, &shards, above)));
        }
        if node.makers.is_empty() {
            node.note = Some(match self.zones.contains(&zone) {
                true => "no stage in the roots wrote it".to_owned(),
                false => format!("the {zone} root was not given"),
            });
        }
        above.pop();
        node
    }

    fn maker(&self, zone: &'static str, shards: &[&Done], above: &mut Vec<String>) -> Maker {
        let first = shards[0];
        let mut inputs: Vec<(Input, Node)> = Vec::new();
        for input in shards.iter().flat_map(|one| &one.claim().inputs) {
            if !inputs.iter().any(|(known, _)| known == input) {
                inputs.push((input.clone(), self.input(zone, input, above)));
            }
        }
        Maker {
            claims: shards.iter().map(|one| one.claim().clone()).collect(),
            begun_by: first.begun_by.clone(),
            dropped: first.dropped,
            ended: shards.iter().map(|one| one.manifest.ended).max().unwrap_or(first.manifest.ended),
            inputs,
        }
    }

    fn input(&self, zone: &'static str, input: &Input, above: &mut Vec<String>) -> Node {
        let location = input.location.as_str();
        if layout::run_of(location).is_none() && !layout::is_of_corpus(location) {
            let what = if input.digest.is_some() { "a model, or another file, outside the roots" } else { "raw input" };
            let (path, digest) = (location.to_owned(), input.digest.clone());
            return Node { zone: "", path, version: None, digest, note: Some(what.to_owned()), makers: Vec::new() };
        }
        // Corpora and what stages call after them lie in the private zone; all else beside the stage that read it.
        let zone = if input.name.starts_with("corpus") { PrivateRoot::NAME } else { zone };
        let mut node = self.walk(zone, location, input.version, above);
        node.digest = input.digest.clone();
        node
    }

    fn unknown(&self, path: &str, roots: &Roots) -> String {
        let outputs: BTreeSet<&str> =
            self.stages.iter().flat_map(|one| &one.manifest.outputs).map(|output| output.path.as_str()).collect();
        let name = |path: &str| path.rsplit('/').next().map(str::to_owned);
        let near = workflow::finding::nearest(path, outputs.iter().copied());
        let of_name: Vec<&str> = outputs.iter().copied().filter(|other| name(other) == name(path)).take(5).collect();
        let hint = match (near, of_name.as_slice()) {
            (Some(near), _) => format!("did you mean `{near}`?"),
            (None, []) => "`doppel runs` lists runs, and `doppel show RUN` what they wrote".to_owned(),
            (None, others) => format!("tables of that name: {}", others.join(", ")),
        };
        format!("{path}: no such table in {}\nhelp: {hint}", roots.names())
    }
}

/// Something that was read or written.
struct Node {
    /// Empty for what lies outside the roots.
    zone: &'static str,
    path: String,
    version: Option<i64>,
    digest: Option<String>,
    note: Option<String>,
    makers: Vec<Maker>,
}

/// A stage that wrote it, with all shards that were made alike.
struct Maker {
    claims: Vec<Claim>,
    begun_by: Option<String>,
    dropped: bool,
    ended: chrono::DateTime<chrono::Utc>,
    inputs: Vec<(Input, Node)>,
}

impl Node {
    /// `role` is what the stage above calls it; `told` are the tables whose makers were told before.
    fn text(&self, depth: usize, role: &str, told: &mut BTreeSet<String>) -> String {
        let indent = "  ".repeat(depth);
        let role = if role.is_empty() { String::new() } else { format!("{role}: ") };
        let version = self.version.map(|version| format!(" at version {version}")).unwrap_or_default();
        let digest = self.digest.as_deref().map(|digest| format!("  digest {}", short(digest))).unwrap_or_default();
        let zone = if self.zone.is_empty() { String::new() } else { format!("  ({} zone)", self.zone) };
        let mut text = format!("{indent}{role}{}{version}{digest}{zone}", self.path);
        if let Some(note) = &self.note {
            text += &format!("\n{indent}  {note}");
        }
        if !self.makers.is_empty() && !told.insert(format!("{} {} {:?}", self.zone, self.path, self.version)) {
            return text + "  as above";
        }
        for maker in &self.makers {
            text += &maker.text(depth + 1, told);
        }
        text
    }

    fn json(&self) -> Value {
        json!({
            "zone": if self.zone.is_empty() { Value::Null } else { self.zone.into() },
            "path": self.path,
            "version": self.version,
            "digest": self.digest,
            "note": self.note,
            "made_by": self.makers.iter().map(Maker::json).collect::<Vec<_>>(),
        })
    }
}

impl Maker {
    fn text(&self, depth: usize, told: &mut BTreeSet<String>) -> String {
        let indent = "  ".repeat(depth);
        let claim = &self.claims[0];
        let shards: Vec<String> = self.claims.iter().filter_map(shard).collect();
        let shards = if shards.is_empty() { String::new() } else { format!(" {}", shards.join(", ")) };
        let dropped = if self.dropped { " (dropped)" } else { "" };
        let begun = self.begun_by.as_deref().map(|binary| format!(" (begun by {binary})")).unwrap_or_default();
        let ended = seconds(&self.ended.to_string());
        let mut text = format!(
            "\n{indent}made by {}{shards} of run {}{dropped}, {}{begun}, ended {ended}\n{indent}settings {}",
            claim.stage, claim.run, claim.binary, claim.config
        );
        for (input, node) in &self.inputs {
            text += &format!("\n{}", node.text(depth + 1, &input.name, told));
        }
        text
    }

    fn json(&self) -> Value {
        let claim = &self.claims[0];
        let input = |(input, node): &(Input, Node)| {
            let mut json = node.json();
            json["name"] = input.name.as_str().into();
            json
        };
        json!({
            "run": claim.run,
            "dropped": self.dropped,
            "stage": claim.stage,
            "shards": self.claims.iter().filter_map(shard).collect::<Vec<_>>(),
            "binary": claim.binary,
            "begun_by": self.begun_by,
            "config": claim.config,
            "seeds": claim.seeds,
            "command": claim.command,
            "commands": self.claims.iter().map(|claim| &claim.command).collect::<Vec<_>>(),
            "started": self.claims.iter().map(|claim| claim.started).min(),
            "ended": self.ended,
            "inputs": self.inputs.iter().map(input).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use lake::ReleaseRoot;

    use super::*;

    #[test]
    fn a_table_is_named_with_or_without_its_folder_and_version() {
        for (text, path, version) in [
            ("runs/demo/selected", "runs/demo/selected", None),
            ("demo/selected@3", "runs/demo/selected", Some(3)),
            ("/corpora/chats/@0", "corpora/chats", Some(0)),
            ("candidates", "candidates", None),
        ] {
            assert_eq!(named(text).unwrap(), (path.to_owned(), version), "{text}");
        }
        for wrong in ["", "@1", "demo/selected@x", "demo/selected@-1", "demo/../keys"] {
            assert_eq!(named(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    fn done(stage: &str, shard: Option<(u32, u32)>, reads: (&str, &str, i64), writes: (&str, i64)) -> Done {
        let input = Input { name: reads.0.into(), location: reads.1.into(), version: Some(reads.2), digest: None };
        let output = lake::Output { name: "out".into(), path: writes.0.into(), version: Some(writes.1) };
        let claim = Claim {
            run: "demo".into(),
            stage: stage.into(),
            shard,
            inputs: vec![input],
            config: json!({}),
            seeds: Vec::new(),
            binary: format!("doppel-{stage} 0.1.0"),
            started: chrono::DateTime::UNIX_EPOCH,
            command: Vec::new(),
        };
        let manifest = Manifest { ended: claim.started, claim, outputs: vec![output], facts: Value::Null };
        Done { zone: ReleaseRoot::NAME, manifest, begun_by: None, dropped: false }
    }

    fn finished(stages: Vec<Done>) -> Finished {
        Finished { stages, zones: vec![ReleaseRoot::NAME] }
    }

    /// A shard of two that embed one table.
    fn embedded(index: u32, version: i64) -> Done {
        done("embed", Some((index, 2)), ("texts", "runs/demo/synthetic", 1), ("runs/demo/vectors", version))
    }

    #[test]
    fn a_version_between_those_of_shards_leads_to_all_shards_and_says_so() {
        let finished = finished(vec![embedded(0, 3), embedded(1, 4)]);
        let exact = finished.walk(ReleaseRoot::NAME, "runs/demo/vectors", Some(4), &mut Vec::new());
        assert_eq!((exact.makers.len(), exact.makers[0].claims.len(), &exact.note), (1, 2, &None));
        let between = finished.walk(ReleaseRoot::NAME, "runs/demo/vectors", Some(2), &mut Vec::new());
        assert_eq!(between.makers[0].claims.len(), 2);
        assert!(between.note.is_some_and(|note| note.contains("no stage ended with this version")));
    }

    #[test]
    fn shards_that_were_made_differently_are_told_apart_with_all_that_they_read() {
        let (first, mut second) = (embedded(0, 3), embedded(1, 4));
        second.manifest.claim.binary = "doppel-embed 0.2.0".into();
        second.manifest.claim.inputs[0].location = "runs/other/synthetic".into();
        second.begun_by = Some("doppel-embed 0.1.0".into());
        let tree = finished(vec![first, second]).walk(ReleaseRoot::NAME, "runs/demo/vectors", Some(4), &mut Vec::new());
        assert_eq!(tree.note, None);
        let text = tree.text(0, "", &mut BTreeSet::new());
        for part in [
            "made by embed 0/2 of run demo, doppel-embed 0.1.0, ended",
            "texts: runs/demo/synthetic at version 1",
            "made by embed 1/2 of run demo, doppel-embed 0.2.0 (begun by doppel-embed 0.1.0), ended",
            "texts: runs/other/synthetic at version 1",
        ] {
            assert!(text.contains(part), "expected {part:?} in:\n{text}");
        }
        assert_eq!(tree.json()["made_by"][1]["begun_by"], "doppel-embed 0.1.0");
    }

    #[test]
    fn inputs_of_shards_are_the_same_only_in_place_version_and_digest() {
        let (first, mut second) = (embedded(0, 3), embedded(1, 4));
        second.manifest.claim.inputs[0].digest = Some("c0ffee".into());
        let tree = finished(vec![first, second]).walk(ReleaseRoot::NAME, "runs/demo/vectors", Some(4), &mut Vec::new());
        assert_eq!((tree.makers.len(), tree.makers[0].inputs.len()), (1, 2));
    }

    #[test]
    fn a_claim_of_another_binary_and_a_dropped_run_are_told() {
        let manifest = embedded(0, 3).manifest;
        let mut claim = manifest.claim.clone();
        claim.binary = "doppel-embed 0.0.9".into();
        let (zone, run) = (ReleaseRoot::NAME, "demo".to_owned());
        let known = Known { zone, run, dropped: true, claims: vec![claim], manifests: vec![manifest] };
        let done = Done::all(known);
        assert_eq!((done[0].begun_by.as_deref(), done[0].dropped), (Some("doppel-embed 0.0.9"), true));
        let tree = finished(done).walk(zone, "runs/demo/vectors", Some(3), &mut Vec::new());
        assert!(tree.text(0, "", &mut BTreeSet::new()).contains("of run demo (dropped), doppel-embed 0.1.0"));
    }

    #[test]
    fn the_private_side_of_a_walk_says_that_its_root_is_missing() {
        let vote = done("vote", None, ("corpus", "corpora/chats", 0), ("runs/demo/selected", 1));
        let tree = finished(vec![vote]).walk(ReleaseRoot::NAME, "runs/demo/selected", Some(1), &mut Vec::new());
        assert!(tree.text(0, "", &mut BTreeSet::new()).contains("the private root was not given"));
    }

    #[test]
    fn manifests_that_lead_in_a_circle_end() {
        let one = done("a", None, ("texts", "runs/demo/y", 1), ("runs/demo/x", 1));
        let other = done("b", None, ("texts", "runs/demo/x", 1), ("runs/demo/y", 1));
        let tree = finished(vec![one, other]).walk(ReleaseRoot::NAME, "runs/demo/x", Some(1), &mut Vec::new());
        assert!(tree.text(0, "", &mut BTreeSet::new()).contains("made of itself"));
    }
}
