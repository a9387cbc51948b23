//! Canary gradients: one direction each, so that nothing but its own noise stands between a canary and the attacker.
//!
//! Dirac gradients are the strongest canaries known (Nasr et al. 2023, section 4; Steinke, Nasr, Jagielski 2023,
//! section 6): coordinate i of the gradient belongs to canary i alone. They need no model, so thousands are cheap.

use doppel_train::step::clip_alone;
use privacy::keyed::{Context, NoiseKey};
use privacy::training::ClippedSum;
use stage::Failure;

use crate::parts::Parts;
use crate::target::Target;

/// Norm of a canary's gradient before clipping ÷ `clip_norm`: large, so that clipping has something to do.
pub(crate) const OVERSIZE: f64 = 10.0;

/// The one coordinate of a canary's gradient, as `sum` counts, clipped and rounded by train's own step. All canaries have
/// the same, so one goes through it for all.
pub(crate) fn clipped(parts: &Parts, sum: &ClippedSum) -> Result<i64, Failure> {
    let gradient = [(OVERSIZE * parts.accounted.clip_norm()) as f32];
    let whole = clip_alone(&parts.clipping, &gradient, sum.granularity()).map_err(crate::failure)?;
    Ok(whole[0])
}

/// Canaries with gradients along the axes.
pub(crate) struct Directions {
    parts: Parts,
    key: NoiseKey,
    context: Context,
    units: Vec<String>,
}

impl Directions {
    pub fn new(parts: Parts, canaries: usize, key: NoiseKey) -> Self {
        let units = (0..canaries).map(|canary| format!("canary-{canary}")).collect();
        Self { parts, key, context: Context::new("audit/directions"), units }
    }
}

impl Target for Directions {
    fn parts(&self) -> &Parts {
        &self.parts
    }

    fn canaries(&self) -> usize {
        self.units.len()
    }

    fn step(&mut self, step: u64, present: &[bool]) -> Result<Vec<f64>, Failure> {
        let sampler = self.parts.sampler.sampler(&self.key, &self.context, step);
        let mut sum = self.parts.noise.empty_sum(&[self.units.len()]);
        let clipped = clipped(&self.parts, &sum)?;
        let gradient = |(unit, &present): (&String, &bool)| if present && sampler.includes(unit) { clipped } else { 0 };
        let canaries: Vec<i64> = self.units.iter().zip(present).map(gradient).collect();
        sum.add_rounded(&[canaries]).map_err(crate::accounting)?;
        let released = self.parts.noise.release(&self.key, &self.context, step, sum).map_err(crate::accounting)?;
        let scale = self.parts.accounted.expected_batch_size() / self.parts.accounted.clip_norm();
        Ok(released.value()[0].iter().map(|&value| f64::from(value) * scale).collect())
    }
}
