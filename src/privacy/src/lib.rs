//! DP mathematics: events, accounting, keyed noise and sampling. No I/O, no async, no clock, no torch.

pub mod accounting;
pub mod discrete_gaussian;
pub mod event;
pub mod gaussian;
pub mod histogram;
pub mod keyed;
pub mod plan;
pub mod training;

pub use accounting::{AccountingError, Bounds, Epsilon, bounds, calibrate, delta, epsilon};
