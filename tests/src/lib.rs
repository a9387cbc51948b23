//! Helpers shared by the scenarios: where the binaries are, tiny lakes, models and conversations to run them on.
//!
//! A scenario runs the real binaries as a user would. What one stage promises by itself is tested beside that stage;
//! what only shows when several work together, and rules about this repository as a whole, are tested here.

pub mod binaries;
pub mod conversations;
pub mod fixture;
pub mod lakes;
pub mod models;
pub mod otlp;
pub mod proxy;
pub mod repository;
pub mod s3;
pub mod tiny;
