//! What can be known to go wrong before the first task starts, all of it at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use futures::StreamExt;
use lake::{PrivateRoot, ReleaseRoot, Zone};
use stage::shell::CHECK_FLAGS;
use workflow::run::program_of;
use workflow::{Job, Machine, Plan};

use crate::finding::{Finding, merged};
use crate::invocation::Invocation;
use crate::roots::impatient;
use crate::{afford, stages};

/// Free space below which nothing of use can be written.
const LEAST_DISK: u64 = 256 << 20;

/// Checks `plan` against this machine and the storage that it names.
pub async fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let around = plan.jobs.iter().flat_map(|job| {
        let found = surroundings(job, machine).into_iter();
        found.map(|message| (job.task.as_str(), Finding::usage(message)))
    });
    let invocations: Vec<Invocation> = plan.jobs.iter().filter_map(Invocation::new).collect();
    let (flags, roots, inputs, budget) =
        futures::join!(check_flags(plan), check_roots(&invocations), check_inputs(plan), afford::check(&invocations));
    let empty = plan.empty.iter().map(|task| {
        let message = "expands to no task, though others wait for it\nhelp: give it at least one item";
        Finding::usage(format!("{task}: {message}"))
    });
    let found = merged(around.chain(flags)).into_iter().chain(empty).chain(roots).chain(inputs).chain(budget);
    found.collect::<BTreeSet<_>>().into_iter().collect()
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
    // Flags may name files by paths from there. That there is no such folder is a finding of its own.
    if let Some(folder) = job.working_dir.as_ref().filter(|folder| Path::new(folder).is_dir()) {
        command.current_dir(folder);
    }
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

/// Roots lie apart; those that are written to are reachable and writable, and have room.
async fn check_roots(invocations: &[Invocation<'_>]) -> Vec<Finding> {
    let named = |zone: &str| -> BTreeSet<String> { invocations.iter().filter_map(|one| one.given(zone)).collect() };
    let written = |zone: &str| -> BTreeSet<String> {
        invocations.iter().filter(|one| one.writes(zone)).filter_map(|one| one.given(zone)).collect()
    };
    let (privates, releases) = (written(PrivateRoot::NAME), written(ReleaseRoot::NAME));
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
        findings.extend(writable(PrivateRoot::open(url, &impatient()).await).await);
    }
    for url in &releases {
        findings.extend(writable(ReleaseRoot::open(url, &impatient()).await).await);
    }
    let releases = named(ReleaseRoot::NAME);
    for private in &named(PrivateRoot::NAME) {
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
async fn check_inputs(plan: &Plan) -> Vec<Finding> {
    let mut inputs: BTreeMap<(&str, String), Vec<&Job>> = BTreeMap::new();
    for one in plan.jobs.iter().filter_map(Invocation::new) {
        for flag in ["input", "model", "encoder"] {
            for url in one.all(flag).filter(|url| !url.is_empty()) {
                inputs.entry((flag, one.located(url))).or_default().push(one.job);
            }
        }
    }
    // One finding per input, with the first task that reads it.
    let checks = inputs.into_iter().map(|((flag, url), jobs)| async move {
        let problem = present(flag, &url).await.err()?;
        let job = match problem {
            lake::LakeError::NotFound(_) => jobs.into_iter().find(|job| !follows_others(plan, job))?,
            _ => jobs[0],
        };
        let finding = Finding::from(&problem);
        Some(Finding { message: format!("{}: {}", job.task, finding.message), ..finding })
    });
    futures::stream::iter(checks).buffered(8).filter_map(std::future::ready).collect().await
}

/// Whether a program that is not ours runs before `job`: it may make what is not there yet.
fn follows_others(plan: &Plan, job: &Job) -> bool {
    let (mut seen, mut left) = (BTreeSet::new(), job.after.clone());
    while let Some(before) = left.pop() {
        let job = &plan.jobs[before];
        if Invocation::new(job).is_none() {
            return true;
        }
        if seen.insert(before) {
            left.extend(&job.after);
        }
    }
    false
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
    let below = ReleaseRoot::open(url, &impatient()).await?.list("").await?;
    if below.is_empty() {
        lake::read_stream(url, &impatient()).await?;
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
            let (_, path) = lake::open_url(url, &impatient()).ok()?;
            Some(Path::new("/").join(AsRef::<str>::as_ref(&path)))
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invocation::tests::job;

    #[test]
    fn what_a_stage_says_every_time_is_left_out() {
        assert_eq!(gist("error: no `x`\n\nUsage: y\n\nFor more information, try '--help'.\n"), "no `x`\nUsage: y");
    }

    #[tokio::test]
    async fn an_input_that_another_program_makes_first_need_not_be_there() {
        let found = async |first: &[&str], after: &[&[usize]]| {
            let read =
                |after: &&[usize]| Job { after: after.to_vec(), ..job(&["doppel-partition", "--input=/no/such/file"]) };
            let jobs = std::iter::once(job(first)).chain(after.iter().map(read)).collect();
            let (name, parameters) = ("t".to_owned(), BTreeMap::new());
            let (dags, empty) = (Vec::new(), Vec::new());
            check_inputs(&Plan { name, parallelism: None, parameters, jobs, dags, empty }).await.len()
        };
        let download = ["curl", "-o", "/no/such/file"];
        assert_eq!(found(&download, &[&[0], &[1]]).await, 0);
        assert_eq!(found(&download, &[&[]]).await, 1);
        assert_eq!(found(&download, &[&[0], &[]]).await, 1, "the second does not wait");
        assert_eq!(found(&["doppel", "budget", "set"], &[&[0], &[1]]).await, 1, "nothing of ours makes an input");
    }

    #[tokio::test]
    async fn flags_are_checked_in_the_jobs_folder() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("doppel-query");
        std::fs::write(&program, "#!/bin/sh\n[ -e here ] || { echo 'error: no file' >&2; exit 2; }\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let job = Job { working_dir: Some(folder.path().display().to_string()), ..job(&["./doppel-query"]) };
        assert_eq!(flags_of(&job).await, Some(("a", Finding::usage("no file".into()))));
        std::fs::write(folder.path().join("here"), "").unwrap();
        assert_eq!(flags_of(&job).await, None);
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
}
