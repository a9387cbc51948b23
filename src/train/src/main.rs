//! `doppel-train`: DP-LoRA fine-tuning on the private corpus.

use std::process::ExitCode;

fn main() -> ExitCode {
    lm::tune_memory();
    stage::main("train", doppel_train::Args::config, doppel_train::run)
}
