//! What this machine has to give to jobs.

use std::path::Path;

use crate::plan::Job;

/// Slots that running jobs hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Thousandths of a CPU.
    pub cpu: u64,
    /// Ids of the GPUs, as `CUDA_VISIBLE_DEVICES` names them.
    pub gpus: Vec<String>,
    /// Bytes of memory.
    pub memory: u64,
}

impl Machine {
    /// This machine: CPUs that the process may use, its GPUs, its memory.
    pub fn detect() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        Self { cpu: cpus * 1_000, gpus: gpus(), memory: memory() }
    }

    /// Why `job` can never run here, if so. CPUs are not a reason: with fewer it only takes longer.
    pub fn lacks(&self, job: &Job) -> Option<String> {
        if job.gpus as usize > self.gpus.len() {
            return Some(format!("needs {} GPUs; this machine has {}", job.gpus, self.gpus.len()));
        }
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        (job.memory > self.memory).then(|| {
            format!("needs {:.1} GiB of memory; this machine has {:.1} GiB", gib(job.memory), gib(self.memory))
        })
    }

    /// CPU slots that a job holds: what it declares, one CPU where it declares nothing, the machine at most.
    pub(crate) fn share(&self, declared: Option<u64>) -> u64 {
        declared.unwrap_or(1_000).min(self.cpu)
    }
}

/// GPUs by number, or as the caller restricted them.
fn gpus() -> Vec<String> {
    if let Ok(visible) = std::env::var("CUDA_VISIBLE_DEVICES") {
        let ids = visible.split(',').map(str::trim).filter(|id| !id.is_empty() && *id != "-1" && *id != "NoDevFiles");
        return ids.map(str::to_owned).collect();
    }
    let mut found = Vec::new();
    while Path::new(&format!("/dev/nvidia{}", found.len())).exists() {
        found.push(found.len().to_string());
    }
    found
}

/// Total memory: the control group's limit where it is lower than the machine's.
fn memory() -> u64 {
    let number = |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let limit = number("/sys/fs/cgroup/memory.max").or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    let info = rustix::system::sysinfo();
    let total = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit).max(1));
    limit.map_or(total, |limit| limit.min(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_something_to_give() {
        let machine = Machine::detect();
        assert!(machine.cpu >= 1_000);
        assert!(machine.memory > 1 << 27);
    }

    #[test]
    fn a_job_holds_at_most_the_machine() {
        let machine = Machine { cpu: 2_000, gpus: Vec::new(), memory: 0 };
        let shares = [None, Some(500), Some(64_000)].map(|declared| machine.share(declared));
        assert_eq!(shares, [1_000, 500, 2_000]);
    }
}
