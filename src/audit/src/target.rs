//! What is attacked.

use stage::Failure;

use crate::parts::Parts;

/// Training that canaries take part in.
pub(crate) trait Target {
    /// The parts of its step.
    fn parts(&self) -> &Parts;
    /// Number of canaries.
    fn canaries(&self) -> usize;
    /// Takes `step` with those canaries in the data that are `present`. For each canary: how far the released gradient
    /// reaches in its direction, in units of `clip_norm`. That is noise, plus 1 where the canary took part.
    fn step(&mut self, step: u64, present: &[bool]) -> Result<Vec<f64>, Failure>;
}
