use super::*;
use crate::checkpoint::Checkpoint;
use crate::decoder::tests::{SHAPES, cpu, golden, json, real_model, tiny, wave};
use crate::device::{Compute, DeviceChoice, DtypeChoice};

fn sampling(temperature: f64, max_new_tokens: usize) -> Sampling {
    Sampling { temperature, top_p: 0.95, top_k: 0, repetition_penalty: 1.0, max_new_tokens, stop: vec![] }
}

fn requests(count: u64) -> impl Iterator<Item = Request> {
    (0..count).map(|index| Request {
        index,
        prompt: (0..1 + index % 5).map(|place| ((index * 13 + place * 7) % 64) as i64).collect(),
        seed: 1000 + index,
    })
}

fn run(
    decoder: &Decoder,
    sampling: &Sampling,
    requests: impl Iterator<Item = Request>,
    batch: usize,
) -> Vec<Completion> {
    let mut found = Vec::new();
    generate(decoder, sampling, requests, batch, |completion| {
        found.push(completion);
        Ok(())
    })
    .unwrap();
    found.sort_by_key(|completion| completion.index);
    found
}

/// Greedy continuation without a cache.
fn slow_greedy(decoder: &Decoder, prompt: &[i64], count: usize) -> (Vec<i64>, f64) {
    let mut ids = prompt.to_vec();
    let mut logprobs = 0.0;
    for _ in 0..count {
        let logits = decoder.logits(&Tensor::from_slice(&ids).unsqueeze(0)).unwrap();
        let last = logits.get(0).get(ids.len() as i64 - 1);
        let best = last.argmax(0, false).int64_value(&[]);
        logprobs += last.log_softmax(0, Kind::Float).double_value(&[best]);
        ids.push(best);
    }
    (ids[prompt.len()..].to_vec(), logprobs / count as f64)
}

#[test]
fn the_cache_changes_nothing() {
    for name in SHAPES {
        let decoder = tiny(name);
        for completion in run(&decoder, &sampling(0.0, 70), requests(7), 3) {
            let request = requests(7).nth(completion.index as usize).unwrap();
            let (expected, logprob) = slow_greedy(&decoder, &request.prompt, 70);
            assert_eq!(completion.tokens, expected, "{name}, {}", completion.index);
            assert!((f64::from(completion.mean_logprob) - logprob).abs() < 1e-4);
            assert!(!completion.stopped);
        }
    }
}

/// The way of GPUs, and of CPUs without AVX2: the batch size, and how many sequences fit into memory.
fn run_by_libtorch(decoder: &Decoder, sampling: &Sampling, count: u64, sizes: (usize, usize)) -> Vec<Completion> {
    let mut found = Vec::new();
    let mut checked = requests(count).map(|request| check(decoder, sampling, request)).fuse();
    by_libtorch(decoder, sampling, &mut checked, sizes, &mut |completion| {
        found.push(completion);
        Ok(())
    })
    .unwrap();
    found.sort_by_key(|completion| completion.index);
    found
}

#[test]
fn libtorch_gives_what_the_cpu_kernels_give() {
    // These operations are too small for threads to pay.
    tch::set_num_threads(1);
    for name in SHAPES {
        let decoder = tiny(name);
        let mut sampling = sampling(0.0, 20);
        sampling.stop = vec![3];
        let expected = run(&decoder, &sampling, requests(10), 8);
        for sizes in [(3, 100), (33, 100), (33, 5)] {
            let found = run_by_libtorch(&decoder, &sampling, 10, sizes);
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.tokens, expected.tokens, "{name}, {sizes:?}, {}", found.index);
                assert!((found.mean_logprob - expected.mean_logprob).abs() < 1e-4);
            }
            assert_eq!(found.len(), expected.len());
        }
    }
}

/// Where there is a GPU: its kernels are others, which no CPU runs.
#[test]
fn a_gpu_samples_from_what_the_cpu_computes() {
    let Ok(compute) = Compute::resolve(DeviceChoice::Cuda, DtypeChoice::Bf16) else { return };
    for name in SHAPES {
        let plain = tiny(name);
        let gpu = Decoder::load(&Checkpoint::open(&golden(name)).unwrap(), compute).unwrap();
        for temperature in [0.0, 0.7, 1.0] {
            let found = run(&gpu, &sampling(temperature, 60), requests(40), 16);
            assert_eq!(found.len(), 40);
            for completion in found {
                let mut ids = requests(40).nth(completion.index as usize).unwrap().prompt;
                let first = ids.len() as i64;
                ids.extend(&completion.tokens);
                let logits = plain.logits(&Tensor::from_slice(&ids).unsqueeze(0)).unwrap().squeeze_dim(0);
                let count = completion.tokens.len() as i64;
                let logprobs = logits.narrow(0, first - 1, count).log_softmax(-1, Kind::Float);
                let chosen = logprobs.gather(1, &Tensor::from_slice(&completion.tokens).unsqueeze(1), false);
                let off = f64::from(completion.mean_logprob) - chosen.mean(Kind::Double).double_value(&[]);
                assert!(off.abs() < 0.05, "{name}, {temperature}, {}: {off}", completion.index);
            }
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_the_batch_size() {
    let decoder = tiny("smollm2");
    let mut sampling = sampling(1.0, 60);
    // Some stop early, so that slots are refilled at different moments.
    sampling.stop = vec![3, 17];
    let expected = run(&decoder, &sampling, requests(40), 16);
    assert!(expected.iter().any(|completion| completion.stopped));
    assert_eq!(expected.len(), 40);
    for batch in [1, 4, 33, 64] {
        assert!(run(&decoder, &sampling, requests(40), batch) == expected, "batch {batch}");
    }
    let alone: Vec<Completion> =
        requests(40).flat_map(|request| run(&decoder, &sampling, [request].into_iter(), 8)).collect();
    assert!(alone == expected);
}

/// To rounding: on CPU the shape is one for all batch sizes, and only a row's place in it differs.
#[test]
fn by_libtorch_a_sequence_depends_on_the_batch_size_by_rounding_alone() {
    tch::set_num_threads(1);
    let decoder = tiny("smollm2");
    let mut sampling = sampling(1.0, 60);
    sampling.stop = vec![3, 17];
    let expected = run_by_libtorch(&decoder, &sampling, 40, (1, 100));
    assert!(expected.iter().any(|completion| completion.stopped) && expected.len() == 40);
    for batch in [7, 33] {
        for (found, expected) in run_by_libtorch(&decoder, &sampling, 40, (batch, 100)).iter().zip(&expected) {
            assert_eq!(found.tokens, expected.tokens, "batch {batch}, {}", found.index);
            assert!((found.mean_logprob - expected.mean_logprob).abs() < 1e-5);
        }
    }
}

#[test]
fn bf16_does_not_depend_on_the_batch_size_either() {
    let checkpoint = Checkpoint::open(&golden("smollm2")).unwrap();
    let decoder = Decoder::load(&checkpoint, cpu(DtypeChoice::Bf16)).unwrap();
    if decoder.packed().unwrap().is_none() {
        return;
    }
    let expected = run(&decoder, &sampling(1.0, 40), requests(20), 16);
    for batch in [1, 7] {
        assert!(run(&decoder, &sampling(1.0, 40), requests(20), batch) == expected, "batch {batch}");
    }
}

#[test]
fn an_error_of_the_receiver_ends_the_run() {
    let decoder = tiny("smollm2");
    let mut seen = 0;
    let result = generate(&decoder, &sampling(1.0, 5), requests(100), 4, |_| {
        seen += 1;
        if seen == 3 { Err(LmError::Usage("enough".into())) } else { Ok(()) }
    });
    assert!(result.is_err_and(|error| error.to_string() == "enough"));
    assert_eq!(seen, 3);
}

#[test]
fn a_worker_that_panics_ends_the_run() {
    let decoder = tiny("smollm2");
    let Some(Packed::F32(model)) = decoder.packed().unwrap() else { return };
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Past the check that refuses it, an id of no token stops the worker that gets it; the others wait for requests.
        let wrong = Request { index: 0, prompt: vec![1 << 31], seed: 0 };
        let run = || pool::run(&model, &sampling(1.0, 5), [Ok(wrong)].into_iter(), 8, &mut |_| Ok(()));
        ended.send(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err()).unwrap();
    });
    let panicked = end.recv_timeout(std::time::Duration::from_secs(60));
    assert_eq!(panicked, Ok(true), "the run ends, by passing the panic on");
}

#[test]
fn seeds_differ() {
    let decoder = tiny("smollm2");
    let same_prompt = |seed| Request { index: seed, prompt: vec![1, 2], seed };
    let found = run(&decoder, &sampling(1.0, 30), (0..20).map(same_prompt), 8);
    let distinct: HashSet<&Vec<i64>> = found.iter().map(|completion| &completion.tokens).collect();
    assert_eq!(distinct.len(), 20);
}

#[test]
fn a_stop_token_ends_a_sequence_and_is_left_out() {
    let decoder = tiny("llama2");
    let request = || requests(1);
    let free = run(&decoder, &sampling(0.0, 10), request(), 1).remove(0);
    let mut stopping = sampling(0.0, 10);
    stopping.stop = vec![free.tokens[4]];
    let first = free.tokens.iter().position(|id| *id == free.tokens[4]).unwrap();
    let stopped = run(&decoder, &stopping, request(), 1).remove(0);
    assert_eq!(stopped.tokens, free.tokens[..first]);
    assert!(stopped.stopped);
}

#[test]
fn a_longer_prompt_makes_room() {
    let decoder = tiny("llama3");
    let request = |index: u64, length: i64| Request { index, prompt: (0..length).collect(), seed: index };
    let all = || [request(0, 2), request(1, 60), request(2, 3)].into_iter();
    let found = run(&decoder, &sampling(0.0, 20), all(), 2);
    for (completion, request) in found.iter().zip(all()) {
        assert_eq!(completion.tokens, slow_greedy(&decoder, &request.prompt, 20).0);
    }
}

#[test]
fn nothing_new_is_nothing() {
    let decoder = tiny("llama3");
    let found = run(&decoder, &sampling(1.0, 0), requests(3), 2);
    assert!(found.iter().all(|completion| completion.tokens.is_empty() && completion.mean_logprob == 0.0));
}

#[test]
fn what_cannot_be_sampled_is_refused() {
    let decoder = tiny("llama3");
    let refused = |sampling: &Sampling, prompt: Vec<i64>, batch: usize| {
        let request = Request { index: 0, prompt, seed: 0 };
        generate(&decoder, sampling, [request].into_iter(), batch, |_| Ok(())).unwrap_err().to_string()
    };
    let good = sampling(1.0, 10);
    assert!(refused(&good, vec![], 1).contains("empty prompt"));
    assert!(refused(&good, vec![64], 1).contains("vocabulary of 64"));
    assert!(refused(&good, vec![1; 120], 1).contains("context of 128"));
    assert!(refused(&good, vec![1], 0).contains("batch size"));
    for temperature in [-1.0, 1e-40, f64::INFINITY, f64::NAN] {
        assert!(refused(&Sampling { temperature, ..good.clone() }, vec![1], 1).contains("--temperature"));
    }
    assert!(refused(&Sampling { top_p: 0.0, ..good.clone() }, vec![1], 1).contains("--top-p"));
    assert!(refused(&Sampling { repetition_penalty: 0.0, ..good }, vec![1], 1).contains("--repetition-penalty"));
}

#[test]
fn a_model_that_is_wider_than_what_it_computes_inside_is_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = json(&golden("llama2").join("config.json"));
    let sizes = [("hidden_size", 256), ("intermediate_size", 32), ("num_attention_heads", 1), ("head_dim", 32)];
    for (key, size) in sizes.into_iter().chain([("num_key_value_heads", 1), ("num_hidden_layers", 1)]) {
        config[key] = size.into();
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let vocabulary = config["vocab_size"].as_i64().unwrap();
    let layer = |module: &str| format!("model.layers.0.{module}.weight");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, 256]),
        ("lm_head.weight".to_owned(), vec![vocabulary, 256]),
        ("model.norm.weight".to_owned(), vec![256]),
        (layer("input_layernorm"), vec![256]),
        (layer("post_attention_layernorm"), vec![256]),
    ];
    for (modules, shape) in [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].as_slice(), [32, 256]),
        (&["self_attn.o_proj", "mlp.down_proj"], [256, 32]),
        (&["mlp.gate_proj", "mlp.up_proj"], [32, 256]),
    ] {
        tensors.extend(modules.iter().map(|module| (layer(module), shape.to_vec())));
    }
    let made: Vec<_> = tensors.iter().zip(1..).map(|((name, shape), seed)| (name, wave(seed, shape))).collect();
    Tensor::write_safetensors(&made, folder.path().join("model.safetensors")).unwrap();
    let decoder = Decoder::load(&Checkpoint::open(folder.path()).unwrap(), cpu(DtypeChoice::F32)).unwrap();
    assert_eq!(run(&decoder, &sampling(1.0, 3), requests(64), 64).len(), 64);
}

#[test]
fn greedy_continuations_of_the_real_model_are_those_of_transformers() {
    let folder = real_model();
    let decoder = Decoder::load(&Checkpoint::open(&folder).unwrap(), cpu(DtypeChoice::F32)).unwrap();
    let rows = json(&golden("greedy.json"));
    let ids = |value: &serde_json::Value| -> Vec<i64> {
        value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
    };
    let rows = rows.as_array().unwrap();
    let prompts = rows.iter().enumerate().map(|(index, row)| Request {
        index: index as u64,
        prompt: ids(&row["prompt"]),
        seed: 0,
    });
    let found = run(&decoder, &sampling(0.0, 32), prompts, 5);
    for (completion, row) in found.iter().zip(rows) {
        assert_eq!(completion.tokens, ids(&row["continuation"]), "prompt {}", completion.index);
    }
}
