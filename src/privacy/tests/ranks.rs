//! Ranks and threads draw the same randomness without talking to each other: whoever holds the key and the context gets
//! the same coins and the same noise, however the units and the work were divided.

use privacy::histogram::VotingMechanism;
use privacy::keyed::{Context, NoiseKey};
use privacy::training::TrainingMechanism;

const STEPS: u64 = 20;

fn key() -> NoiseKey {
    NoiseKey::new([11; 32])
}

fn context() -> Context {
    Context::new("train").field("run", b"r")
}

fn mechanism() -> TrainingMechanism {
    TrainingMechanism::new(0.3, 1.1, STEPS, 0.5, 100.0).unwrap()
}

fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// Units that join each step, as ranks that hold these parts of the list find them together.
fn included(parts: &[&[String]]) -> Vec<Vec<String>> {
    let of_step = |step| {
        let of_part = |part: &&[String]| {
            // A rank makes everything it needs from key and context.
            let sampler = mechanism().sampler(&key(), &context(), step);
            part.iter().filter(|unit| sampler.includes(unit)).cloned().collect::<Vec<_>>()
        };
        let mut units: Vec<String> = parts.iter().flat_map(of_part).collect();
        units.sort();
        units
    };
    (0..STEPS).map(of_step).collect()
}

#[test]
fn the_same_units_join_however_the_list_is_divided() {
    let units: Vec<String> = (0..500).map(|i| format!("unit-{i:03}")).collect();
    let whole = included(&[&units]);
    assert!(whole.iter().all(|step| !step.is_empty() && step.len() < units.len()));
    for ranks in [2, 3, 7, 500] {
        let parts: Vec<&[String]> = units.chunks(units.len().div_ceil(ranks)).collect();
        assert_eq!(included(&parts), whole, "{ranks} ranks");
        let backwards: Vec<&[String]> = parts.into_iter().rev().collect();
        assert_eq!(included(&backwards), whole, "{ranks} ranks, the last first");
    }
    for threads in [1, 4] {
        assert_eq!(with_threads(threads, || included(&[&units])), whole, "{threads} threads");
    }
}

#[test]
fn every_rank_adds_the_same_noise() {
    let release = |threads| {
        with_threads(threads, || {
            let mechanism = mechanism();
            let sum = mechanism.empty_sum(&[100_000, 17]);
            mechanism.release(&key(), &context(), 3, sum).unwrap().value().clone()
        })
    };
    let one = release(1);
    assert!(one == release(2) && one == release(5));
    let votes: Vec<(String, usize)> = (0..300).map(|i| (format!("unit-{i}"), i % 40)).collect();
    let vote = |threads| {
        let mechanism = VotingMechanism::new(10.0).unwrap();
        with_threads(threads, || mechanism.release(&key(), &context(), 40, &votes).value().clone())
    };
    assert_eq!(vote(1), vote(4));
}
