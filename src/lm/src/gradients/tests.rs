use tch::{Kind, Tensor};

use super::*;
use crate::adapter::{LoraConfig, Target};
use crate::checkpoint::Checkpoint;
use crate::decoder::tests::{SHAPES, adapter, cpu, golden, largest_difference, real_model, tiny, wave};
use crate::device::{Compute, DeviceChoice, DtypeChoice};

const BLOCK: usize = 32;

/// Examples of uneven lengths and prefixes; one has a single label, one has none.
fn examples() -> Vec<Example> {
    let shapes = [(7, 1), (19, 4), (3, 2), (12, 12), (1, 1), (30, 1)];
    let example = |(index, (length, prefix)): (usize, &(usize, usize))| Example {
        tokens: (0..*length).map(|place| ((index * 37 + place * place * 11 + place * 5) % 64) as i64).collect(),
        prefix: *prefix,
        dropout_seed: index as u64,
    };
    shapes.iter().enumerate().map(example).collect()
}

/// Loss and gradients of one example by autograd through the plain forward pass.
fn by_autograd(decoder: &Decoder, lora: &Lora, example: &Example) -> (f64, Vec<Tensor>) {
    let tensors: Vec<(String, Tensor)> =
        lora.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.copy().set_requires_grad(true))).collect();
    let leaves: Vec<Tensor> = tensors.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    let lora = Lora { config: lora.config.clone(), tensors };
    let loss = plain_loss(decoder, &lora, example);
    let Some(loss) = loss else {
        return (0.0, leaves.iter().map(Tensor::zeros_like).collect());
    };
    (loss.double_value(&[]), Tensor::run_backward(&[loss], &leaves, false, false))
}

fn plain_loss(decoder: &Decoder, lora: &Lora, example: &Example) -> Option<Tensor> {
    let first = example.prefix.max(1);
    if first >= example.tokens.len() {
        return None;
    }
    let ids = Tensor::from_slice(&example.tokens).unsqueeze(0);
    let hidden = decoder.hidden(&ids, Some(lora)).unwrap().squeeze_dim(0);
    let logits = hidden.linear(&decoder.output, None::<&Tensor>);
    let count = (example.tokens.len() - first) as i64;
    let predicted = logits.narrow(0, first as i64 - 1, count).log_softmax(-1, Kind::Float);
    let labels = Tensor::from_slice(&example.tokens[first..]).unsqueeze(1);
    Some(predicted.gather(1, &labels, false).neg().sum(Kind::Float) / BLOCK as f64)
}

#[test]
fn gradients_are_those_of_autograd_one_example_at_a_time() {
    for name in SHAPES {
        let decoder = tiny(name);
        let lora = adapter(&decoder, 0.0);
        let examples = examples();
        let found = example_gradients(&decoder, &lora, &examples, BLOCK).unwrap();
        for (index, example) in examples.iter().enumerate() {
            let (loss, gradients) = by_autograd(&decoder, &lora, example);
            let row = index as i64;
            assert!((found.losses.double_value(&[row]) - loss).abs() < 1e-5, "{name}, example {index}");
            for ((tensor, gradient), expected) in lora.tensors.iter().zip(&found.gradients).zip(&gradients) {
                let difference = largest_difference(&gradient.get(row), expected);
                let scale = expected.abs().max().double_value(&[]);
                assert!(
                    difference <= 1e-6 + 1e-4 * scale,
                    "{name}, example {index}, {}: {difference} of {scale}",
                    tensor.0
                );
            }
        }
    }
}

#[test]
fn a_merged_adapter_is_in_the_gradients_that_follow() {
    let (mut used, mut unused) = (tiny("smollm2"), tiny("smollm2"));
    let lora = adapter(&used, 0.0);
    // Packs the weights, of which nothing may be left.
    example_gradients(&used, &lora, &examples(), BLOCK).unwrap();
    used.merge(&lora).unwrap();
    unused.merge(&lora).unwrap();
    let found = example_gradients(&used, &lora, &examples(), BLOCK).unwrap();
    let expected = example_gradients(&unused, &lora, &examples(), BLOCK).unwrap();
    assert_eq!(found.losses, expected.losses);
    assert_eq!(found.gradients, expected.gradients);
}

#[test]
fn summed_gradients_are_the_sum_of_all() {
    let decoder = tiny("llama3");
    let lora = adapter(&decoder, 0.2);
    let each = example_gradients(&decoder, &lora, &examples(), BLOCK).unwrap().gradients;
    let sums = summed_gradients(&decoder, &lora, &examples(), BLOCK).unwrap();
    for (sum, each) in sums.iter().zip(each) {
        let expected = each.sum_dim_intlist(0, false, Kind::Double);
        let scale = expected.abs().max().double_value(&[]);
        assert!(largest_difference(&sum.to_kind(Kind::Double), &expected) <= 1e-6 + 1e-5 * scale);
    }
    assert_eq!(sums.len(), lora.tensors.len());
    for (sum, (_, tensor)) in summed_gradients(&decoder, &lora, &[], BLOCK).unwrap().iter().zip(&lora.tensors) {
        assert_eq!(sum.size(), tensor.size());
        assert_eq!(sum.abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let decoder = tiny("smollm2");
    let mut lora = adapter(&decoder, 0.0);
    let example = examples().remove(1);
    let found = example_gradients(&decoder, &lora, std::slice::from_ref(&example), BLOCK).unwrap();
    let loss = |lora: &Lora| -> f64 {
        let (losses, _) = token_losses(&decoder, lora, std::slice::from_ref(&example)).unwrap();
        losses[0] / BLOCK as f64
    };
    for index in 0..lora.tensors.len() {
        // One direction per tensor: float32 leaves no digits for single elements.
        let start = lora.tensors[index].1.copy();
        let direction = wave(1000 + index, &start.size());
        let step = 2e-3;
        lora.tensors[index].1 = &start + &direction * step;
        let above = loss(&lora);
        lora.tensors[index].1 = &start - &direction * step;
        let below = loss(&lora);
        lora.tensors[index].1 = start;
        let expected = (above - below) / (2.0 * step);
        let along = (found.gradients[index].get(0) * &direction).sum(Kind::Double).double_value(&[]);
        assert!(
            (along - expected).abs() < 1e-3 + 0.01 * expected.abs(),
            "{}: {along}, {expected}",
            lora.tensors[index].0
        );
    }
}

/// The first `count` examples alone and among all: the same bits.
fn check_company(decoder: &Decoder, lora: &Lora, examples: &[Example], count: usize) {
    let bits = |found: &ExampleGradients, row: usize| -> Vec<u32> {
        let rows = found.gradients.iter().chain([&found.losses]).map(|tensor| tensor.get(row as i64).flatten(0, -1));
        rows.flat_map(|row| Vec::<f32>::try_from(row).unwrap()).map(f32::to_bits).collect()
    };
    let together = example_gradients(decoder, lora, examples, BLOCK).unwrap();
    for (row, example) in examples.iter().enumerate().take(count) {
        let alone = example_gradients(decoder, lora, std::slice::from_ref(example), BLOCK).unwrap();
        assert!(bits(&together, row) == bits(&alone, 0), "{:?}, example {row}", decoder.compute.kind);
    }
}

#[test]
fn an_example_does_not_depend_on_its_company() {
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16] {
        let decoder = Decoder::load(&Checkpoint::open(&golden("llama3")).unwrap(), cpu(dtype)).unwrap();
        for dropout in [0.0, 0.3] {
            check_company(&decoder, &adapter(&decoder, dropout), &examples(), examples().len());
        }
    }
}

#[test]
fn nor_where_padding_goes_beyond_the_context() {
    let mut decoder = tiny("llama3");
    // No multiple of what lengths are padded to.
    decoder.config.max_positions = 30;
    check_company(&decoder, &adapter(&decoder, 0.0), &examples(), examples().len());
}

#[test]
fn nor_does_one_of_a_real_model() {
    let example = |index: usize| Example {
        tokens: (0..5 + index * 37 % 90).map(|place| ((index * 7919 + place * place * 31) % 40_000) as i64).collect(),
        prefix: 1 + index % 4,
        dropout_seed: 0,
    };
    let examples: Vec<Example> = (0..20).map(example).collect();
    for dtype in [DtypeChoice::F32, DtypeChoice::Auto] {
        let decoder = Decoder::load(&Checkpoint::open(&real_model()).unwrap(), cpu(dtype)).unwrap();
        check_company(&decoder, &adapter(&decoder, 0.0), &examples, 6);
    }
}

#[test]
fn dropout_changes_with_its_seed_alone() {
    let decoder = tiny("llama3");
    let lora = adapter(&decoder, 0.5);
    let loss = |seed: u64| {
        let mut example = examples().remove(1);
        example.dropout_seed = seed;
        example_gradients(&decoder, &lora, &[example], BLOCK).unwrap().losses.double_value(&[0])
    };
    assert_eq!(loss(1), loss(1));
    assert_ne!(loss(1), loss(2));
}

#[test]
fn recomputing_a_layer_changes_nothing() {
    let decoder = tiny("smollm2");
    let lora = adapter(&decoder, 0.2);
    let examples = examples();
    tch::no_grad(|| {
        let batch = Batch::new(&decoder, &examples, Padding::Fours).unwrap();
        let adapters = adapters(&decoder, &lora).unwrap();
        let masks = dropout::Masks::new(lora.config.dropout, &decoder, &examples, &batch);
        let run = |keep| {
            let tape = backward::Tape::forward(&decoder, &adapters, &batch, &masks, keep).unwrap();
            let (_, gradient) = loss::with_gradient(&decoder, tape.output(), &batch).unwrap();
            tape.backward(&lora, gradient, 1.0).unwrap()
        };
        for (kept, recomputed) in run(true).iter().zip(&run(false)) {
            assert_eq!(largest_difference(kept, recomputed), 0.0);
        }
    });
}

#[test]
fn bf16_points_the_same_way() {
    if !crate::device::cpu_multiplies_bf16() {
        return;
    }
    let wide = tiny("smollm2");
    let narrow = Decoder::load(&Checkpoint::open(&golden("smollm2")).unwrap(), cpu(DtypeChoice::Bf16)).unwrap();
    let lora = adapter(&wide, 0.0);
    let examples = examples();
    let flat = |decoder: &Decoder| {
        let found = example_gradients(decoder, &lora, &examples, BLOCK).unwrap().gradients;
        Tensor::cat(&found.iter().map(|gradient| gradient.flatten(1, -1)).collect::<Vec<_>>(), 1)
    };
    let (expected, found) = (flat(&wide), flat(&narrow));
    for (index, example) in examples.iter().enumerate() {
        if labels(example).is_empty() {
            continue;
        }
        let (expected, found) = (expected.get(index as i64), found.get(index as i64));
        let cosine = Tensor::cosine_similarity(&found, &expected, 0, 1e-12).double_value(&[]);
        assert!(cosine > 0.995, "example {index}: {cosine}");
    }
}

#[test]
fn losses_and_label_counts_agree() {
    let decoder = tiny("qwen2");
    let lora = adapter(&decoder, 0.0);
    let examples = examples();
    let (losses, counts) = token_losses(&decoder, &lora, &examples).unwrap();
    let found = example_gradients(&decoder, &lora, &examples, BLOCK).unwrap();
    for (index, loss) in losses.iter().enumerate() {
        assert!((loss / BLOCK as f64 - found.losses.double_value(&[index as i64])).abs() < 1e-5);
    }
    assert_eq!(counts, [6, 15, 1, 0, 0, 29]);
}

#[test]
fn no_examples_give_empty_tensors() {
    let decoder = tiny("qwen2");
    let lora = adapter(&decoder, 0.0);
    let found = example_gradients(&decoder, &lora, &[], BLOCK).unwrap();
    assert_eq!(found.losses.size(), [0]);
    assert_eq!(found.gradients[0].size(), [0, 3, 32]);
}

#[test]
fn what_the_model_cannot_read_is_an_error() {
    let decoder = tiny("qwen2");
    let lora = adapter(&decoder, 0.0);
    let example = |tokens: Vec<i64>| Example { tokens, prefix: 1, dropout_seed: 0 };
    for tokens in [vec![1, 64], vec![1, -1], vec![1; 129]] {
        assert!(example_gradients(&decoder, &lora, &[example(tokens)], BLOCK).is_err());
    }
    let other = adapter(&tiny("smollm2"), 0.0);
    let error = example_gradients(&decoder, &other, &[example(vec![1, 2])], BLOCK).err().unwrap();
    assert!(error.to_string().contains("another model"), "{error}");
}

#[test]
fn micro_batches_hold_every_example_once() {
    let lengths = [5, 100, 7, 7, 64, 1, 30, 200];
    for tokens in [1, 64, 130, 1000] {
        let batches = micro_batches(&lengths, tokens);
        let mut all: Vec<usize> = batches.iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        for batch in &batches {
            let longest = batch.iter().map(|&index| lengths[index]).max().unwrap();
            assert!(batch.len() == 1 || batch.len() * longest <= tokens, "{tokens}: {batch:?}");
        }
    }
}

/// Where there is a GPU: its kernels are others, which no CPU runs.
#[test]
fn a_gpu_gives_the_gradients_of_the_cpu() {
    let Ok(compute) = Compute::resolve(DeviceChoice::Cuda, DtypeChoice::Bf16) else { return };
    // Every example twice: lengths that several have, and lengths that one has.
    let examples: Vec<Example> = examples().into_iter().chain(examples().into_iter().take(3)).collect();
    // Of ranks whose rows begin at 16 bytes, and of others.
    for (name, rank) in SHAPES.into_iter().flat_map(|name| [(name, 3), (name, 8)]) {
        let plain = tiny(name);
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let gpu = Decoder::load(&checkpoint, compute).unwrap();
        let config = LoraConfig { rank, alpha: 6.0, targets: Target::ALL.to_vec(), dropout: 0.0 };
        let mut lora = Lora::new(config, &plain.config, tch::Device::Cpu, 5).unwrap();
        for (index, (_, tensor)) in lora.tensors.iter_mut().enumerate() {
            *tensor = wave(index, &tensor.size()) * 0.2;
        }
        let plain_bf16 = Decoder::load(&checkpoint, cpu(DtypeChoice::Bf16)).unwrap();
        let expected = example_gradients(&plain, &lora, &examples, BLOCK).unwrap();
        let bf16 = example_gradients(&plain_bf16, &lora, &examples, BLOCK).unwrap();
        for (_, tensor) in &mut lora.tensors {
            *tensor = tensor.to_device(compute.device);
        }
        let found = example_gradients(&gpu, &lora, &examples, BLOCK).unwrap();
        let sums = summed_gradients(&gpu, &lora, &examples, BLOCK).unwrap();
        let again = example_gradients(&gpu, &lora, &examples, BLOCK).unwrap();
        assert_eq!(found.gradients, again.gradients, "{name}, rank {rank}: not the same twice");
        // As near as bf16 comes on the CPU, give or take other places of rounding.
        let near = |found: &Tensor, bf16: &Tensor, expected: &Tensor, what: &str| {
            let off = |found: &Tensor| (found.to_device(tch::Device::Cpu) - expected).norm().double_value(&[]);
            let (found, bf16, size) = (off(found), off(bf16), expected.norm().double_value(&[]));
            assert!(
                found < 2.0 * bf16 + 0.01 * size + 1e-5,
                "{name}, rank {rank}, {what}: {found}, CPU {bf16}, of {size}"
            );
        };
        near(&found.losses, &bf16.losses, &expected.losses, "losses");
        for (index, (tensor, _)) in lora.tensors.iter().enumerate() {
            let of = |all: &ExampleGradients| all.gradients[index].shallow_clone();
            near(&of(&found), &of(&bf16), &of(&expected), tensor);
            let sum = |all: &ExampleGradients| of(all).sum_dim_intlist(0i64, false, Kind::Float);
            near(&sums[index], &sum(&bf16), &sum(&expected), tensor);
        }
    }
}
