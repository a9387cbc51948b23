//! `doppel openlineage`: what claims and manifests say, as events of OpenLineage, so that catalogues that exist already
//! can show where a table came from.
//!
//! PRIVACY: of the private zone names and times alone are told, and versions of corpora, which releases name too. Not
//! configurations, facts and digests, nor versions of tables that grow by chunks, which count records.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;
use lake::{Claim, Input, Manifest, Output, PrivateRoot, ReleaseRoot, Zone, layout};
use serde_json::{Value, json};
use stage::{Failure, Summary};
use url::Url;

use crate::roots::{self, Known, Roots, RootsArgs};

/// Who made the events: a name, since this program has no one address.
const PRODUCER: &str = concat!("urn:doppel:openlineage:", env!("CARGO_PKG_VERSION"));

/// Where the schemas of the specification are published.
const SPEC: &str = "https://openlineage.io/spec";

/// The path that servers of the specification listen at.
const ENDPOINT: &str = "/api/v1/lineage";

/// Tell the lineage of runs as OpenLineage events, to a file or an HTTP endpoint.
///
/// Each stage, each shard by itself, is one OpenLineage run: START when it was claimed, COMPLETE when its manifest
/// was written. The ids follow from run, stage and shard, so telling the same again changes nothing. Tables are
/// named by OpenLineage's rules, such as namespace s3://bucket and the path in it, with their version.
///
/// Of the private zone names, times and the versions of corpora are told, and nothing else. Where no private root
/// is given, what lies in it is in the namespace doppel://private.
///
/// OPENLINEAGE_API_KEY is sent to an HTTP endpoint as a bearer token.
#[derive(Args, Clone, Debug)]
pub struct OpenlineageArgs {
    /// This run alone; by default all runs.
    #[arg(long, value_name = "RUN", value_parser = stage::common::run_id)]
    pub run: Option<String>,
    /// A file for JSON Lines, or an http(s):// URL that each event is posted to; - is standard output.
    ///
    /// A URL without a path gets /api/v1/lineage.
    #[arg(long, env = "OPENLINEAGE_URL", value_name = "FILE|URL", default_value = "-", hide_env_values = true)]
    pub to: String,
    /// Namespace of the jobs.
    #[arg(long, env = "OPENLINEAGE_NAMESPACE", value_name = "NAME", default_value = "doppel")]
    pub namespace: String,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Tells the events of runs.
pub async fn openlineage(args: OpenlineageArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    let mut events = Vec::new();
    if let Some(root) = &roots.private {
        let teller = Teller { args: &args, roots: &roots, zone: PrivateRoot::NAME };
        events.extend(teller.events(&roots::all(root).await?));
    }
    if let Some(root) = &roots.release {
        let teller = Teller { args: &args, roots: &roots, zone: ReleaseRoot::NAME };
        events.extend(teller.events(&roots::all(root).await?));
    }
    events.sort_by_key(|(time, _)| *time);
    let events: Vec<String> = events.into_iter().map(|(_, event)| event.to_string()).collect();
    if let Some(run) = args.run.as_ref().filter(|_| events.is_empty()) {
        return Err(roots.unknown(run));
    }
    if events.is_empty() {
        roots.refuse_nothing().await?;
    }
    let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
    match args.to.as_str() {
        "-" => {
            stage::print(lines.as_bytes())?;
            return Ok(Summary::silent());
        }
        url if url.starts_with("http://") || url.starts_with("https://") => post(url, &events).await?,
        file => std::fs::write(file, lines)
            .map_err(|error| Failure::Usage(format!("--to {file}: {error}\nhelp: name a file that can be written")))?,
    }
    let text = format!("openlineage: {} events told", events.len());
    Ok(Summary { text, json: json!({ "events": events.len() }) })
}

/// Builds the events of one zone.
struct Teller<'a> {
    args: &'a OpenlineageArgs,
    roots: &'a Roots,
    zone: &'static str,
}

impl Teller<'_> {
    /// Events with their times.
    fn events(&self, all: &[Known]) -> Vec<(DateTime<Utc>, Value)> {
        let wanted = |told: &&Known| self.args.run.as_ref().is_none_or(|run| *run == told.run);
        let mut events = Vec::new();
        for told in all.iter().filter(wanted) {
            for claim in &told.claims {
                events.push((claim.started, self.event("START", claim.started, claim, &[])));
                if let Some(manifest) = told.manifest_of(claim) {
                    let Manifest { claim, outputs, ended, .. } = manifest;
                    events.push((*ended, self.event("COMPLETE", *ended, claim, outputs)));
                }
            }
        }
        events
    }

    fn event(&self, kind: &str, time: DateTime<Utc>, claim: &Claim, outputs: &[Output]) -> Value {
        let namespace = &self.args.namespace;
        let parent = facet(
            "1-1-0",
            "ParentRunFacet",
            json!({
                "run": { "runId": run_id(&[namespace, &claim.run]) },
                "job": { "namespace": namespace, "name": "run" },
            }),
        );
        let version = claim.binary.split_once(' ').map_or("", |(_, version)| version);
        let engine = facet("1-1-1", "ProcessingEngineRunFacet", json!({ "name": "doppel", "version": version }));
        let kind_of_job = facet(
            "2-0-3",
            "JobTypeJobFacet",
            json!({
                "processingType": "BATCH", "integration": "DOPPEL", "jobType": "STAGE",
            }),
        );
        json!({
            "eventType": kind,
            "eventTime": time.to_rfc3339_opts(SecondsFormat::Millis, true),
            "producer": PRODUCER,
            "schemaURL": format!("{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"),
            "run": {
                "runId": stage_run_id(namespace, claim),
                "facets": { "parent": parent, "processing_engine": engine },
            },
            "job": { "namespace": namespace, "name": claim.stage, "facets": { "jobType": kind_of_job } },
            "inputs": claim.inputs.iter().map(|input| self.input(input)).collect::<Value>(),
            "outputs": outputs.iter().map(|output| self.output(output)).collect::<Value>(),
        })
    }

    fn input(&self, input: &Input) -> Value {
        let location = &input.location;
        // PRIVACY: a digest of a private stage's input may be that of private records.
        let digest = input.digest.as_ref().filter(|_| self.zone == ReleaseRoot::NAME);
        if input.name == "corpus-embeddings" || layout::is_of_corpus(location) {
            return self.below(PrivateRoot::NAME, location, input.version);
        }
        if layout::run_of(location).is_some() {
            return match (input.version, digest) {
                (None, Some(digest)) => dataset(self.place(self.zone, location), Some(digest.clone())),
                (version, _) => self.below(self.zone, location, version),
            };
        }
        let place = match lake::canonical_url(location) {
            // A model goes by its name, which is no place.
            Ok(url) if location.contains('/') => split(&url),
            _ => ("doppel".to_owned(), location.clone()),
        };
        dataset(place, digest.cloned())
    }

    fn output(&self, output: &Output) -> Value {
        self.below(self.zone, &output.path, output.version)
    }

    /// The dataset at `path` below the root of `zone`.
    fn below(&self, zone: &str, path: &str, version: Option<i64>) -> Value {
        let may_be_told = zone == ReleaseRoot::NAME || layout::is_of_corpus(path);
        let version = version.filter(|_| may_be_told).map(|version| version.to_string());
        dataset(self.place(zone, path), version)
    }

    fn place(&self, zone: &str, path: &str) -> (String, String) {
        let url = match zone {
            ReleaseRoot::NAME => self.roots.release.as_ref().map(|root| root.url_of(path)),
            _ => self.roots.private.as_ref().map(|root| root.url_of(path)),
        };
        url.map_or_else(|| (format!("doppel://{zone}"), path.to_owned()), |url| split(&url))
    }
}

/// Namespace and name of what lies at `url`, by OpenLineage's rules: `s3://bucket` and the path in it, or `file` and
/// the absolute path.
fn split(url: &str) -> (String, String) {
    let (scheme, rest) = url.split_once("://").unwrap_or(("doppel", url));
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    match scheme {
        "file" => ("file".to_owned(), format!("/{}", decoded(path))),
        _ => (format!("{scheme}://{bucket}"), decoded(path)),
    }
}

/// The path of a URL without its percent-encoding, since a catalogue knows files and objects by their real names.
fn decoded(path: &str) -> String {
    // Keys are encoded as the paths of files are, and `url` decodes those alone.
    let url = Url::parse(&format!("file:///{path}")).ok();
    let Some(file) = url.and_then(|url| url.to_file_path().ok()) else { return path.to_owned() };
    file.to_string_lossy().trim_start_matches('/').to_owned()
}

fn dataset((namespace, name): (String, String), version: Option<String>) -> Value {
    let mut facets = json!({});
    if let Some(version) = version {
        facets["version"] = facet("1-0-1", "DatasetVersionDatasetFacet", json!({ "datasetVersion": version }));
    }
    json!({ "namespace": namespace, "name": name, "facets": facets })
}

/// A facet of the specification with its two common fields.
fn facet(version: &str, name: &str, mut fields: Value) -> Value {
    fields["_producer"] = PRODUCER.into();
    fields["_schemaURL"] = format!("{SPEC}/facets/{version}/{name}.json#/$defs/{name}").into();
    fields
}

fn stage_run_id(namespace: &str, claim: &Claim) -> String {
    let shard = claim.shard.map(|(index, count)| format!("{index}-of-{count}")).unwrap_or_default();
    run_id(&[namespace, &claim.run, &claim.stage, &shard])
}

/// A UUID that follows from `parts`.
fn run_id(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("doppel 2026 openlineage run id");
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let bytes: [u8; 16] = std::array::from_fn(|at| hasher.finalize().as_bytes()[at]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

/// Posts each event; those before a failure stay told, which telling all again does not change.
async fn post(to: &str, events: &[String]) -> Result<(), Failure> {
    let url = endpoint(to)?;
    let client = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).timeout(Duration::from_secs(30));
    // A redirected POST may become a GET without a body, and what that answers is not about the event.
    let client = client.redirect(reqwest::redirect::Policy::none()).build().map_err(|_| {
        Failure::Usage("no TLS client can be set up\nhelp: are the system's certificates readable?".to_owned())
    })?;
    let key = std::env::var("OPENLINEAGE_API_KEY").ok().filter(|key| !key.is_empty());
    for event in events {
        let mut request = client.post(url.clone()).header("content-type", "application/json").body(event.clone());
        if let Some(key) = &key {
            request = request.bearer_auth(key);
        }
        let status = match request.send().await {
            Ok(answer) => answer.status(),
            Err(error) => return Err(unreachable(&url, &error)),
        };
        if !status.is_success() {
            return Err(refused(&url, status.as_u16()));
        }
    }
    Ok(())
}

fn endpoint(to: &str) -> Result<Url, Failure> {
    // What is wrong with it is not repeated: it may hold a password.
    let mut url = Url::parse(to)
        .map_err(|_| Failure::Usage("--to: not a valid URL\nhelp: write http(s)://host[:port][/path]".to_owned()))?;
    if !url.username().is_empty() || url.password().is_some() {
        let message = "--to: a URL with credentials\nhelp: set OPENLINEAGE_API_KEY instead";
        return Err(Failure::Usage(message.to_owned()));
    }
    if url.path() == "/" {
        url.set_path(ENDPOINT);
    }
    Ok(url)
}

/// A URL as it may be shown: a query may hold a key.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

fn unreachable(url: &Url, error: &reqwest::Error) -> Failure {
    let reason = match error {
        error if error.is_timeout() => "no answer in time",
        error if error.is_connect() => "cannot be reached",
        _ => "the connection failed",
    };
    Failure::Transient(format!(
        "{}: {reason}\nhelp: check the address and the network, then run again; what was told stays as it is",
        shown(url)
    ))
}

fn refused(url: &Url, status: u16) -> Failure {
    let url = shown(url);
    match status {
        408 | 429 | 500.. => Failure::Transient(format!("{url}: the server answered {status}\nhelp: run again later")),
        401 | 403 => Failure::Usage(format!("{url}: the server answered {status}\nhelp: set OPENLINEAGE_API_KEY")),
        _ => Failure::Usage(format!(
            "{url}: the server answered {status}\nhelp: give the address of an OpenLineage endpoint; without a path it \
             is {ENDPOINT}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datasets_are_named_by_the_specification() {
        let named = |url: &str| split(url);
        assert_eq!(named("s3://lake/a/b"), ("s3://lake".to_owned(), "a/b".to_owned()));
        assert_eq!(named("gs://lake"), ("gs://lake".to_owned(), String::new()));
        assert_eq!(named("file:///data/lake"), ("file".to_owned(), "/data/lake".to_owned()));
        assert_eq!(named("file:///my%20d%C3%A4ta/100%25/a%23b").1, "/my däta/100%/a#b");
        assert_eq!(named("s3://lake/my%20d%C3%A4ta/100%25").1, "my däta/100%");
    }

    #[test]
    fn run_ids_follow_from_their_parts() {
        assert_eq!(run_id(&["a", "b"]), run_id(&["a", "b"]));
        assert_ne!(run_id(&["a", "b"]), run_id(&["ab", ""]));
        let id: uuid::Uuid = run_id(&["doppel", "demo"]).parse().unwrap();
        assert_eq!((id.get_version_num(), id.get_variant()), (8, uuid::Variant::RFC4122));
    }

    #[test]
    fn an_endpoint_gets_a_path_and_no_credentials() {
        assert_eq!(endpoint("http://host:5000").unwrap().as_str(), "http://host:5000/api/v1/lineage");
        assert_eq!(endpoint("https://host/own?key=a").unwrap().as_str(), "https://host/own?key=a");
        let error = endpoint("https://me:secret@host").unwrap_err().to_string();
        assert!(error.contains("OPENLINEAGE_API_KEY") && !error.contains("secret"), "{error}");
        assert!(!shown(&endpoint("https://host/own?key=secret").unwrap()).contains("secret"));
    }

    #[test]
    fn answers_are_sorted_by_remedy() {
        let url = endpoint("http://host").unwrap();
        for (status, code) in [(400, 2), (401, 2), (404, 2), (408, 5), (429, 5), (500, 5), (503, 5)] {
            assert_eq!(refused(&url, status).exit_code(), code, "{status}");
        }
    }
}
