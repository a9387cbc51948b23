//! What can be known to go wrong before the first task starts, all of it at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::StreamExt;
use lake::{PrivateRoot, ReleaseRoot, StorageOptions, Zone};
use stage::shell::CHECK_FLAGS;
use stage::{Failure, base_name};
use workflow::run::program_of;
use workflow::{Job, Machine, Plan};

use crate::{budget, stages};

/// Free space below which nothing of use can be written.
const LEAST_DISK: u64 = 256 << 20;

/// A finding, with the exit code that it would have had.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// What is wrong and what to do.
    pub message: String,
    /// Exit code of the stage contract.
    pub code: u8,
}

impl Finding {
    /// A finding about usage.
    fn usage(message: String) -> Self {
        Self { message, code: 2 }
    }
}

impl From<Failure> for Finding {
    fn from(failure: Failure) -> Self {
        Self { code: failure.exit_code(), message: failure.to_string() }
    }
}

impl From<&lake::LakeError> for Finding {
    fn from(error: &lake::LakeError) -> Self {
        let code = match error {
            lake::LakeError::Usage(_) | lake::LakeError::Conflict(_) => 2,
            lake::LakeError::Transient(_) => 5,
            _ => 3,
        };
        Self { message: error.to_string(), code }
    }
}

/// No finding, or a failure with all of them.
pub fn verdict(findings: &[Finding]) -> Result<(), Failure> {
    // What only a person can mend comes before what may mend itself.
    let Some(code) = findings.iter().map(|finding| finding.code).min() else {
        return Ok(());
    };
    let many = if findings.len() == 1 { "1 finding".to_owned() } else { format!("{} findings", findings.len()) };
    let mut text = format!("the preflight has {many}; nothing was started");
    for finding in findings {
        text += &format!("\n- {}", finding.message.replace('\n', "\n  "));
    }
    Err(match code {
        3 => Failure::Input(text),
        4 => Failure::Budget(text),
        5 => Failure::Transient(text),
        _ => Failure::Usage(text),
    })
}

/// Checks `plan` against this machine and the storage that it names.
pub async fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let around = plan.jobs.iter().flat_map(|job| {
        let found = surroundings(job, machine).into_iter();
        found.map(|message| (job.task.as_str(), Finding::usage(message)))
    });
    let invocations: Vec<Invocation> = plan.jobs.iter().filter_map(Invocation::new).collect();
    let (flags, roots, inputs, budget) = futures::join!(
        check_flags(plan),
        check_roots(&invocations),
        check_inputs(&invocations),
        budget::preflight(&invocations),
    );
    let empty = plan.empty.iter().map(|task| {
        let message = "expands to no task, though others wait for it\nhelp: give it at least one item";
        Finding::usage(format!("{task}: {message}"))
    });
    let found = merged(around.chain(flags)).into_iter().chain(empty).chain(roots).chain(inputs).chain(budget);
    found.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Findings of tasks, each once, after the names of all that it is about.
fn merged<'a>(found: impl Iterator<Item = (&'a str, Finding)>) -> Vec<Finding> {
    let mut tasks: BTreeMap<Finding, Vec<&str>> = BTreeMap::new();
    for (task, finding) in found {
        let tasks = tasks.entry(finding).or_default();
        if !tasks.contains(&task) {
            tasks.push(task);
        }
    }
    let named = |(finding, tasks): (Finding, Vec<&str>)| Finding {
        message: format!("{}: {}", tasks.join(", "), finding.message),
        ..finding
    };
    tasks.into_iter().map(named).collect()
}

/// What a job needs of this machine and does not find.
fn surroundings(job: &Job, machine: &Machine) -> Vec<String> {
    let mut found = Vec::new();
    let mut say = |message: String| found.push(message);
    match job.command.first() {
        Some(program) if program_of(job, &stages::folders()).is_none() => {
            say(if program.contains('/') {
                let file = Path::new(job.working_dir.as_deref().unwrap_or_default()).join(program);
                format!("the program `{}` is no executable file of this machine; install or build it", file.display())
            } else {
                format!("the program `{program}` is neither beside doppel nor on PATH; install or build it")
            });
        }
        _ => {}
    }
    if let Some(reason) = machine.lacks(job) {
        let or = if job.gpus as usize > machine.gpus.len() { ", or raise --gpus if more are there" } else { "" };
        say(format!("{reason}; lower what the workflow requests{or}"));
    }
    for folder in job.mounts.iter().chain(&job.working_dir) {
        if !Path::new(folder).is_dir() {
            say(format!("{folder} is no folder of this machine; the local runner mounts nothing, so create it"));
        }
    }
    for name in &job.required_env {
        if std::env::var_os(name).is_none() {
            say(format!("the variable {name}, which a secret of the cluster holds, is not set; export it"));
        }
    }
    if job.disk > 0
        && let Some(free) = free_space(&std::env::temp_dir())
        && free < job.disk
    {
        say(format!("wants {} MiB of local disk; {} MiB are free", job.disk >> 20, free >> 20));
    }
    found
}

/// Free bytes below `path`, or below the nearest folder above it that exists.
fn free_space(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|folder| folder.exists())?;
    let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A job that runs a stage or the front itself, with its flags.
#[derive(Debug)]
pub struct Invocation<'a> {
    /// The job.
    pub job: &'a Job,
    /// `partition`, …; `doppel` for the front.
    pub program: &'a str,
    /// What stands before the first long flag.
    pub words: Vec<&'a str>,
    flags: Vec<(&'a str, &'a str)>,
}

impl<'a> Invocation<'a> {
    /// Reads the command of `job`, if it is one of ours.
    pub fn new(job: &'a Job) -> Option<Self> {
        let (program, mut args) = job.command.split_first()?;
        let mut program = base_name(program);
        if let Some(stage) = program.strip_prefix("doppel-") {
            program = stages::STAGES.into_iter().find(|known| *known == stage)?;
        } else if program != "doppel" {
            return None;
        }
        if let (true, Some(stage)) = (program == "doppel", args.first())
            && stages::STAGES.contains(&stage.as_str())
        {
            (program, args) = (stage, &args[1..]);
        }
        let first_flag = args.iter().position(|arg| arg.starts_with("--")).unwrap_or(args.len());
        // Among them may be short flags; those of `budget set`, which is looked for, take no values.
        let words = args[..first_flag].iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
        let mut flags = Vec::new();
        let mut rest = args[first_flag..].iter().map(String::as_str).peekable();
        while let Some(arg) = rest.next() {
            let Some(flag) = arg.strip_prefix("--") else {
                continue;
            };
            match flag.split_once('=') {
                Some(pair) => flags.push(pair),
                None => flags.push((flag, rest.next_if(|value| !value.starts_with("--")).unwrap_or_default())),
            }
        }
        Some(Self { job, program, words, flags })
    }

    /// Values of a flag.
    pub fn all(&self, flag: &str) -> impl Iterator<Item = &'a str> {
        self.flags.iter().filter(move |(name, _)| *name == flag).map(|(_, value)| *value)
    }

    /// Last value of a flag.
    pub fn one(&self, flag: &str) -> Option<&'a str> {
        self.all(flag).last()
    }

    /// Last value of a flag as a number.
    pub fn number(&self, flag: &str) -> Option<f64> {
        self.one(flag)?.parse().ok()
    }

    /// `url` as this process finds it: where it is a relative path, the job takes it from its own working folder.
    pub fn located(&self, url: &str) -> String {
        match &self.job.working_dir {
            Some(folder) if !url.contains("://") => Path::new(folder).join(url).display().to_string(),
            _ => url.to_owned(),
        }
    }

    /// The root of a zone, or the `run`: a flag, the job's environment, or that of this process.
    pub fn given(&self, flag: &str) -> Option<String> {
        let variable = format!("DOPPEL_{}", flag.to_uppercase());
        let declared = || self.job.env.iter().rev().find(|(name, _)| *name == variable).map(|(_, value)| value.clone());
        let given = self.one(flag).map(str::to_owned).or_else(declared).or_else(|| std::env::var(&variable).ok());
        let given = given.filter(|given| !given.is_empty())?;
        Some(if flag == "run" { given } else { self.located(&given) })
    }
}

/// Storage options for a check: whoever waits wants to know soon.
pub fn storage() -> StorageOptions {
    StorageOptions { timeout: Duration::from_secs(30) }
}

/// Lets each stage judge its own flags and their values. Of a fan-out, which differs in its items only, the first and
/// the last.
async fn check_flags(plan: &Plan) -> Vec<(&str, Finding)> {
    let mut chosen: BTreeMap<&str, Vec<&Job>> = BTreeMap::new();
    for job in &plan.jobs {
        let jobs = chosen.entry(&job.task).or_default();
        jobs.truncate(1);
        jobs.push(job);
    }
    // Another program, whatever its name, would do its work and not judge its flags.
    let ours = |job: &&Job| Invocation::new(job).is_some();
    let checks = chosen.into_values().flatten().filter(ours).map(flags_of);
    let at_once = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    futures::stream::iter(checks).buffered(at_once).filter_map(std::future::ready).collect().await
}

async fn flags_of(job: &Job) -> Option<(&str, Finding)> {
    let program = program_of(job, &stages::folders())?;
    let mut command = tokio::process::Command::new(program);
    command.args(&job.command[1..]).envs(job.env.iter().cloned()).env(CHECK_FLAGS, "1");
    command.env("DOPPEL_LOG_FORMAT", "text").env_remove("TRACEPARENT").env("OTEL_SDK_DISABLED", "true");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = match command.output().await {
        Ok(output) => output,
        Err(error) => return Some((&job.task, Finding::usage(format!("{}: {error}", job.command[0])))),
    };
    if output.status.success() {
        return None;
    }
    Some((&job.task, Finding::usage(gist(&String::from_utf8_lossy(&output.stderr)))))
}

/// What a stage says of its flags, without what it says every time.
fn gist(said: &str) -> String {
    let usual = |line: &str| line.trim().is_empty() || line.starts_with("For more information, try");
    let lines: Vec<&str> = said.lines().filter(|line| !usual(line)).collect();
    lines.join("\n").trim_start_matches("error: ").to_owned()
}

/// Roots are reachable and writable, lie apart, and have room.
async fn check_roots(invocations: &[Invocation<'_>]) -> Vec<Finding> {
    let roots = |zone: &str| -> BTreeSet<String> { invocations.iter().filter_map(|one| one.given(zone)).collect() };
    let (privates, releases) = (roots("private"), roots("release"));
    let mut findings = Vec::new();
    for url in privates.iter().chain(&releases) {
        if let Some(path) = local(url)
            && let Some(free) = free_space(&path)
            && free < LEAST_DISK
        {
            let message = format!("{url}: only {} MiB are free; at least {} are needed", free >> 20, LEAST_DISK >> 20);
            findings.push(Finding::usage(message));
        }
    }
    for url in &privates {
        findings.extend(writable(PrivateRoot::open(url, &storage()).await).await);
    }
    for url in &releases {
        findings.extend(writable(ReleaseRoot::open(url, &storage()).await).await);
    }
    for private in &privates {
        for release in &releases {
            findings.extend(lake::check_disjoint_urls(private, release).err().as_ref().map(Finding::from));
        }
    }
    findings
}

async fn writable<Z: Zone>(root: Result<Z, lake::LakeError>) -> Option<Finding> {
    let path = "preflight/writable.txt";
    let probe = async {
        let root = root?;
        root.put(path, b"doppel checks that it can write here; this object may be removed".to_vec().into()).await?;
        // Stages need no permission to delete, so that the object may have to stay.
        let _ = root.delete(path).await;
        Ok(())
    };
    probe.await.err().as_ref().map(Finding::from)
}

/// Models and raw inputs are there, and are what their flags take.
async fn check_inputs(invocations: &[Invocation<'_>]) -> Vec<Finding> {
    let named = invocations.iter().flat_map(|one| {
        let values = move |flag: &'static str| {
            let given = one.all(flag).filter(|url| !url.is_empty());
            given.map(move |url| ((flag, one.located(url)), one.job))
        };
        ["input", "model", "encoder"].into_iter().flat_map(values)
    });
    // One finding per input, with the first task that reads it.
    let inputs: BTreeMap<(&str, String), &Job> = named.collect::<Vec<_>>().into_iter().rev().collect();
    let checks = inputs.into_iter().map(|((flag, url), job)| async move {
        let problem = present(flag, &url).await.err()?;
        let finding = Finding::from(&problem);
        Some(Finding { message: format!("{}: {}", job.task, finding.message), ..finding })
    });
    futures::stream::iter(checks).buffered(8).filter_map(std::future::ready).collect().await
}

async fn present(flag: &str, url: &str) -> Result<(), lake::LakeError> {
    let names = match local(url) {
        Some(path) => local_names(&path)
            .map_err(|error| lake::LakeError::NotFound(format!("{url}: {error}\nhelp: correct the path")))?,
        None => remote_names(url).await?,
    };
    match unlike(flag, &names) {
        Some(problem) => Err(lake::LakeError::Malformed(format!("{url}: {problem}"))),
        None => Ok(()),
    }
}

/// What lies in the folder `path`; its own name where it is a file.
fn local_names(path: &Path) -> std::io::Result<Vec<String>> {
    if path.metadata()?.is_file() {
        return Ok(path.file_name().map(|name| name.to_string_lossy().into_owned()).into_iter().collect());
    }
    let entries = std::fs::read_dir(path)?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The objects below `url`; its own name where it is one object.
async fn remote_names(url: &str) -> Result<Vec<String>, lake::LakeError> {
    let below = ReleaseRoot::open(url, &storage()).await?.list("").await?;
    if below.is_empty() {
        lake::read_stream(url, &storage()).await?;
        return Ok(url.rsplit('/').next().map(str::to_owned).into_iter().collect());
    }
    Ok(below)
}

/// Why something with these names in it is not what `flag` takes, if so.
fn unlike(flag: &str, names: &[String]) -> Option<&'static str> {
    let has = |name: &str| names.iter().any(|other| other == name);
    let ending = |end: &str| names.iter().filter(|name| name.to_ascii_lowercase().ends_with(end)).count();
    match flag {
        "encoder" if !has("modules.json") => {
            Some("no modules.json is there\nhelp: --encoder takes a sentence-transformers folder")
        }
        "model" if has("config.json") && ending(".safetensors") == 0 => {
            Some("config.json is there without *.safetensors\nhelp: download the model again")
        }
        "model" if has("config.json") && !has("tokenizer.json") => {
            Some("no tokenizer.json is there\nhelp: save the model's fast tokenizer beside its weights")
        }
        "model" if !has("config.json") && ending(".gguf") != 1 => Some(
            "neither config.json nor one .gguf file is there\nhelp: --model takes a Hugging Face folder or a GGUF file",
        ),
        _ => None,
    }
}

/// The path of a URL of this machine.
fn local(url: &str) -> Option<PathBuf> {
    match url.split_once("://") {
        None => Some(PathBuf::from(url)),
        Some(("file", _)) => {
            // The lake knows how such a URL is written, `%20` and all.
            let (_, path) = lake::open_url(url, &storage()).ok()?;
            Some(Path::new("/").join(AsRef::<str>::as_ref(&path)))
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(command: &[&str]) -> Job {
        Job {
            name: "a(0:0)".into(),
            task: "a".into(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            env: vec![("DOPPEL_RELEASE".into(), "r".into())],
            required_env: Vec::new(),
            working_dir: None,
            mounts: Vec::new(),
            cpu: None,
            cpu_limit: None,
            gpus: 0,
            memory: 0,
            disk: 0,
            retry: workflow::retry::Retry::never(),
            after: Vec::new(),
            dag: None,
            at: Default::default(),
        }
    }

    #[test]
    fn flags_of_our_programs_are_read() {
        let job = job(&["/opt/doppel", "train", "--model", "m", "--no-dp", "--private=p", "--steps", "8"]);
        let invocation = Invocation::new(&job).unwrap();
        assert_eq!(invocation.program, "train");
        assert_eq!(invocation.one("model"), Some("m"));
        assert_eq!(invocation.one("no-dp"), Some(""));
        assert_eq!(invocation.number("steps"), Some(8.0));
        assert_eq!(invocation.given("private").as_deref(), Some("p"));
        assert_eq!(invocation.given("release").as_deref(), Some("r"));
    }

    #[test]
    fn relative_paths_are_those_of_the_jobs_folder() {
        let command = ["doppel", "train", "--private", "lake/p", "--run", "r1", "--release=s3://lake/r"];
        let job = Job { working_dir: Some("/work".into()), ..job(&command) };
        let invocation = Invocation::new(&job).unwrap();
        let given = |flag| invocation.given(flag).unwrap();
        assert_eq!([given("private"), given("run"), given("release")], ["/work/lake/p", "r1", "s3://lake/r"]);
        assert_eq!([invocation.located("m"), invocation.located("/m")], ["/work/m", "/m"]);
    }

    #[test]
    fn a_finding_of_many_tasks_is_told_once() {
        let finding = || Finding::usage(gist("error: no `x`\n\nUsage: y\n\nFor more information, try '--help'.\n"));
        let found = [("train", finding()), ("embed", finding()), ("train", finding())];
        let told: Vec<String> = merged(found.into_iter()).into_iter().map(|finding| finding.message).collect();
        assert_eq!(told, ["train, embed: no `x`\nUsage: y"]);
    }

    #[test]
    fn words_before_the_flags_tell_subcommands() {
        let set = job(&["doppel", "budget", "set", "-q", "--corpus", "c"]);
        let invocation = Invocation::new(&set).unwrap();
        assert_eq!((invocation.program, invocation.words), ("doppel", vec!["budget", "set"]));
        assert!(Invocation::new(&job(&["sh", "-c", "doppel"])).is_none());
    }

    #[test]
    fn a_job_that_finds_nothing_says_so() {
        let mut lonely = job(&["no-such-program-anywhere"]);
        lonely.gpus = 3;
        lonely.mounts = vec!["/no/such/folder".into()];
        lonely.required_env = vec!["DOPPEL_NO_SUCH_VARIABLE".into()];
        let machine = Machine { cpu: 1_000, gpus: Vec::new(), memory: 1 << 30 };
        let found = surroundings(&lonely, &machine);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.iter().any(|message| message.contains("needs 3 GPUs") && message.contains("raise --gpus")));
        let big = Job { memory: 2 << 30, ..job(&["true"]) };
        let found = surroundings(&big, &machine);
        assert!(found.len() == 1 && found[0].ends_with("lower what the workflow requests"), "{found:?}");
    }

    #[test]
    fn a_relative_program_is_sought_in_the_jobs_folder() {
        let folder = tempfile::tempdir().unwrap();
        let machine = Machine { cpu: 1_000, gpus: Vec::new(), memory: 1 << 30 };
        let job = Job { working_dir: Some(folder.path().display().to_string()), ..job(&["./tool"]) };
        let found = surroundings(&job, &machine);
        assert!(found.len() == 1 && found[0].contains("/./tool` is no executable file"), "{found:?}");
        std::os::unix::fs::symlink("/bin/sh", folder.path().join("tool")).unwrap();
        assert_eq!(surroundings(&job, &machine), [""; 0]);
    }

    #[test]
    fn a_model_is_known_by_what_lies_in_its_folder() {
        let unlike =
            |flag, names: &[&str]| unlike(flag, &names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        let folder = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"];
        assert_eq!(unlike("model", &folder), None);
        assert_eq!(unlike("model", &["SmolLM2.Q4_1.GGUF"]), None);
        assert_eq!(unlike("input", &["anything"]), None);
        assert_eq!(unlike("encoder", &["modules.json", "config.json"]), None);
        for (flag, names, expected) in [
            ("model", &folder[..2], "no tokenizer.json"),
            ("model", &["config.json", "pytorch_model.bin"], "without *.safetensors"),
            ("model", &["README.md"], "neither config.json nor one .gguf file"),
            ("model", &["a.gguf", "b.gguf"], "neither config.json nor one .gguf file"),
            ("encoder", &folder, "no modules.json"),
        ] {
            let told = unlike(flag, names).unwrap_or_default();
            assert!(told.contains(expected), "{names:?}: {told}");
        }
    }

    #[test]
    fn a_file_url_names_a_path_with_its_blanks() {
        assert_eq!(local("file:///no/such%20folder/a%25b"), Some(PathBuf::from("/no/such folder/a%b")));
        assert_eq!(local("some/folder"), Some(PathBuf::from("some/folder")));
        assert_eq!(local("s3://bucket/a"), None);
    }

    #[test]
    fn the_verdict_is_what_a_person_must_mend_first() {
        assert!(verdict(&[]).is_ok());
        let finding = |code| Finding { message: format!("code {code}"), code };
        let failure = verdict(&[finding(5), finding(3)]).unwrap_err();
        assert_eq!(failure.exit_code(), 3);
        assert!(failure.to_string().contains("2 findings"));
    }
}
