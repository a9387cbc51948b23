//! A stage that does nothing but behave as it is told: `tests/shell.rs` runs it to see what the shell makes of that.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use stage::telemetry::{self, Fact};
use stage::{Common, Failure, PrivateProgress, Progress, Summary};

/// Behaves as told.
#[derive(Parser, Debug)]
struct Args {
    #[command(flatten)]
    common: Common,
    /// What to do.
    #[arg(long, value_enum, default_value_t = Behaviour::Succeed)]
    behave: Behaviour,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Behaviour {
    Succeed,
    FailOnInput,
    BeMisconfigured,
    Refuse,
    Panic,
    /// Computes without ever awaiting, beside a copy of something.
    Spin,
    OpenRoots,
    PrintChildEnv,
    Log,
}

fn main() -> ExitCode {
    stage::main("probe", check, run)
}

/// The one value that is wrong by itself.
fn check(args: &Args) -> Result<(), Failure> {
    match args.behave {
        Behaviour::BeMisconfigured => Err(Failure::Usage("--behave be-misconfigured: expected anything else".into())),
        _ => Ok(()),
    }
}

async fn run(args: Args) -> Result<Summary, Failure> {
    let done = Summary { text: "probe: done".into(), json: serde_json::json!({ "stage": "probe" }) };
    check(&args)?;
    match args.behave {
        Behaviour::Succeed | Behaviour::BeMisconfigured => work(),
        Behaviour::FailOnInput => {
            return Err(Failure::Input("corpus: row 7 has no text\nhelp: drop it".into()));
        }
        Behaviour::Refuse => return Err(Failure::Budget("over budget".into())),
        Behaviour::Panic => panic!("PLANTED in a panic"),
        Behaviour::Spin => {
            let copies = lake::TemporaryFolder::new()?;
            std::fs::write(copies.path().join("copy"), "bytes")
                .map_err(|error| Failure::Transient(error.to_string()))?;
            stage::print(b"spinning\n")?;
            loop {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Behaviour::OpenRoots => drop(args.common.roots().await?),
        Behaviour::PrintChildEnv => {
            for (name, value) in telemetry::child_env() {
                stage::print(format!("{name}={value}\n").as_bytes())?;
            }
        }
        Behaviour::Log => {
            tracing::info!(rows = 3, "ours");
            tracing::error!(target: "parquet", "PLANTED in a log line");
        }
    }
    Ok(done)
}

/// Some public work, and some on private records.
fn work() {
    let _phase = telemetry::phase("sample").entered();
    telemetry::tell(Fact::Rows(40));
    let progress = Progress::public("sample", "tokens", 100);
    progress.resume(25);
    progress.advance(75);
    PrivateProgress::new("count votes").tick();
}
