//! The command line contract of doppel-synthesize: exit codes, messages, and what is in storage afterwards.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use arrow::array::AsArray;
use arrow::datatypes::{Float32Type, Int32Type, Int64Type};
use lake::manifest::{self, Begin, Claim, Input};
use lake::{ReleaseRoot, StorageOptions, Zone};
use lm::adapter::{Lora, LoraConfig, Target};
use lm::checkpoint::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// 256 bytes and three special tokens, of which 1 is the end.
const TOKENIZER: &str = include_str!("../../lm/src/encoder/golden/t5-relu/tokenizer.json");
const VOCABULARY: usize = 259;

/// A release root and a tiny random model.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        write_model(&place.path("model"), 16);
        place
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-synthesize"));
        for name in ["DOPPEL_RUN", "DOPPEL_PRIVATE", "DOPPEL_RELEASE", "RUST_LOG"] {
            command.env_remove(name);
        }
        command.args(["--release", &self.path("release"), "--format", "json", "--dtype", "f32", "--device", "cpu"]);
        if !arguments.contains(&"--max-new-tokens") {
            command.args(["--max-new-tokens", "6"]);
        }
        command.args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the stage on the tiny model, without an adapter.
    fn base(&self, run: &str, arguments: &[&str]) -> Output {
        let model = self.path("model");
        let mut all = vec!["--run", run, "--model", &model, "--no-adapter"];
        all.extend(arguments);
        self.run(&all)
    }

    /// (seed, text, tokens, finish reason, mean log-probability bits) by sample number.
    fn samples(&self, run: &str) -> BTreeMap<u64, (i64, String, i32, String, u32)> {
        let url = self.path("release");
        let table = format!("runs/{run}/synthetic");
        let columns = ["id", "seed", "text", "tokens", "finish_reason", "mean_logprob"];
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let batches = runtime.block_on(async {
            let table = ReleaseRoot::open(&url, &StorageOptions::default()).await.unwrap().table(&table);
            table.read(table.pin().await.unwrap(), &columns).await.unwrap()
        });
        let mut samples = BTreeMap::new();
        for batch in batches {
            for row in 0..batch.num_rows() {
                let text = |column: usize| batch.column(column).as_string::<i32>().value(row).to_string();
                let number: u64 = text(0).rsplit('-').next().unwrap().parse().unwrap();
                let seed = batch.column(1).as_primitive::<Int64Type>().value(row);
                let tokens = batch.column(3).as_primitive::<Int32Type>().value(row);
                let logprob = batch.column(5).as_primitive::<Float32Type>().value(row);
                assert!(logprob.is_finite());
                let earlier = samples.insert(number, (seed, text(2), tokens, text(4), logprob.to_bits()));
                assert!(earlier.is_none(), "sample {number} is there twice");
            }
        }
        samples
    }
}

/// A Llama of width `hidden` with random weights, small enough for a test.
fn write_model(folder: &str, hidden: usize) {
    let folder = Path::new(folder);
    std::fs::create_dir_all(folder).unwrap();
    let (inner, key) = (2 * hidden, hidden / 2);
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 32, "tie_word_embeddings": true,
        "eos_token_id": 1,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), TOKENIZER).unwrap();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_string(), vec![VOCABULARY, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
        (layer("input_layernorm"), vec![hidden]),
        (layer("post_attention_layernorm"), vec![hidden]),
        (layer("self_attn.q_proj"), vec![hidden, hidden]),
        (layer("self_attn.k_proj"), vec![key, hidden]),
        (layer("self_attn.v_proj"), vec![key, hidden]),
        (layer("self_attn.o_proj"), vec![hidden, hidden]),
        (layer("mlp.gate_proj"), vec![inner, hidden]),
        (layer("mlp.up_proj"), vec![inner, hidden]),
        (layer("mlp.down_proj"), vec![hidden, inner]),
    ];
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 0.8
    };
    let bodies: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(_, shape)| (0..shape.iter().product::<usize>()).flat_map(|_| next().to_le_bytes()).collect())
        .collect();
    let views = shapes
        .iter()
        .zip(&bodies)
        .map(|((name, shape), body)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), body).unwrap()));
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A PEFT folder for the model in `model`, as train releases it; its factors B are `learned` all over.
fn write_adapter(model: &str, to: &str, learned: f64) {
    let config = Checkpoint::open(Path::new(model)).unwrap().decoder_config().unwrap();
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: vec![Target::Q, Target::V], dropout: 0.0 };
    let mut lora = Lora::new(lora, &config, tch::Device::Cpu, 1).unwrap();
    for (_, b) in lora.tensors.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
        *b = b.full_like(learned);
    }
    std::fs::create_dir_all(to).unwrap();
    for (name, body) in lora.to_peft("model").unwrap() {
        std::fs::write(Path::new(to).join(name), body).unwrap();
    }
}

fn json_of(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Asserts exit code and message, and that nothing went to standard output.
fn fails(output: &Output, code: i32, message: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.contains(message), "expected {message:?} in {error}");
    assert!(output.stdout.is_empty());
}

#[test]
fn samples_are_written_once_and_a_second_run_finds_them() {
    let place = Place::new();
    let first = json_of(&place.base("base", &["--count", "20"]));
    assert_eq!(
        (&first["rows"], &first["already_done"], &first["zone"]),
        (&json!(20), &json!(false), &json!("release"))
    );
    let samples = place.samples("base");
    assert_eq!(samples.len(), 20);
    assert!(samples.values().all(|sample| sample.2 <= 6 && ["stop", "length"].contains(&sample.3.as_str())));
    let second = json_of(&place.base("base", &["--count", "20"]));
    assert_eq!(second["already_done"], json!(true));
    assert_eq!(place.samples("base"), samples);
}

#[test]
fn shards_and_batches_of_any_number_give_the_same_samples() {
    let place = Place::new();
    json_of(&place.base("whole", &["--count", "20", "--batch-size", "7"]));
    for shard in ["2/3", "0/3", "1/3"] {
        json_of(&place.base("parts", &["--count", "20", "--batch-size", "3", "--shard", shard]));
    }
    assert_eq!(place.samples("parts"), place.samples("whole"));
    json_of(&place.base("large", &["--count", "20", "--batch-size", "1000000000"]));
    assert_eq!(place.samples("large"), place.samples("whole"));
    json_of(&place.base("other", &["--count", "20", "--seed", "1"]));
    assert_ne!(place.samples("other"), place.samples("whole"));
}

#[test]
fn killed_while_sampling_then_rerun_gives_what_one_clean_run_gives() {
    let place = Place::new();
    let model = place.path("model");
    let arguments = ["--run", "killed", "--model", &model, "--no-adapter", "--count", "1500"];
    let mut child = place.command(&arguments).spawn().unwrap();
    let log = format!("{}/runs/killed/synthetic/_delta_log/00000000000000000002.json", place.path("release"));
    for _ in 0..600 {
        if Path::new(&log).exists() || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let _ = child.kill();
    child.wait().unwrap();
    json_of(&place.run(&arguments));
    json_of(&place.base("clean", &["--count", "1500"]));
    assert_eq!(place.samples("killed"), place.samples("clean"));
}

#[test]
fn an_adapter_is_taken_from_its_run() {
    let place = Place::new();
    let model = place.path("model");
    write_adapter(&model, &place.path("release/runs/trained/adapter"), 0.5);
    let own = place.run(&["--run", "trained", "--model", &model, "--count", "5"]);
    assert_eq!(json_of(&own)["rows"], json!(5));
    let other = place.run(&["--run", "later", "--adapter-run", "trained", "--model", &model, "--count", "5"]);
    assert_eq!(json_of(&other)["rows"], json!(5));
    let missing = place.run(&["--run", "x", "--adapter-run", "untrained", "--model", &model, "--count", "5"]);
    fails(&missing, 3, "runs/untrained/adapter: no adapter there");
}

#[test]
fn what_an_adapter_learned_changes_the_samples() {
    let place = Place::new();
    let model = place.path("model");
    for (run, learned) in [("untouched", 0.0), ("trained", 0.5)] {
        write_adapter(&model, &place.path(&format!("release/runs/{run}/adapter")), learned);
        json_of(&place.run(&["--run", run, "--model", &model, "--count", "20"]));
    }
    json_of(&place.base("base", &["--count", "20"]));
    assert_eq!(place.samples("untouched"), place.samples("base"));
    let texts = |run: &str| place.samples(run).into_values().map(|sample| sample.1).collect::<Vec<_>>();
    assert_ne!(texts("trained"), texts("base"));
}

/// Gives the model's tokenizer a chat template with a system turn.
fn write_chat_template(model: &str) {
    let template = "{% for message in messages %}{% if loop.first %}sys</s>{% endif %}\
                    {{ message['role'] }}:{{ message['content'] }}</s>{% endfor %}";
    let config = json!({ "chat_template": template, "eos_token": "</s>" });
    std::fs::write(Path::new(model).join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn samples_are_drawn_behind_the_template_that_is_asked_for() {
    let place = Place::new();
    write_chat_template(&place.path("model"));
    for template in ["none", "user", "chat"] {
        assert_eq!(json_of(&place.base(template, &["--count", "10", "--template", template]))["rows"], json!(10));
    }
    let logprobs = |run: &str| place.samples(run).into_values().map(|sample| sample.4).collect::<Vec<_>>();
    assert_ne!(logprobs("none"), logprobs("user"));
    assert_ne!(logprobs("user"), logprobs("chat"));
}

/// Leaves the manifest of a finished train that had this template and a model with this digest.
fn settle_train(release: &str, run: &str, template: &str, digest: &str) {
    let model = Input { name: "model".into(), location: "llama".into(), version: None, digest: Some(digest.into()) };
    let claim = Claim {
        run: run.into(),
        stage: "train".into(),
        shard: None,
        inputs: vec![model],
        config: json!({ "template": template }),
        seeds: vec![],
        binary: "doppel-train".into(),
        started: chrono::Utc::now(),
        command: Vec::new(),
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let release = ReleaseRoot::open(release, &StorageOptions::default()).await.unwrap();
        let Begin::Fresh(handle) = manifest::begin(&release, claim).await.unwrap() else { panic!("{run} was there") };
        handle.finish(vec![], json!({})).await.unwrap();
    });
}

#[test]
fn another_template_than_the_adapter_was_trained_with_is_refused() {
    let place = Place::new();
    let model = place.path("model");
    write_chat_template(&model);
    write_adapter(&model, &place.path("release/runs/trained/adapter"), 0.5);
    let digest = Checkpoint::open(Path::new(&model)).unwrap().digest().unwrap();
    settle_train(&place.path("release"), "trained", "user", &digest);
    let sample =
        |template: &str| place.run(&["--run", "trained", "--model", &model, "--count", "5", "--template", template]);
    fails(&sample("none"), 2, "--template none: the adapter of run trained was trained with --template user");
    assert!(!Path::new(&place.path("release/runs/trained/synthetic")).exists());
    assert_eq!(json_of(&sample("user"))["rows"], json!(5));
}

#[test]
fn another_base_model_than_the_adapter_was_trained_on_is_refused() {
    let place = Place::new();
    let model = place.path("model");
    write_adapter(&model, &place.path("release/runs/trained/adapter"), 0.5);
    settle_train(&place.path("release"), "trained", "none", "c0ffee");
    let sample = || place.run(&["--run", "later", "--adapter-run", "trained", "--model", &model, "--count", "5"]);
    fails(&sample(), 2, "--model model: the adapter of run trained was trained on other files, of model llama");
    assert!(!Path::new(&place.path("release/runs/later")).exists(), "no claim");
}

#[test]
fn a_model_whose_logits_are_not_finite_is_an_input_error() {
    let place = Place::new();
    let model = place.path("model");
    write_adapter(&model, &place.path("release/runs/diverged/adapter"), f64::NAN);
    let output = place.run(&["--run", "diverged", "--model", &model, "--count", "5"]);
    fails(&output, 3, "runs/diverged/adapter: logits are not finite");
}

#[test]
fn a_sample_ends_before_a_token_that_stops_it() {
    let place = Place::new();
    json_of(&place.base("free", &["--count", "40"]));
    let letters: Vec<String> = ('a'..='z').map(String::from).collect();
    let mut stopping = vec!["--count", "40"];
    stopping.extend(letters.iter().flat_map(|letter| ["--stop", letter]));
    json_of(&place.base("stopped", &stopping));
    let has_letter = |text: &str| text.contains(|letter: char| letter.is_ascii_lowercase());
    let (free, stopped) = (place.samples("free"), place.samples("stopped"));
    assert!(free.values().any(|sample| has_letter(&sample.1)));
    for (number, sample) in &stopped {
        assert!(!has_letter(&sample.1));
        let expected = if has_letter(&free[number].1) { "stop" } else { &free[number].3 };
        assert_eq!(sample.3, expected, "sample {number}");
    }
    fails(&place.base("free", &["--count", "40", "--stop", "a"]), 2, "stop");
    fails(
        &place.base("other", &["--count", "5", "--stop", "ab"]),
        2,
        "--stop \"ab\" is 2 tokens of this model, expected one",
    );
    assert!(!Path::new(&place.path("release/runs/other/synthetic")).exists());
}

#[test]
fn an_adapter_for_another_model_is_an_input_error() {
    let place = Place::new();
    write_model(&place.path("wide"), 32);
    write_adapter(&place.path("wide"), &place.path("release/runs/wide/adapter"), 0.5);
    let model = place.path("model");
    let output = place.run(&["--run", "wide", "--model", &model, "--count", "5"]);
    fails(&output, 3, "runs/wide/adapter/adapter_model.safetensors: tensor");
    assert!(!Path::new(&place.path("release/runs/wide/synthetic")).exists());
}

#[test]
fn a_run_id_with_other_settings_is_refused() {
    let place = Place::new();
    json_of(&place.base("base", &["--count", "5"]));
    fails(&place.base("base", &["--count", "6"]), 2, "count: earlier 5, now 6");
    fails(&place.base("base", &["--count", "5", "--top-p", "0.5"]), 2, "top_p");
    fails(&place.base("base", &["--count", "5", "--shard", "0/2"]), 2, "");
    write_model(&place.path("model"), 32);
    fails(&place.base("base", &["--count", "5"]), 2, "input model");
}

#[test]
fn a_model_that_cannot_be_used_is_an_input_error() {
    let place = Place::new();
    fails(&place.run(&["--run", "a", "--no-adapter", "--count", "1", "--model", &place.path("absent")]), 3, "absent");

    let model = place.path("model");
    let file = |name: &str| Path::new(&model).join(name);
    std::fs::remove_file(file("tokenizer.json")).unwrap();
    fails(&place.base("a", &["--count", "1"]), 3, "no tokenizer.json");
    std::fs::write(file("tokenizer.json"), TOKENIZER).unwrap();

    let weights = std::fs::read(file("model.safetensors")).unwrap();
    std::fs::write(file("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    fails(&place.base("b", &["--count", "1"]), 3, "cut short");
    std::fs::write(file("model.safetensors"), weights).unwrap();

    let config = std::fs::read_to_string(file("config.json")).unwrap();
    std::fs::write(file("config.json"), config.replace("\"llama\"", "\"mamba\"")).unwrap();
    fails(&place.base("c", &["--count", "1"]), 3, "known are llama, qwen2");
    assert!(!Path::new(&place.path("release/runs/c/synthetic")).exists());
}

#[test]
fn wrong_usage_says_what_to_change() {
    let place = Place::new();
    fails(&place.base("a", &["--count", "0", "--top-p", "2"]), 2, "--top-p 2: expected a number in (0, 1]");
    fails(&place.base("a", &["--count", "5", "--top-p", "-1"]), 2, "--top-p -1: expected a number in (0, 1]");
    fails(&place.base("a", &["--count", "5", "--shard", "5/5"]), 2, "0/8");
    fails(&place.base("a", &["--count", "5", "--adapter-run", "b"]), 2, "--no-adapter");
    fails(&place.base("a", &["--count", "5", "--template", "user"]), 2, "no chat template");
    let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-synthesize"));
    command.env_remove("DOPPEL_RELEASE").args(["--run", "a", "--model", "m", "--count", "1"]);
    fails(&command.output().unwrap(), 2, "no release root is given");
    fails(&place.base("a", &["--count", "5", "--max-new-tokens", "32"]), 2, "32 positions do not suffice");
}
