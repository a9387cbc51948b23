//! Batched sampling with a KV cache: finished sequences leave, new ones take their places.
//!
//! A sequence depends on its prompt, its seed and the sampling parameters, never on its company. Its random numbers are
//! its own, and on a CPU with AVX2 its logits are computed by [`native`], which sums every row in the same order
//! whatever rows are beside it: on one machine a sequence is the same bit for bit for every batch size and number of
//! threads. Elsewhere, on CUDA above all, [`cache`] computes with libtorch: there, the shape of the batch (which follows
//! the batch size and what memory there is) and a row's place in it may show in the last bits of a logit. Independence of
//! the batch size then holds to rounding, as it does of the machine and of the precision: where two tokens are nearly
//! equal, a sequence may take another turn.

mod cache;
pub(crate) mod native;
mod on_device;
mod pool;
mod room;
mod sampler;

use std::collections::HashSet;
use std::ops::RangeInclusive;

use tch::{Device, Kind, Tensor};

use crate::LmError;
use crate::decoder::{Decoder, Packed};
use cache::Slots;
use sampler::Sampler;

/// Sampling parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// 1 keeps everything.
    pub top_p: f64,
    /// 0 keeps everything.
    pub top_k: usize,
    /// 1 does nothing.
    pub repetition_penalty: f64,
    /// Longest continuation.
    pub max_new_tokens: usize,
    /// Ids that end a sequence.
    pub stop: Vec<i64>,
}

/// One thing to sample: a prompt and its own seed.
#[derive(Clone, Debug)]
pub struct Request {
    /// Caller's number.
    pub index: u64,
    /// Prompt ids.
    pub prompt: Vec<i64>,
    /// Seed of this sequence: the result does not depend on who shares the batch.
    pub seed: u64,
}

/// A finished sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Caller's number.
    pub index: u64,
    /// New ids, stop id left out.
    pub tokens: Vec<i64>,
    /// True when a stop id ended it, false for the length limit.
    pub stopped: bool,
    /// Mean log-probability of the sampled ids (the stop id too) under the model's own distribution: before penalty,
    /// temperature and truncation. 0 where nothing was sampled.
    pub mean_logprob: f32,
}

/// Sequences to sample at a time where nobody says.
pub fn usual_batch(decoder: &Decoder) -> usize {
    room::usual(decoder.compute.device)
}

/// Samples every request with at most `batch` sequences at a time, calling `done` as each finishes.
///
/// Fewer at a time where their caches would not fit into memory, by the length of the first.
pub fn generate(
    decoder: &Decoder,
    sampling: &Sampling,
    mut requests: impl Iterator<Item = Request>,
    batch: usize,
    mut done: impl FnMut(Completion) -> Result<(), LmError>,
) -> Result<(), LmError> {
    draw(decoder, sampling, &mut requests, batch, &mut done)
}

/// [`generate`] for any caller. Generic code is compiled where it is called, with the caller's optimisation; the inner loops
/// must have this crate's.
fn draw(
    decoder: &Decoder,
    sampling: &Sampling,
    requests: &mut dyn Iterator<Item = Request>,
    batch: usize,
    mut done: &mut dyn FnMut(Completion) -> Result<(), LmError>,
) -> Result<(), LmError> {
    sampling.check()?;
    if batch == 0 {
        return Err(LmError::Usage("batch size 0\nhelp: give a --batch-size of at least 1".into()));
    }
    let mut requests = requests.map(|request| check(decoder, sampling, request)).fuse();
    let Some(first) = requests.next().transpose()? else { return Ok(()) };
    let packed = decoder.packed()?;
    let copies = 1 + usize::from(packed.is_some());
    let fit = room::sequences(decoder, copies, first.prompt.len() + sampling.max_new_tokens);
    let mut requests = std::iter::once(Ok(first)).chain(requests);
    match packed {
        Some(Packed::Bf16(weights)) => pool::run(&weights, sampling, requests, batch.min(fit), &mut done),
        Some(Packed::F32(weights)) => pool::run(&weights, sampling, requests, batch.min(fit), &mut done),
        None => by_libtorch(decoder, sampling, &mut requests, (batch, fit), &mut done),
    }
}

/// Samples with libtorch: the batch size, and how many sequences fit into memory.
fn by_libtorch(
    decoder: &Decoder,
    sampling: &Sampling,
    requests: &mut impl Iterator<Item = Result<Request, LmError>>,
    (batch, fit): (usize, usize),
    done: &mut impl FnMut(Completion) -> Result<(), LmError>,
) -> Result<(), LmError> {
    tch::no_grad(|| {
        let slots = Slots::new(decoder, batch, fit);
        let mut live = Vec::new();
        live.resize_with(batch.min(slots.count()), || None);
        let mut run = Run { decoder, sampling, slots, live };
        loop {
            run.fill(requests, done)?;
            if run.live.iter().all(Option::is_none) {
                return Ok(());
            }
            run.step(done)?;
        }
    })
}

/// The request, or what is wrong with it.
fn check(decoder: &Decoder, sampling: &Sampling, request: Request) -> Result<Request, LmError> {
    decoder.check_tokens(&request.prompt)?;
    if request.prompt.is_empty() {
        return Err(LmError::Usage("an empty prompt\nhelp: give a --template that begins with a token".into()));
    }
    let limit = decoder.config.max_positions;
    if request.prompt.len().saturating_add(sampling.max_new_tokens) > limit as usize {
        return Err(LmError::Usage(format!(
            "a prompt of {} tokens and {} new ones exceed the model's context of {limit}\nhelp: lower --max-new-tokens",
            request.prompt.len(),
            sampling.max_new_tokens,
        )));
    }
    Ok(request)
}

/// Temperatures above 0 that can be sampled at: their inverse is a number in float32 that logits can be multiplied by.
pub const TEMPERATURES: RangeInclusive<f64> = 1e-6..=1e6;

impl Sampling {
    fn check(&self) -> Result<(), LmError> {
        let refuse = |what: &str| Err(LmError::Usage(format!("sampling: {what}")));
        if self.temperature != 0.0 && !TEMPERATURES.contains(&self.temperature) {
            return refuse("--temperature must be 0 (greedy) or a number from 1e-6 to 1e6");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("--top-p must be greater than 0 and at most 1");
        }
        if !self.repetition_penalty.is_finite() || self.repetition_penalty <= 0.0 {
            return refuse("--repetition-penalty must be a positive number; 1 does nothing");
        }
        Ok(())
    }
}

struct Run<'a> {
    decoder: &'a Decoder,
    sampling: &'a Sampling,
    slots: Slots<'a>,
    live: Vec<Option<Sequence>>,
}

/// A sequence that is being sampled.
struct Sequence {
    index: u64,
    sampler: Sampler,
    tokens: Vec<i64>,
    logprobs: f64,
    /// Prompt ids, which the repetition penalty counts as seen.
    seen: HashSet<i64>,
}

/// A sequence on its way from its slot and back, and whether its last token ended it, by a stop id or not.
struct Moved {
    slot: usize,
    sequence: Sequence,
    ended: Option<bool>,
}

impl Run<'_> {
    /// Gives free slots to waiting requests, and samples each one's first token.
    fn fill(
        &mut self,
        requests: &mut impl Iterator<Item = Result<Request, LmError>>,
        done: &mut impl FnMut(Completion) -> Result<(), LmError>,
    ) -> Result<(), LmError> {
        loop {
            let free = (0..self.live.len()).filter(|&slot| self.live[slot].is_none());
            let mut started = Vec::new();
            for slot in free {
                let Some(request) = self.next(requests, done)? else { break };
                started.push((slot, request));
            }
            if started.is_empty() {
                return Ok(());
            }
            for alike in started.chunk_by(|(_, one), (_, other)| one.prompt == other.prompt) {
                self.start(alike, done)?;
            }
        }
    }

    /// The next request that wants a token at all.
    fn next(
        &self,
        requests: &mut impl Iterator<Item = Result<Request, LmError>>,
        done: &mut impl FnMut(Completion) -> Result<(), LmError>,
    ) -> Result<Option<Request>, LmError> {
        loop {
            let request = requests.next().transpose()?;
            match request {
                Some(request) if self.sampling.max_new_tokens == 0 => {
                    done(Sequence::new(&request, self.sampling).finish(false))?;
                }
                found => return Ok(found),
            }
        }
    }

    /// Puts requests of one prompt into their slots.
    fn start(
        &mut self,
        requests: &[(usize, Request)],
        done: &mut impl FnMut(Completion) -> Result<(), LmError>,
    ) -> Result<(), LmError> {
        let slots: Vec<usize> = requests.iter().map(|(slot, _)| *slot).collect();
        let prompt = &requests[0].1.prompt;
        let logits = self.slots.start(&slots, prompt, prompt.len() + self.sampling.max_new_tokens)?;
        let logits = logits.f_expand([slots.len() as i64, -1], false)?;
        let moved = requests.iter().map(|(slot, request)| Moved {
            slot: *slot,
            sequence: Sequence::new(request, self.sampling),
            ended: None,
        });
        self.advance(moved.collect(), &logits, done)
    }

    /// One token for every live sequence.
    fn step(&mut self, done: &mut impl FnMut(Completion) -> Result<(), LmError>) -> Result<(), LmError> {
        let last = |slot: &Option<Sequence>| slot.as_ref().and_then(|sequence| sequence.tokens.last().copied());
        let feed: Vec<(usize, i64)> =
            self.live.iter().enumerate().filter_map(|(slot, live)| Some((slot, last(live)?))).collect();
        let logits = self.slots.step(&feed)?;
        let take = |&(slot, _): &(usize, i64)| Some(Moved { slot, sequence: self.live[slot].take()?, ended: None });
        let moved = feed.iter().filter_map(take).collect();
        self.advance(moved, &logits, done)
    }

    /// Samples a token for each from its row of `logits`, and puts those back that go on.
    fn advance(
        &mut self,
        mut moved: Vec<Moved>,
        logits: &Tensor,
        done: &mut impl FnMut(Completion) -> Result<(), LmError>,
    ) -> Result<(), LmError> {
        if on_device::chooses(logits.device(), self.sampling) {
            let mut samplers: Vec<_> = moved.iter_mut().map(|one| &mut one.sequence.sampler).collect();
            let chosen = on_device::choose(logits, &mut samplers, self.sampling)?;
            for (one, (token, logprob)) in moved.iter_mut().zip(chosen) {
                one.ended = one.sequence.append(token, logprob, self.sampling);
            }
        } else {
            let width = self.decoder.config.vocab_size as usize;
            advance_all(&mut moved, &rows(logits)?, width, self.sampling);
        }
        for Moved { slot, sequence, ended } in moved {
            self.place(slot, sequence, ended, done)?;
        }
        Ok(())
    }

    fn place(
        &mut self,
        slot: usize,
        sequence: Sequence,
        ended: Option<bool>,
        done: &mut impl FnMut(Completion) -> Result<(), LmError>,
    ) -> Result<(), LmError> {
        match ended {
            Some(stopped) => done(sequence.finish(stopped)),
            None => {
                self.live[slot] = Some(sequence);
                Ok(())
            }
        }
    }
}

impl Sequence {
    fn new(request: &Request, sampling: &Sampling) -> Self {
        let penalised = sampling.repetition_penalty != 1.0;
        let seen = if penalised { request.prompt.iter().copied().collect() } else { HashSet::new() };
        Self { index: request.index, sampler: Sampler::new(request.seed), tokens: Vec::new(), logprobs: 0.0, seen }
    }

    /// Samples one token from its logits; `Some(stopped)` when that ends the sequence.
    fn advance(&mut self, logits: &[f32], sampling: &Sampling) -> Option<bool> {
        let (token, logprob) = self.sampler.choose(logits, sampling, &self.seen);
        self.append(token, logprob, sampling)
    }

    /// Takes the token that was sampled; `Some(stopped)` when that ends the sequence.
    fn append(&mut self, token: i64, logprob: f32, sampling: &Sampling) -> Option<bool> {
        self.logprobs += f64::from(logprob);
        if sampling.stop.contains(&token) {
            return Some(true);
        }
        self.tokens.push(token);
        if sampling.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
        (self.tokens.len() >= sampling.max_new_tokens).then_some(false)
    }

    fn finish(self, stopped: bool) -> Completion {
        let sampled = self.tokens.len() + usize::from(stopped);
        let mean_logprob = if sampled == 0 { 0.0 } else { (self.logprobs / sampled as f64) as f32 };
        Completion { index: self.index, tokens: self.tokens, stopped, mean_logprob }
    }
}

/// Samples for all sequences, on two or more threads where there are enough to pay for them.
fn advance_all(moved: &mut [Moved], values: &[f32], width: usize, sampling: &Sampling) {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get()).min(16);
    let share = moved.len().div_ceil(threads).max(4);
    let advance = |part: &mut [Moved], rows: &[f32]| {
        for (one, row) in part.iter_mut().zip(rows.chunks_exact(width)) {
            one.ended = one.sequence.advance(row, sampling);
        }
    };
    if moved.len() <= share {
        return advance(moved, values);
    }
    std::thread::scope(|scope| {
        for (part, rows) in moved.chunks_mut(share).zip(values.chunks(share * width)) {
            scope.spawn(move || advance(part, rows));
        }
    });
}

/// The values of logits, in order of rows.
fn rows(logits: &Tensor) -> Result<Vec<f32>, LmError> {
    let flat = logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?.f_reshape([-1i64])?;
    Ok(Vec::<f32>::try_from(flat)?)
}

#[cfg(test)]
mod tests;
