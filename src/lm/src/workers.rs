//! Splitting work over the processors by example rather than by element.
//!
//! libtorch would split every small operation and wait for the slowest thread at its end, some thousand times a step;
//! where a processor is shared, each wait can cost a time slice. Instead each worker takes some of the examples through
//! the whole model on one thread, and there is one wait at the end: of a micro-batch where that is split ([`each`]), or of
//! all micro-batches where workers take them from a queue ([`fold`]).

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::ScopedJoinHandle;

use tch::Device;

use crate::LmError;

/// A reference that may be used from several threads at once.
///
/// `tch::Tensor` is not `Sync` because its in-place operations take a shared reference in places.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a, T>(&'a T);

// SAFETY: the only use is reading frozen weights, adapters and settings: nothing in [`each`]'s callers writes through the
// reference, and libtorch's reference counts are atomic.
unsafe impl<T> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(value: &'a T) -> Self {
        Self(value)
    }

    pub(crate) fn get(&self) -> &'a T {
        self.0
    }
}

thread_local! {
    /// Whether this thread is a worker, whose own work is not split again.
    static WORKER: Cell<bool> = const { Cell::new(false) };
}

/// How many workers computing on `device` pays for.
pub(crate) fn count(device: Device) -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    match device {
        Device::Cpu if !WORKER.get() => *THREADS.get_or_init(threads),
        _ => 1,
    }
}

/// What libtorch would have used (`OMP_NUM_THREADS`, or all processors), and no more than this process's share of them:
/// libtorch does not see a container's limit.
fn threads() -> usize {
    let all = usize::try_from(tch::get_num_threads()).unwrap_or(1);
    let share = match std::env::var_os("OMP_NUM_THREADS") {
        Some(_) => None,
        None => std::thread::available_parallelism().ok(),
    };
    share.map_or(all, |share| all.min(share.get())).clamp(1, 64)
}

/// Runs `work` on every part, each on a thread of its own; results in order of the parts.
///
/// From the first call with several parts on, libtorch itself stays on one thread in this process: its own threads would
/// stand in the workers' way, and the small operations between two calls do not pay for them.
pub(crate) fn each<P: Send, R: Send>(
    parts: Vec<P>,
    work: impl Fn(P) -> Result<R, LmError> + Sync,
) -> Result<Vec<R>, LmError> {
    if parts.len() <= 1 {
        return parts.into_iter().map(work).collect();
    }
    tch::set_num_threads(1);
    std::thread::scope(|scope| {
        let work = &work;
        let start = |part: P| {
            scope.spawn(move || {
                WORKER.set(true);
                tch::set_num_threads(1);
                tch::no_grad(|| work(part))
            })
        };
        let handles: Vec<_> = parts.into_iter().map(start).collect();
        let join =
            |handle: ScopedJoinHandle<'_, _>| handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        handles.into_iter().map(join).collect()
    })
}

/// Lets the workers of `device` take parts from the front until none is left, each with a state of its own that `start`
/// makes; their states. Nobody waits for another before the end, so parts may differ in size. After an error no more parts
/// are begun.
pub(crate) fn fold<P: Send, S: Send>(
    device: Device,
    parts: Vec<P>,
    start: impl Fn() -> Result<S, LmError> + Sync,
    work: impl Fn(&mut S, P) -> Result<(), LmError> + Sync,
) -> Result<Vec<S>, LmError> {
    let workers = count(device).min(parts.len());
    let queue = Mutex::new(VecDeque::from(parts));
    let queue = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    each((0..workers).collect(), |_| {
        let mut state = start()?;
        loop {
            // The lock ends with the statement.
            let part = queue().pop_front();
            let Some(part) = part else { return Ok(state) };
            work(&mut state, part).inspect_err(|_| queue().clear())?;
        }
    })
}

/// Lets a quarter of the machine's memory be the beginning of the heap, in huge pages where the kernel gives them to those
/// who ask: weights and activations are read from end to end, and every small page of them is looked up anew. Memory that
/// is not used is not taken.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn ask_for_huge_pages() {
    const HUGE: usize = 2 << 20;
    if !is_address_space_free() {
        return;
    }
    // SAFETY: `malloc` gives all of the block or nothing, and `madvise` gets whole pages within it.
    unsafe {
        let (pages, page) = (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE));
        let size = pages.max(0) as usize * page.max(0) as usize / 4 + 2 * HUGE;
        let block = libc::malloc(size);
        if !block.is_null() {
            let first = block.cast::<u8>().align_offset(HUGE);
            libc::madvise(block.byte_add(first), size - 2 * HUGE, libc::MADV_HUGEPAGE);
            libc::free(block);
        }
    }
}

/// Whether addresses cost nothing until they are used: not where they are limited (`ulimit -v`, as Slurm may set it), nor
/// where the kernel sets memory aside for all of them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn is_address_space_free() -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call fills in what it is given.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) } == 0;
    let sets_aside = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2");
    known && limit.rlim_cur == libc::RLIM_INFINITY && !sets_aside
}

/// Compiled products that oneDNN keeps for each worker: a pass through a model needs some 25 for each shape of batch.
const PRODUCTS: usize = 64;

/// Settles what the libraries below do with memory: to be called first in `main`, before there are other threads.
///
/// A step frees and takes the same large blocks over and over. By default every thread has an arena of its own, in which
/// others' free blocks are of no use, and gives large ones back to the kernel each time, which clears every page again. So
/// glibc is told to serve all threads from one arena, large blocks too, and to keep what is freed. Arenas that threads were
/// given before this call would stay, and workers, who come and go, would fill them in turn.
///
/// oneDNN compiles a product for every shape and keeps 1,024 of them by default, scattered over what would be free
/// otherwise. Micro-batches have many shapes: two workers that train SmolLM2-135M at 2,048 tokens came to hold 2.2 GB and
/// went on growing; with this they stay at 1.8 GB and are as fast.
pub fn tune_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: these calls set parameters of the allocator and may be made at any time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    ask_for_huge_pages();
    let capacity = "ONEDNN_PRIMITIVE_CACHE_CAPACITY";
    if std::env::var_os(capacity).is_none() {
        let workers = std::thread::available_parallelism().map_or(1, |count| count.get());
        // SAFETY: the caller has no other threads yet that could read the environment meanwhile.
        unsafe { std::env::set_var(capacity, (PRODUCTS * workers).min(1024).to_string()) };
    }
}
