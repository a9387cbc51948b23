//! A run as it was recorded: its finished stages, and how to start each of them once more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use lake::{Claim, Manifest, PrivateRoot, ReleaseRoot, StorageOptions, Zone};
use rustix::process::{Pid, Signal, kill_process};
use stage::common::{OVERLAYS, Overlays};
use stage::{Failure, Verbosity};
use tokio::process::{Child, Command};

use crate::roots::{Known, Roots};
use crate::stages;

/// Flags that name an input outside the roots, which the digest of the input of that name guards.
pub const MODELS: [&str; 2] = ["model", "encoder"];

/// How a stage is started, by the name in its claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Name in claims and manifests.
    pub name: &'static str,
    /// Its binary, without `doppel-`.
    pub binary: &'static str,
    private: bool,
    release: bool,
}

const KINDS: [Kind; 7] = [
    Kind { name: "partition", binary: "partition", private: true, release: false },
    Kind { name: "train", binary: "train", private: true, release: true },
    Kind { name: "train-baseline", binary: "train", private: true, release: false },
    // PRIVACY: these two are given no private root, as at the first time.
    Kind { name: "synthesize", binary: "synthesize", private: false, release: true },
    Kind { name: "embed", binary: "embed", private: false, release: true },
    Kind { name: "embed-corpus", binary: "embed", private: true, release: false },
    Kind { name: "vote", binary: "vote", private: true, release: true },
];

/// A finished stage with all its shards.
#[derive(Clone, Debug)]
pub struct Stage {
    /// How it is started.
    pub kind: Kind,
    /// Zone of its manifests and outputs.
    pub zone: &'static str,
    /// One, or one for each shard in their order.
    pub shards: Vec<Manifest>,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Run id.
    pub run: String,
    /// Finished stages in the order in which they began.
    pub stages: Vec<Stage>,
    /// Stages that began and did not end, with what is missing.
    pub unfinished: Vec<(String, String)>,
}

impl Recorded {
    /// Reads what `run` left in both roots.
    pub async fn read(roots: &Roots, run: &str) -> Result<Self, Failure> {
        let (mut stages, mut unfinished) = (Vec::new(), Vec::new());
        for Known { zone, manifests, claims, .. } in roots.known(run).await? {
            let names: BTreeSet<&str> = claims.iter().map(|claim| claim.stage.as_str()).collect();
            for name in names {
                let mut shards: Vec<Manifest> =
                    manifests.iter().filter(|one| one.claim.stage == name).cloned().collect();
                shards.sort_by_key(|one| one.claim.shard);
                match missing(name, &claims, shards.len()) {
                    Some(missing) => unfinished.push((name.to_owned(), missing)),
                    None => stages.push(Stage { kind: kind(name)?, zone, shards }),
                }
            }
        }
        stages.sort_by_key(|stage| stage.shards.iter().map(|one| one.claim.started).min());
        if stages.is_empty() && unfinished.is_empty() {
            return Err(roots.unknown(run));
        }
        Ok(Self { run: run.to_owned(), stages, unfinished })
    }

    /// Paths of everything that the run's stages wrote.
    pub fn made(&self) -> BTreeSet<&str> {
        let shards = self.stages.iter().flat_map(|stage| &stage.shards);
        shards.flat_map(|shard| &shard.outputs).map(|output| output.path.as_str()).collect()
    }
}

/// What `stage` lacks to be finished.
fn missing(stage: &str, claims: &[Claim], done: usize) -> Option<String> {
    let mut of_stage = claims.iter().filter(|claim| claim.stage == stage);
    let all = of_stage.next().and_then(|claim| claim.shard).map_or(1, |(_, count)| count as usize);
    match done {
        _ if done >= all => None,
        _ if all == 1 => Some("it did not end".to_owned()),
        done => Some(format!("{done} of {all} shards ended")),
    }
}

/// How the stage called `name` is started.
pub fn kind(name: &str) -> Result<Kind, Failure> {
    KINDS.into_iter().find(|kind| kind.name == name).ok_or_else(|| {
        Failure::Input(format!("the stage `{name}` is unknown here\nhelp: use the version of doppel that ran it"))
    })
}

/// Values of flags that replace the recorded ones.
#[derive(Clone, Debug, Default)]
pub struct Parameters(BTreeMap<String, String>);

impl Parameters {
    /// From `FLAG=VALUE`s; one that no stage was given, or that must stay as it was, is an error.
    pub fn new(given: &[(String, String)], stages: &[&Stage]) -> Result<Self, Failure> {
        let words = || stages.iter().flat_map(|stage| &stage.shards).flat_map(|shard| &shard.claim.command);
        let flags: BTreeSet<&str> = words().map(|word| flag_and_value(word).0).collect();
        for (flag, _) in given {
            if let Some(reason) = fixed(flag) {
                return Err(Failure::Usage(format!("-p {flag}: {reason}\nhelp: leave it out")));
            }
            if !flags.contains(flag.as_str()) {
                let near = workflow::finding::nearest(flag, flags.iter().copied());
                let hint = near.map_or("`doppel show` prints the recorded flags".to_owned(), |near| {
                    format!("did you mean `{near}`?")
                });
                return Err(Failure::Usage(format!("-p {flag}: no stage was given --{flag}\nhelp: {hint}")));
            }
        }
        Ok(Self(given.iter().cloned().collect()))
    }

    /// `command` with these values.
    pub fn apply(&self, command: &[String]) -> Vec<String> {
        let replaced = |word: &String| match self.0.get(flag_and_value(word).0) {
            Some(value) => format!("--{}={value}", flag_and_value(word).0),
            None => word.clone(),
        };
        command.iter().map(replaced).collect()
    }

    /// What keeps `stages` from being started: commands that were not recorded, and models that are not found.
    pub fn check(&self, stages: &[&Stage]) -> Result<(), Failure> {
        let mut findings = BTreeSet::new();
        for claim in stages.iter().flat_map(|stage| &stage.shards).map(|shard| &shard.claim) {
            if claim.command.is_empty() {
                findings.insert(format!(
                    "{}: {} did not record its command\nhelp: repeat the stage by hand, with the settings that \
                     `doppel show {}` prints, or --stage the others",
                    claim.stage, claim.binary, claim.run
                ));
            }
            findings.extend(self.apply(&claim.command).iter().filter_map(|word| not_found(claim, word)));
        }
        match findings.is_empty() {
            true => Ok(()),
            false => Err(Failure::Usage(findings.into_iter().collect::<Vec<_>>().join("\n"))),
        }
    }
}

/// Why a recorded flag stays as it is.
fn fixed(flag: &str) -> Option<&'static str> {
    match flag {
        "run" | "shard" => Some("it says which part of which run a recorded command is"),
        "pin" => Some("versions are pinned to those that were read"),
        "input" => {
            Some("no digest of a raw input is recorded that would prove it elsewhere, so it is read where it was")
        }
        _ => None,
    }
}

/// The finding that the model of a flag is not on this machine. What lies on a store, the stage looks for.
fn not_found(claim: &Claim, word: &str) -> Option<String> {
    let (flag, value) = flag_and_value(word);
    if !MODELS.contains(&flag) || value.contains("://") || Path::new(value).exists() {
        return None;
    }
    let digest = claim.inputs.iter().find(|input| input.name == flag).and_then(|input| input.digest.as_deref());
    Some(format!(
        "--{flag}={value}: not found; wanted is the {flag} with the digest {}\n\
         help: pass -p {flag}=PATH, where it lies now",
        digest.unwrap_or("(not recorded)")
    ))
}

/// A recorded word's flag and value; without a value, an empty one.
pub fn flag_and_value(word: &str) -> (&str, &str) {
    let word = word.strip_prefix("--").unwrap_or(word);
    word.split_once('=').unwrap_or((word, ""))
}

/// What stages are started with besides their recorded flags.
pub struct Starter {
    /// Private root.
    pub private: PrivateRoot,
    /// Release root.
    pub release: ReleaseRoot,
    /// Storage options.
    pub options: StorageOptions,
    /// How much the stages tell.
    verbosity: Verbosity,
}

/// How long a stage may take to end after it was asked to, as it does within a second unless storage hangs.
const GRACE: Duration = Duration::from_secs(10);

impl Starter {
    /// Both roots; one alone holds no whole run.
    pub fn new(roots: Roots, options: StorageOptions, verbosity: Verbosity) -> Result<Self, Failure> {
        let (Some(private), Some(release)) = (roots.private, roots.release) else {
            return Err(Failure::Usage(
                "a run is repeated from both roots, and what is written lies in the private one\n\
                 help: pass --private URL and --release URL"
                    .to_owned(),
            ));
        };
        lake::check_disjoint(&private, &release)?;
        Ok(Self { private, release, options, verbosity })
    }

    /// Runs the stage's binary to its end with `flags`, and under `overlays` where there are any. It tells on standard
    /// error what it always tells.
    pub async fn start(&self, kind: Kind, flags: &[String], overlays: Option<&Overlays>) -> Result<(), Failure> {
        let name = format!("doppel-{}", kind.binary);
        let program = workflow::run::find_program(&name, &stages::folders()).ok_or_else(|| {
            Failure::Usage(format!("the binary {name} is neither beside doppel nor on PATH\nhelp: install it"))
        })?;
        let mut command = Command::new(program);
        command.args(flags).args(self.verbosity.flags());
        command.arg(format!("--storage-timeout={}", self.options.timeout.as_secs()));
        for variable in ["DOPPEL_PRIVATE", "DOPPEL_RELEASE", "DOPPEL_RUN", OVERLAYS] {
            command.env_remove(variable);
        }
        if kind.private {
            command.arg(format!("--private={}", self.private.url()));
        }
        if kind.release {
            command.arg(format!("--release={}", self.release.url()));
        }
        if let Some(overlays) = overlays {
            let text = serde_json::to_string(overlays).map_err(|error| Failure::Bug(error.to_string()))?;
            command.env(OVERLAYS, text);
        }
        command.envs(stage::telemetry::child_env()).stdin(Stdio::null()).stdout(Stdio::null());
        let failed = |error| Failure::Transient(format!("{name}: {error}"));
        let ended = Running::start(command).map_err(failed)?.0.wait().await.map_err(failed)?;
        match ended.code() {
            Some(0) => Ok(()),
            Some(code @ (129 | 130 | 143)) => Err(Failure::Ended {
                code: code as u8,
                message: format!("{}: {name} was stopped by a signal\nhelp: run again", kind.name),
            }),
            Some(code) => Err(Failure::coded(
                u8::try_from(code).unwrap_or(1),
                format!("{}: {name} ended with exit code {code}; what it said is above", kind.name),
            )),
            None => Err(Failure::Transient(format!("{}: {name} was killed\nhelp: run again", kind.name))),
        }
    }
}

/// A stage at work, which ends with whoever started it.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> std::io::Result<Self> {
        command.kill_on_drop(true);
        #[cfg(target_os = "linux")]
        // SAFETY: the closure runs in the child between fork and exec and makes one system call, which is safe there.
        unsafe {
            // Who started it may be killed outright.
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(std::io::Error::from)
            });
        }
        command.spawn().map(Self)
    }
}

impl Drop for Running {
    /// Asks a stage that still works to end, and waits until it has: it has copies of models to remove.
    fn drop(&mut self) {
        let Some(id) = self.0.id().and_then(|id| Pid::from_raw(id as i32)) else { return };
        // It may have ended by now.
        let _ = kill_process(id, Signal::TERM);
        let until = Instant::now() + GRACE;
        while Instant::now() < until && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn claim(shard: Option<(u32, u32)>, command: &[&str]) -> Claim {
        Claim {
            run: "demo".into(),
            stage: "synthesize".into(),
            shard,
            inputs: vec![lake::Input {
                name: "model".into(),
                location: "llama".into(),
                version: None,
                digest: Some("d1635".into()),
            }],
            config: serde_json::Value::Null,
            seeds: Vec::new(),
            binary: "doppel-synthesize 0.1.0".into(),
            started: chrono::DateTime::UNIX_EPOCH,
            command: words(command),
        }
    }

    fn stage(command: &[&str]) -> Stage {
        let claim = claim(None, command);
        let shard = Manifest { ended: claim.started, claim, outputs: Vec::new(), facts: serde_json::Value::Null };
        Stage { kind: kind("synthesize").unwrap(), zone: "release", shards: vec![shard] }
    }

    #[test]
    fn a_stage_is_finished_when_all_its_shards_are() {
        let claims = [claim(Some((0, 3)), &[]), claim(Some((1, 3)), &[])];
        assert_eq!(missing("synthesize", &claims, 2).as_deref(), Some("2 of 3 shards ended"));
        assert_eq!(missing("synthesize", &claims, 3), None);
        assert_eq!(missing("synthesize", &[claim(None, &[])], 0).as_deref(), Some("it did not end"));
    }

    #[test]
    fn a_model_that_is_not_found_is_named_with_its_digest_and_what_to_pass() {
        let stage = stage(&["--run=demo", "--model=no-such-model", "--no-adapter"]);
        let told = Parameters::default().check(&[&stage]).unwrap_err();
        assert_eq!(told.exit_code(), 2);
        for part in ["--model=no-such-model", "d1635", "-p model=PATH"] {
            assert!(told.to_string().contains(part), "{told}");
        }
        let here = std::env::temp_dir().display().to_string();
        let given = Parameters::new(&[("model".into(), here.clone())], &[&stage]).unwrap();
        given.check(&[&stage]).unwrap();
        let command = given.apply(&stage.shards[0].claim.command);
        assert_eq!(command, words(&["--run=demo", &format!("--model={here}"), "--no-adapter"]));
    }

    #[test]
    fn a_parameter_that_no_stage_takes_is_refused_with_the_nearest() {
        let stage = stage(&["--run=demo", "--model=llama"]);
        let told = |flag: &str| Parameters::new(&[(flag.into(), "x".into())], &[&stage]).unwrap_err().to_string();
        assert!(told("modle").contains("did you mean `model`?"), "{}", told("modle"));
        for fixed in ["run", "shard", "pin", "input"] {
            assert!(told(fixed).contains("leave it out"), "{}", told(fixed));
        }
    }

    #[tokio::test]
    async fn a_stage_that_is_left_is_asked_to_end_and_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let script =
            r#"trap 'sleep 0.2; touch "$0/ended"; exit 143' TERM; touch "$0/began"; while :; do sleep 0.05; done"#;
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(folder.path());
        let running = Running::start(command).unwrap();
        while !at("began").exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(running);
        assert!(at("ended").exists());
    }

    #[test]
    fn a_claim_without_a_command_cannot_be_repeated() {
        let told = Parameters::default().check(&[&stage(&[])]).unwrap_err().to_string();
        assert!(told.contains("doppel-synthesize 0.1.0 did not record its command"), "{told}");
    }
}
