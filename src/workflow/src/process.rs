//! One attempt of one job: a child process in a process group of its own, its output line by line, its end.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::retry::Outcome;

/// Whether to stop, from weak to strong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Go on.
    No,
    /// End all jobs: SIGTERM, then SIGKILL after the grace.
    Gently,
    /// SIGKILL now.
    Kill,
}

/// How long output may still come after the process itself has ended (from a child of its own that left the group).
const DRAIN: Duration = Duration::from_millis(500);
/// A longer line is cut into several.
const MAX_LINE: usize = 16 << 10;

/// What to start.
pub(crate) struct Attempt<'a> {
    pub program: PathBuf,
    pub args: &'a [String],
    pub env: Vec<(String, String)>,
    pub working_dir: Option<&'a Path>,
    pub grace: Duration,
}

impl Attempt<'_> {
    /// Runs the process to its end, or, when `stop` says so, ends it: SIGTERM, then SIGKILL after `grace`. Its group
    /// ends with it.
    pub async fn run(
        &self,
        mut stop: watch::Receiver<Stop>,
        mut log: Option<std::fs::File>,
        mut on_line: impl FnMut(&str),
    ) -> Outcome {
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(error) => {
                return Outcome::NotStarted(format!("{}: {error}", self.program.display()));
            }
        };
        let group = child.id().and_then(|id| Pid::from_raw(id as i32));
        let signal = |signal| {
            if let Some(group) = group {
                // The group may be gone already: nothing to do then.
                let _ = kill_process_group(group, signal);
            }
        };
        let (mut stdout, mut stderr) = (Lines::new(child.stdout.take()), Lines::new(child.stderr.take()));
        let mut sink = |line: &str| {
            if let Some(file) = &mut log {
                // A full disk for logs must not fail the job.
                let _ = writeln!(file, "{line}");
            }
            on_line(line);
        };
        let far = Instant::now() + Duration::from_secs(86_400 * 365);
        let (mut kill_at, mut drained_at, mut stopping) = (far, far, Stop::No);
        let mut ended = None;
        while ended.is_none() || !(stdout.closed() && stderr.closed()) {
            tokio::select! {
                count = stdout.read(), if !stdout.closed() => stdout.hand_on(count, &mut sink),
                count = stderr.read(), if !stderr.closed() => stderr.hand_on(count, &mut sink),
                status = child.wait(), if ended.is_none() => {
                    ended = Some(status);
                    // Whoever of the group outlived its leader, as the end of a container would end it: it must not
                    // work on beside another attempt. At once, while no other group can have got the number.
                    signal(Signal::KILL);
                    drained_at = Instant::now() + DRAIN;
                }
                wish = next_stop(&mut stop, stopping), if ended.is_none() => {
                    stopping = wish;
                    match wish {
                        Stop::Kill => signal(Signal::KILL),
                        _ => signal(Signal::TERM),
                    }
                    kill_at = Instant::now() + self.grace;
                }
                () = sleep_until(kill_at), if ended.is_none() => {
                    signal(Signal::KILL);
                    kill_at = far;
                }
                () = sleep_until(drained_at) => break,
            }
        }
        stdout.flush(&mut sink);
        stderr.flush(&mut sink);
        outcome(ended)
    }

    fn spawn(&self) -> std::io::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(dir) = self.working_dir {
            command.current_dir(dir);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C on the terminal reaches the runner alone, which then ends its children in order.
        command.process_group(0).kill_on_drop(true);
        #[cfg(target_os = "linux")]
        // SAFETY: the closure runs in the child between fork and exec and makes one system call, which is safe there.
        unsafe {
            // A runner that is killed outright leaves no child behind.
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(std::io::Error::from)
            });
        }
        command.spawn()
    }
}

/// Waits until a stronger wish to stop than `now` is there.
async fn next_stop(stop: &mut watch::Receiver<Stop>, now: Stop) -> Stop {
    match stop.wait_for(|wish| *wish > now).await {
        Ok(wish) => *wish,
        // Nobody is left who could wish for anything.
        Err(_) => std::future::pending().await,
    }
}

fn outcome(ended: Option<std::io::Result<std::process::ExitStatus>>) -> Outcome {
    use std::os::unix::process::ExitStatusExt;
    match ended {
        Some(Ok(status)) => match (status.code(), status.signal()) {
            (Some(code), _) => Outcome::Exit(code),
            (None, Some(signal)) => Outcome::Signal(signal),
            (None, None) => Outcome::NotStarted("ended without a status".to_owned()),
        },
        Some(Err(error)) => Outcome::NotStarted(error.to_string()),
        None => Outcome::NotStarted("not waited for".to_owned()),
    }
}

/// A pipe, line by line; a carriage return ends a line too, so that a progress bar does not grow without end.
struct Lines<R> {
    pipe: Option<R>,
    chunk: Box<[u8; 8192]>,
    rest: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    fn new(pipe: Option<R>) -> Self {
        Self { pipe, chunk: Box::new([0; 8192]), rest: Vec::new() }
    }

    fn closed(&self) -> bool {
        self.pipe.is_none()
    }

    /// Reads once into the chunk; 0 at the end.
    async fn read(&mut self) -> usize {
        match &mut self.pipe {
            Some(pipe) => pipe.read(&mut self.chunk[..]).await.unwrap_or(0),
            None => 0,
        }
    }

    /// Hands on the lines that `count` bytes of the chunk complete.
    fn hand_on(&mut self, count: usize, sink: &mut impl FnMut(&str)) {
        if count == 0 {
            self.pipe = None;
        }
        for &byte in &self.chunk[..count] {
            let end = byte == b'\n' || byte == b'\r';
            if end || self.rest.len() >= MAX_LINE {
                flush(&mut self.rest, sink);
            }
            if !end {
                self.rest.push(byte);
            }
        }
    }

    fn flush(&mut self, sink: &mut impl FnMut(&str)) {
        flush(&mut self.rest, sink);
    }
}

fn flush(rest: &mut Vec<u8>, sink: &mut impl FnMut(&str)) {
    if !rest.is_empty() {
        sink(&String::from_utf8_lossy(rest));
        rest.clear();
    }
}
