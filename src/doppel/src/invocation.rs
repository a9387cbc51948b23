//! A command of a workflow, as its flags tell it.

use std::path::Path;

use lake::{PrivateRoot, Zone};
use stage::base_name;
use workflow::Job;

use crate::stages;

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

    /// Whether it writes to the root of `zone`. One that is only read, or named, need not be writable.
    pub fn writes(&self, zone: &str) -> bool {
        let private = zone == PrivateRoot::NAME;
        match (self.program, self.words.as_slice()) {
            ("partition", _) => private,
            ("train", _) => private || self.one("no-dp").is_none(),
            ("synthesize", _) => !private,
            ("embed", _) => private == (self.one("of") == Some("corpus")),
            ("vote", _) => true,
            ("doppel", ["budget", "set", ..]) => private,
            ("doppel", ["rerun", ..]) => private || self.one("as").is_some(),
            ("doppel", ["compact", ..]) => true,
            ("doppel", ["gc", ..]) => self.one("dry-run").is_none(),
            _ => false,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A job with this command alone.
    pub(crate) fn job(command: &[&str]) -> Job {
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
    fn only_what_is_written_to_must_be_writable() {
        let written = |words: &str| {
            let job = job(&words.split(' ').collect::<Vec<_>>());
            let one = Invocation::new(&job).unwrap();
            ["private", "release"].map(|zone| one.writes(zone))
        };
        for (words, expected) in [
            ("doppel-partition --corpus=c", [true, false]),
            ("doppel train --corpus=c", [true, true]),
            ("doppel train --no-dp", [true, false]),
            ("doppel-synthesize --no-adapter", [false, true]),
            ("doppel-embed --of=corpus", [true, false]),
            ("doppel-embed --of synthetic", [false, true]),
            ("doppel-vote --sigma=1", [true, true]),
            ("doppel-query --release=r SELECT", [false, false]),
            ("doppel budget set --corpus=c", [true, false]),
            ("doppel budget --corpus=c", [false, false]),
            ("doppel compare demo --private=p", [false, false]),
            ("doppel rerun demo", [true, false]),
            ("doppel rerun demo --as=new", [true, true]),
            ("doppel compact", [true, true]),
            ("doppel gc --dry-run", [false, false]),
        ] {
            assert_eq!(written(words), expected, "{words}");
        }
    }

    #[test]
    fn words_before_the_flags_tell_subcommands() {
        let set = job(&["doppel", "budget", "set", "-q", "--corpus", "c"]);
        let invocation = Invocation::new(&set).unwrap();
        assert_eq!((invocation.program, invocation.words), ("doppel", vec!["budget", "set"]));
        assert!(Invocation::new(&job(&["sh", "-c", "doppel"])).is_none());
    }
}
