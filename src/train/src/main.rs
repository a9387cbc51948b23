//! `doppel-train`: DP-LoRA fine-tuning on the private corpus.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::main("train", doppel_train::run)
}
