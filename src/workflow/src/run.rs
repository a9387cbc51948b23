//! Runs a plan: starts jobs as their dependencies end and slots suffice, tries again what may be tried again, stops
//! everything in order when told to.

use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::LocalBoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;

use crate::machine::Machine;
use crate::plan::{Job, Plan};
use crate::process::{Attempt, Stop};
use crate::retry::Outcome;

/// Lines kept of what a job last said.
const TAIL: usize = 20;
/// Characters of a job's name that the name of its log takes over, well below what a file system allows.
const LOG_NAME: usize = 100;

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Slots.
    pub machine: Machine,
    /// Time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Environment for every job, below what the workflow declares.
    pub env: Vec<(String, String)>,
    /// Folder for one log file per job; it exists.
    pub logs: PathBuf,
    /// Folders that are searched for a command before `PATH`.
    pub programs: Vec<PathBuf>,
}

/// What happens while a plan runs.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// An attempt starts, counted from 1.
    Started {
        /// Index of the job.
        job: usize,
        /// Number of the attempt.
        attempt: u32,
    },
    /// The job wrote a line to standard output or standard error.
    Line {
        /// Index of the job.
        job: usize,
        /// The line.
        line: &'a str,
    },
    /// An attempt failed and there will be another.
    Retrying {
        /// Index of the job.
        job: usize,
        /// How the attempt ended.
        outcome: &'a Outcome,
        /// Time until the next.
        pause: Duration,
    },
    /// A job will not run (again).
    Finished {
        /// Index of the job.
        job: usize,
        /// What became of it.
        report: &'a JobReport,
    },
}

/// Whoever watches a run.
pub trait Observer {
    /// Something happened.
    fn event(&self, plan: &Plan, event: Event<'_>);
}

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It did its work.
    Succeeded,
    /// Its last attempt failed, whether or not the run ended before it was tried again.
    Failed,
    /// It was ended because the run was stopped.
    Stopped,
    /// No attempt started: a job before it failed, or the run was stopped.
    NotRun,
}

impl State {
    /// A word for tables.
    pub fn word(self) -> &'static str {
        match self {
            State::Succeeded => "succeeded",
            State::Failed => "failed",
            State::Stopped => "stopped",
            State::NotRun => "not run",
        }
    }
}

/// One job of a finished run.
#[derive(Clone, Debug, PartialEq)]
pub struct JobReport {
    /// What became of it.
    pub state: State,
    /// Attempts made.
    pub attempts: u32,
    /// How the last attempt ended.
    pub outcome: Option<Outcome>,
    /// From the first start to the end.
    pub elapsed: Duration,
    /// The last lines that it wrote.
    pub tail: Vec<String>,
    /// All that it wrote.
    pub log: PathBuf,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// One report per job, in the plan's order.
    pub jobs: Vec<JobReport>,
    /// Wall time.
    pub elapsed: Duration,
    /// Whether it was stopped.
    pub stopped: bool,
}

impl Report {
    /// Whether every job succeeded.
    pub fn success(&self) -> bool {
        self.jobs.iter().all(|job| job.state == State::Succeeded)
    }

    /// Indices of the jobs that failed.
    pub fn failed(&self) -> Vec<usize> {
        (0..self.jobs.len()).filter(|job| self.jobs[*job].state == State::Failed).collect()
    }
}

/// Where the program of a command is: a path as it stands, a name in the folders of `first`, then in `PATH`.
pub fn find_program(name: &str, first: &[PathBuf]) -> Option<PathBuf> {
    if name.contains('/') {
        return executable(Path::new(name)).then(|| PathBuf::from(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = first.iter().cloned().chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join(name)).find(|file| executable(file))
}

/// Where the program of `job` is: as in a container, a relative path is one of its working folder.
///
/// For a job with a working folder the answer is absolute, because its process enters that folder before it looks for
/// the program.
pub fn program_of(job: &Job, first: &[PathBuf]) -> Option<PathBuf> {
    let name = job.command.first()?;
    let Some(folder) = &job.working_dir else {
        return find_program(name, first);
    };
    let found = if name.contains('/') {
        Some(Path::new(folder).join(name)).filter(|file| executable(file))
    } else {
        find_program(name, first)
    };
    std::path::absolute(found?).ok()
}

fn executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Runs `plan` to its end, or until `stop` says otherwise. Call it on the thread that outlives it: children get SIGTERM
/// when the thread that started them is gone.
pub async fn run(plan: &Plan, options: &Options, stop: watch::Receiver<Stop>, observer: &dyn Observer) -> Report {
    let started = Instant::now();
    let mut runner = Runner::new(plan, options, stop.clone(), observer);
    let mut stopping = stop.clone();
    loop {
        if *stop.borrow() == Stop::No {
            runner.start_ready();
        }
        if !runner.busy() {
            break;
        }
        tokio::select! {
            Some(done) = runner.running.next() => runner.done(done),
            // Wakes the loop so that nothing new starts; pauses before a retry end at once.
            () = stopped(&mut stopping), if *stop.borrow() == Stop::No => {}
        }
    }
    let stopped = *stop.borrow() != Stop::No;
    Report { jobs: runner.finish(), elapsed: started.elapsed(), stopped }
}

async fn stopped(stop: &mut watch::Receiver<Stop>) {
    if stop.wait_for(|wish| *wish > Stop::No).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What a future of the runner ended with.
enum Done {
    Attempt(usize, Outcome, Vec<String>),
    Paused(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Pausing,
    Ended,
}

struct Progress {
    phase: Phase,
    report: JobReport,
    first_start: Option<Instant>,
    gpus: Vec<String>,
}

struct Runner<'a> {
    plan: &'a Plan,
    options: &'a Options,
    stop: watch::Receiver<Stop>,
    observer: &'a dyn Observer,
    jobs: Vec<Progress>,
    running: FuturesUnordered<LocalBoxFuture<'a, Done>>,
    /// How many jobs run: those of `running` that do not pause.
    active: usize,
    free: Machine,
    /// DAGs that hold a failed job, or a closed DAG.
    hurt: HashSet<usize>,
    /// DAGs in which nothing new may start.
    closed: HashSet<usize>,
}

impl<'a> Runner<'a> {
    fn new(plan: &'a Plan, options: &'a Options, stop: watch::Receiver<Stop>, observer: &'a dyn Observer) -> Self {
        let progress = |log: String| Progress {
            phase: Phase::Waiting,
            report: JobReport {
                state: State::NotRun,
                attempts: 0,
                outcome: None,
                elapsed: Duration::ZERO,
                tail: Vec::new(),
                log: options.logs.join(log),
            },
            first_start: None,
            gpus: Vec::new(),
        };
        let jobs = log_names(&plan.jobs).into_iter().map(progress).collect();
        let (running, free) = (FuturesUnordered::new(), options.machine.clone());
        let (hurt, closed) = (HashSet::new(), HashSet::new());
        Self { plan, options, stop, observer, jobs, running, active: 0, free, hurt, closed }
    }

    /// Starts every job that waits for nothing and fits, in the order of the file.
    fn start_ready(&mut self) {
        for job in 0..self.plan.jobs.len() {
            if self.jobs[job].phase != Phase::Waiting || !self.ready(job) {
                continue;
            }
            if let Some(reason) = self.options.machine.lacks(&self.plan.jobs[job]) {
                self.fail(job, Outcome::NotStarted(reason));
            } else if self.fits(job) {
                self.start(job);
            }
        }
    }

    fn ready(&self, job: usize) -> bool {
        let after = &self.plan.jobs[job].after;
        self.open(job) && after.iter().all(|before| self.jobs[*before].report.state == State::Succeeded)
    }

    /// Whether something runs, or waits to be tried again and still may be.
    fn busy(&self) -> bool {
        (0..self.jobs.len()).any(|job| match self.jobs[job].phase {
            Phase::Running => true,
            Phase::Pausing => self.open(job),
            Phase::Waiting | Phase::Ended => false,
        })
    }

    /// Whether attempts of the job may still start.
    fn open(&self, job: usize) -> bool {
        self.plan.jobs[job].dag.is_none_or(|dag| !self.ancestors(dag).any(|dag| self.closed.contains(&dag)))
    }

    /// `dag` and the DAGs around it.
    fn ancestors(&self, dag: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(dag), |dag| self.plan.dags[*dag].parent)
    }

    fn fits(&self, job: usize) -> bool {
        let job = &self.plan.jobs[job];
        self.plan.parallelism.is_none_or(|most| self.active < most)
            && self.options.machine.share(job.cpu) <= self.free.cpu
            && job.gpus as usize <= self.free.gpus.len()
            && job.memory <= self.free.memory
    }

    fn start(&mut self, index: usize) {
        let job = &self.plan.jobs[index];
        self.active += 1;
        self.free.cpu -= self.options.machine.share(job.cpu);
        self.free.memory -= job.memory;
        let gpus: Vec<String> = self.free.gpus.drain(..job.gpus as usize).collect();
        let env = self.environment(job, &gpus);
        let progress = &mut self.jobs[index];
        progress.gpus = gpus;
        progress.phase = Phase::Running;
        progress.first_start.get_or_insert_with(Instant::now);
        progress.report.attempts += 1;
        let (attempt, log) = (progress.report.attempts, progress.report.log.clone());
        self.observer.event(self.plan, Event::Started { job: index, attempt });
        let (plan, observer, stop) = (self.plan, self.observer, self.stop.clone());
        let program = program_of(job, &self.options.programs);
        let grace = self.options.grace;
        self.running.push(Box::pin(async move {
            let Some(program) = program else {
                let outcome = Outcome::NotStarted(format!("no program `{}` here", job.command[0]));
                return Done::Attempt(index, outcome, Vec::new());
            };
            let working_dir = job.working_dir.as_deref().map(Path::new);
            let spec = Attempt { program, args: &job.command[1..], env, working_dir, grace };
            let mut tail = VecDeque::with_capacity(TAIL);
            let file = std::fs::OpenOptions::new().create(true).append(true).open(&log).ok();
            let outcome = spec
                .run(stop, file, |line| {
                    if tail.len() == TAIL {
                        tail.pop_front();
                    }
                    tail.push_back(line.to_owned());
                    observer.event(plan, Event::Line { job: index, line });
                })
                .await;
            Done::Attempt(index, outcome, tail.into())
        }));
    }

    /// What the job's process gets on top of the runner's environment; what the workflow declares comes last and wins.
    fn environment(&self, job: &Job, gpus: &[String]) -> Vec<(String, String)> {
        let mut env = self.options.env.clone();
        // Empty where the job asks for none, as a cluster would give it none: it must not take those of others.
        env.push(("CUDA_VISIBLE_DEVICES".to_owned(), gpus.join(",")));
        if job.cpu_limit.is_some() {
            // What the limit would do to a container, for the libraries that size their thread pools by it.
            let threads = (self.options.machine.share(job.cpu_limit) / 1_000).max(1).to_string();
            for name in ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"] {
                if std::env::var_os(name).is_none() {
                    env.push((name.to_owned(), threads.clone()));
                }
            }
        }
        env.extend(job.env.iter().cloned());
        env
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Paused(job) => self.jobs[job].phase = Phase::Waiting,
            Done::Attempt(index, outcome, tail) => {
                self.release(index);
                let progress = &mut self.jobs[index];
                progress.report.elapsed = progress.first_start.map(|start| start.elapsed()).unwrap_or_default();
                progress.report.tail = tail;
                let stopping = *self.stop.borrow() != Stop::No;
                if outcome.success() {
                    progress.report.state = State::Succeeded;
                    self.end(index, outcome);
                } else if stopping {
                    progress.report.state = State::Stopped;
                    self.end(index, outcome);
                } else {
                    let attempts = progress.report.attempts;
                    match self.plan.jobs[index].retry.next(attempts, &outcome) {
                        Some(pause) => self.pause(index, outcome, pause),
                        None => self.fail(index, outcome),
                    }
                }
            }
        }
    }

    fn release(&mut self, index: usize) {
        let job = &self.plan.jobs[index];
        self.active -= 1;
        self.free.cpu += self.options.machine.share(job.cpu);
        self.free.memory += job.memory;
        self.free.gpus.append(&mut self.jobs[index].gpus);
    }

    fn pause(&mut self, index: usize, outcome: Outcome, pause: Duration) {
        self.observer.event(self.plan, Event::Retrying { job: index, outcome: &outcome, pause });
        self.jobs[index].phase = Phase::Pausing;
        self.jobs[index].report.outcome = Some(outcome);
        let mut stop = self.stop.clone();
        self.running.push(Box::pin(async move {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stopped(&mut stop) => {}
            }
            Done::Paused(index)
        }));
    }

    /// The job failed for good.
    fn fail(&mut self, index: usize, outcome: Outcome) {
        self.jobs[index].report.state = State::Failed;
        self.hurt.extend(self.plan.jobs[index].dag);
        self.end(index, outcome);
    }

    /// Closes the DAGs around the job in which something failed: at once where they fail fast, else when nothing in
    /// them can run any more, so that the DAG around such a one counts it as failed then.
    fn close_around(&mut self, index: usize) {
        let mut next = self.plan.jobs[index].dag;
        while let Some(dag) = next {
            let scope = &self.plan.dags[dag];
            if self.hurt.contains(&dag) && (scope.fail_fast || !self.alive(dag)) {
                self.closed.insert(dag);
                self.hurt.extend(scope.parent);
            }
            next = scope.parent;
        }
    }

    /// Whether a job in the DAG, or in one inside of it, runs or still may.
    fn alive(&self, dag: usize) -> bool {
        let inside = |job: &Job| job.dag.is_some_and(|of| self.ancestors(of).any(|around| around == dag));
        self.plan.jobs.iter().zip(self.live()).any(|(job, live)| live && inside(job))
    }

    /// Which jobs run or still may: those that are open and before which no job failed or can no longer run.
    fn live(&self) -> Vec<bool> {
        let possible = |job: usize| match self.jobs[job].phase {
            Phase::Running => true,
            Phase::Pausing | Phase::Waiting => self.open(job),
            Phase::Ended => false,
        };
        let mut live: Vec<bool> = (0..self.jobs.len()).map(possible).collect();
        let barred = |job: &usize, live: &[bool]| {
            let lost = |before: &usize| !live[*before] && self.jobs[*before].report.state != State::Succeeded;
            live[*job] && self.jobs[*job].phase == Phase::Waiting && self.plan.jobs[*job].after.iter().any(lost)
        };
        // A job may wait for one that stands after it: again, until nothing changes.
        loop {
            let found: Vec<usize> = (0..live.len()).filter(|job| barred(job, &live)).collect();
            if found.is_empty() {
                return live;
            }
            found.into_iter().for_each(|job| live[job] = false);
        }
    }

    fn end(&mut self, index: usize, outcome: Outcome) {
        let progress = &mut self.jobs[index];
        progress.phase = Phase::Ended;
        progress.report.outcome = Some(outcome);
        self.close_around(index);
        self.observer.event(self.plan, Event::Finished { job: index, report: &self.jobs[index].report });
    }

    /// Reports what never ran, too. What would have been tried again has failed: its last attempt stands.
    fn finish(mut self) -> Vec<JobReport> {
        for (index, progress) in self.jobs.iter_mut().enumerate().filter(|(_, job)| job.phase != Phase::Ended) {
            if progress.report.attempts > 0 {
                progress.report.state = State::Failed;
            }
            self.observer.event(self.plan, Event::Finished { job: index, report: &progress.report });
        }
        self.jobs.into_iter().map(|progress| progress.report).collect()
    }
}

/// A file name for each job's log. Where a name is too long, or differs from an earlier one only in characters that are
/// not taken over, the job's index tells them apart, after a `+`, which no other name has.
fn log_names(jobs: &[Job]) -> Vec<String> {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }
    };
    let mut taken = HashSet::new();
    let name = |(index, job): (usize, &Job)| {
        let name: String = job.name.chars().map(plain).collect();
        let name = name.trim_end_matches('_');
        if name.len() <= LOG_NAME && taken.insert(name.to_owned()) {
            return format!("{name}.log");
        }
        format!("{name:.LOG_NAME$}+{index}.log")
    };
    jobs.iter().enumerate().map(name).collect()
}
