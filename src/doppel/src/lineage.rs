//! `doppel lineage`: from a table back to the raw input, by what the manifests say.

use std::collections::BTreeSet;

use lake::{Claim, Input, Manifest, PrivateRoot, ReleaseRoot, Zone};
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::cli::LineageArgs;
use crate::roots::Roots;
use crate::runs::{seconds, shard, short};

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
        (["runs" | "corpora", _, ..] | [_], _) => Ok((parts.join("/"), version.flatten())),
        _ => Ok((format!("runs/{}", parts.join("/")), version.flatten())),
    }
}

/// All finished stages of both roots.
struct Finished {
    stages: Vec<(&'static str, Manifest)>,
    zones: Vec<&'static str>,
}

impl Finished {
    async fn read(roots: &Roots) -> Result<Self, Failure> {
        let mut stages = Vec::new();
        if let Some(root) = &roots.private {
            stages.extend(lake::manifest::manifests(root).await?.into_iter().map(|one| (PrivateRoot::NAME, one)));
        }
        if let Some(root) = &roots.release {
            stages.extend(lake::manifest::manifests(root).await?.into_iter().map(|one| (ReleaseRoot::NAME, one)));
        }
        Ok(Self { stages, zones: roots.zones() })
    }

    /// The manifests that name `path` of `zone` as an output.
    fn writers(&self, zone: &str, path: &str) -> Vec<&Manifest> {
        let writes = |one: &Manifest| one.outputs.iter().any(|output| output.path == path);
        self.stages.iter().filter(|(of, one)| *of == zone && writes(one)).map(|(_, one)| one).collect()
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
        let mut writers = self.writers(zone, path);
        while let Some(first) = writers.first().copied() {
            let same = |one: &&Manifest| (&one.claim.run, &one.claim.stage) == (&first.claim.run, &first.claim.stage);
            let (shards, others): (Vec<&Manifest>, Vec<&Manifest>) = writers.into_iter().partition(same);
            writers = others;
            node.makers.push(self.maker(zone, &shards, above));
            let outputs = shards.iter().flat_map(|one| &one.outputs).filter(|output| output.path == path);
            let ended = outputs.filter_map(|output| output.version).max();
            if let (Some(version), Some(ended)) = (version, ended)
                && version != ended
            {
                node.note = Some(format!(
                    "no stage ended with this version: {} of run {} wrote the table, last version {ended}",
                    first.claim.stage, first.claim.run
                ));
            }
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

    fn maker(&self, zone: &'static str, shards: &[&Manifest], above: &mut Vec<String>) -> Maker {
        let first = shards[0];
        let mut inputs: Vec<(String, Node)> = Vec::new();
        for input in shards.iter().flat_map(|one| &one.claim.inputs) {
            if !inputs.iter().any(|(name, node)| (name, node.version) == (&input.name, input.version)) {
                inputs.push((input.name.clone(), self.input(zone, input, above)));
            }
        }
        Maker {
            claims: shards.iter().map(|one| one.claim.clone()).collect(),
            ended: shards.iter().map(|one| one.ended).max().unwrap_or(first.ended),
            inputs,
        }
    }

    fn input(&self, zone: &'static str, input: &Input, above: &mut Vec<String>) -> Node {
        let location = input.location.as_str();
        if !location.starts_with("runs/") && !location.starts_with("corpora/") {
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
            self.stages.iter().flat_map(|(_, one)| &one.outputs).map(|output| output.path.as_str()).collect();
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

/// A stage that wrote it, with all shards.
struct Maker {
    claims: Vec<Claim>,
    ended: chrono::DateTime<chrono::Utc>,
    inputs: Vec<(String, Node)>,
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
        let ended = seconds(&self.ended.to_string());
        let mut text = format!(
            "\n{indent}made by {}{shards} of run {}, {}, ended {ended}\n{indent}settings {}",
            claim.stage, claim.run, claim.binary, claim.config
        );
        for (role, node) in &self.inputs {
            text += &format!("\n{}", node.text(depth + 1, role, told));
        }
        text
    }

    fn json(&self) -> Value {
        let claim = &self.claims[0];
        let input = |(role, node): &(String, Node)| {
            let mut json = node.json();
            json["name"] = role.as_str().into();
            json
        };
        json!({
            "run": claim.run,
            "stage": claim.stage,
            "shards": self.claims.iter().filter_map(shard).collect::<Vec<_>>(),
            "binary": claim.binary,
            "config": claim.config,
            "seeds": claim.seeds,
            "command": claim.command,
            "started": self.claims.iter().map(|claim| claim.started).min(),
            "ended": self.ended,
            "inputs": self.inputs.iter().map(input).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
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

    fn manifest(stage: &str, shard: Option<(u32, u32)>, reads: (&str, &str, i64), writes: (&str, i64)) -> Manifest {
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
        Manifest { ended: claim.started, claim, outputs: vec![output], facts: Value::Null }
    }

    #[test]
    fn a_version_between_those_of_shards_leads_to_all_shards_and_says_so() {
        let shard = |index, version| {
            let shard = manifest(
                "embed",
                Some((index, 2)),
                ("texts", "runs/demo/synthetic", 1),
                ("runs/demo/vectors", version),
            );
            (ReleaseRoot::NAME, shard)
        };
        let finished = Finished { stages: vec![shard(0, 3), shard(1, 4)], zones: vec![ReleaseRoot::NAME] };
        let exact = finished.walk(ReleaseRoot::NAME, "runs/demo/vectors", Some(4), &mut Vec::new());
        assert_eq!((exact.makers.len(), exact.makers[0].claims.len(), &exact.note), (1, 2, &None));
        let between = finished.walk(ReleaseRoot::NAME, "runs/demo/vectors", Some(2), &mut Vec::new());
        assert_eq!(between.makers[0].claims.len(), 2);
        assert!(between.note.is_some_and(|note| note.contains("no stage ended with this version")));
    }

    #[test]
    fn the_private_side_of_a_walk_says_that_its_root_is_missing() {
        let vote = manifest("vote", None, ("corpus", "corpora/chats", 0), ("runs/demo/selected", 1));
        let finished = Finished { stages: vec![(ReleaseRoot::NAME, vote)], zones: vec![ReleaseRoot::NAME] };
        let tree = finished.walk(ReleaseRoot::NAME, "runs/demo/selected", Some(1), &mut Vec::new());
        assert!(tree.text(0, "", &mut BTreeSet::new()).contains("the private root was not given"));
    }

    #[test]
    fn manifests_that_lead_in_a_circle_end() {
        let one = manifest("a", None, ("texts", "runs/demo/y", 1), ("runs/demo/x", 1));
        let other = manifest("b", None, ("texts", "runs/demo/x", 1), ("runs/demo/y", 1));
        let stages = vec![(ReleaseRoot::NAME, one), (ReleaseRoot::NAME, other)];
        let finished = Finished { stages, zones: vec![ReleaseRoot::NAME] };
        let tree = finished.walk(ReleaseRoot::NAME, "runs/demo/x", Some(1), &mut Vec::new());
        assert!(tree.text(0, "", &mut BTreeSet::new()).contains("made of itself"));
    }
}
