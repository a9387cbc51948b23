//! The command of this process as it may be written down: what was asked for, so that it can be asked for again.
//!
//! A release carries it, so no place on a machine is in it: a flag that takes one says so by its value hint, and of its
//! value the last component stays. Where the roots are, and how to tell what happens, is for whoever repeats it.

use std::path::Path;
use std::sync::OnceLock;

use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint, parser::ValueSource};

/// The value hint of a flag that takes a path or URL of an input.
pub const PLACE: ValueHint = ValueHint::AnyPath;

/// Flags that say where.
const WHERE: [&str; 3] = ["private", "release", "storage_timeout"];

/// Heading of the flags that say how to tell.
const TELLING: &str = "Output";

static RECORDED: OnceLock<Vec<String>> = OnceLock::new();

/// The flags that this process was given, from the command line or the environment, in the order of `--help`.
pub fn command() -> Vec<String> {
    RECORDED.get().cloned().unwrap_or_default()
}

/// Keeps what [`command`] gives.
pub(crate) fn record(command: &Command, matches: &ArgMatches) {
    // A process has one command line.
    let _ = RECORDED.set(flags(command, matches));
}

fn flags(command: &Command, matches: &ArgMatches) -> Vec<String> {
    let recorded = |arg: &&Arg| {
        let given = matches.value_source(arg.get_id().as_str());
        matches!(given, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
            && arg.get_help_heading() != Some(TELLING)
            && !WHERE.contains(&arg.get_id().as_str())
    };
    command.get_arguments().filter(recorded).flat_map(|arg| words(arg, matches)).collect()
}

/// `--flag` or `--flag=value`, once for each time that it was given.
fn words(arg: &Arg, matches: &ArgMatches) -> Vec<String> {
    let Some(flag) = arg.get_long() else { return Vec::new() };
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return vec![format!("--{flag}")];
    }
    let delimiter = arg.get_value_delimiter().map(String::from).unwrap_or_default();
    let occurrences = matches.get_raw_occurrences(arg.get_id().as_str()).into_iter().flatten();
    let is_place = arg.get_value_hint() == PLACE;
    occurrences
        .map(|values| values.map(|value| value.to_string_lossy().into_owned()).collect::<Vec<_>>().join(&delimiter))
        .map(|value| if is_place { without_folders(&value) } else { value })
        .map(|value| format!("--{flag}={value}"))
        .collect()
}

/// The last component of a path or URL, or all of what has none: what is told of a model is its name, without the machine's
/// folders.
pub fn base_name(place: &str) -> &str {
    Path::new(place.trim_end_matches('/')).file_name().and_then(|name| name.to_str()).unwrap_or(place)
}

/// A URL of a store as it is; of anything else, such as a path or a URL with a password in it, the last component.
fn without_folders(place: &str) -> String {
    match lake::canonical_url(place) {
        Ok(url) if place.contains("://") && !url.starts_with("file:") => url,
        _ => base_name(place).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Example {
        #[command(flatten)]
        common: crate::Common,
        #[arg(long, value_hint = PLACE)]
        model: Vec<String>,
        #[arg(long, value_delimiter = ',')]
        targets: Vec<String>,
        #[arg(long)]
        no_dp: bool,
        #[arg(long, default_value_t = 3)]
        steps: u32,
        #[arg(long)]
        stop: Option<String>,
    }

    #[track_caller]
    fn check(given: &[&str], expected: &[&str]) {
        let mut command = Example::command();
        let given = ["doppel-example", "--run=demo"].iter().chain(given);
        let matches = command.try_get_matches_from_mut(given).unwrap();
        assert_eq!(flags(&command, &matches), [&["--run=demo"], expected].concat());
    }

    #[test]
    fn flags_are_recorded_as_they_were_given_and_defaults_are_not() {
        check(&["--targets", "q,v", "--no-dp"], &["--targets=q,v", "--no-dp"]);
        check(&["--steps=3", "--stop", "/"], &["--steps=3", "--stop=/"]);
        check(&["--pin", "corpora/a=1", "--pin=runs/b/c=2"], &["--pin=corpora/a=1", "--pin=runs/b/c=2"]);
    }

    #[test]
    fn where_and_how_to_tell_is_not_recorded() {
        let given = ["--private=/lake/p", "--release", "/lake/r", "--storage-timeout=9", "--format=json", "-vv"];
        check(&given, &[]);
        check(&["--log-format=json", "-q"], &[]);
    }

    #[test]
    fn a_release_carries_no_path_and_no_password() {
        for (given, expected) in [
            ("/srv/models/smollm2", "--model=smollm2"),
            ("models/smollm2/", "--model=smollm2"),
            ("file:///srv/models/smollm2", "--model=smollm2"),
            ("s3://models/llama 2", "--model=s3://models/llama%202"),
            ("s3://key:secret@models/llama", "--model=llama"),
        ] {
            check(&["--model", given], &[expected]);
        }
    }

    #[test]
    fn flags_of_the_environment_count_as_given() {
        #[derive(Parser)]
        struct FromEnvironment {
            // Set for every process of a test.
            #[arg(long, env = "PATH")]
            path: String,
        }
        let mut command = FromEnvironment::command();
        let matches = command.try_get_matches_from_mut(["example"]).unwrap();
        assert_eq!(flags(&command, &matches), [format!("--path={}", std::env::var("PATH").unwrap())]);
    }
}
