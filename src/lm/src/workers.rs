//! Splitting work over the processors by example rather than by element.
//!
//! libtorch would split every small operation and wait for the slowest thread at its end, some thousand times a step;
//! where a processor is shared, each wait can cost a time slice. Instead each worker takes some of the examples through
//! the whole model on one thread, and there is one wait at the end.

use std::sync::Mutex;

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

/// How many workers computing on `device` pays for.
pub(crate) fn count(device: Device) -> usize {
    match device {
        Device::Cpu => usize::try_from(tch::get_num_threads()).unwrap_or(1).clamp(1, 64),
        _ => 1,
    }
}

/// Runs `work` on every part, each on a thread of its own with libtorch on one thread; results in order of the parts.
pub(crate) fn each<P: Send, R: Send>(
    parts: Vec<P>,
    work: impl Fn(P) -> Result<R, LmError> + Sync,
) -> Result<Vec<R>, LmError> {
    if parts.len() <= 1 {
        return parts.into_iter().map(work).collect();
    }
    // The count of threads is partly a global of libtorch: two callers at once would undo each other's.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let threads = tch::get_num_threads();
    tch::set_num_threads(1);
    let results = std::thread::scope(|scope| {
        let handles: Vec<_> = parts
            .into_iter()
            .map(|part| {
                scope.spawn(|| {
                    tch::set_num_threads(1);
                    tch::no_grad(|| work(part))
                })
            })
            .collect();
        let join = |handle: std::thread::ScopedJoinHandle<'_, _>| {
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        handles.into_iter().map(join).collect()
    });
    tch::set_num_threads(threads);
    results
}
