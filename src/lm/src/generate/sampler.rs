//! Choosing one token from a row of logits.
//!
//! Order as in transformers: repetition penalty, temperature, top-k, top-p. The vocabulary is never sorted. Where most of
//! the mass is kept, a token of the whole distribution is drawn, and drawn again for as long as it is none of the nucleus,
//! which the mass of the tokens above it tells: what is kept is then distributed as the nucleus is. Otherwise the tokens
//! within a few nats of the best one are gathered, those that are kept are selected from them, and only where there are
//! too few is the net thrown wider.

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

use super::Sampling;
use crate::kernels;

/// Below this top-p most draws of the whole distribution would be in vain.
const LEAST_TOP_P: f64 = 0.5;
/// How far below the best token, in nats, the first net reaches; what lies beyond is one token in 10⁴ of the mass each.
const REACH: f32 = 9.0;

/// Whether to draw until a token is of the nucleus: a draw is with probability top-p at least.
pub(super) fn draws_until_kept(sampling: &Sampling) -> bool {
    sampling.top_k == 0 && sampling.top_p >= LEAST_TOP_P
}

/// One sequence's own source of choices, of 53 bits each.
pub(super) struct Sampler {
    stream: ChaCha8Rng,
}

impl Sampler {
    pub(super) fn new(seed: u64) -> Self {
        Self { stream: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// `(token, its log-probability in the model's own distribution)`.
    pub(super) fn choose(&mut self, logits: &[f32], sampling: &Sampling, seen: &HashSet<i64>) -> (i64, f32) {
        let own = Row::new(logits, 1.0);
        let penalise = || penalise(logits, sampling.repetition_penalty as f32, seen);
        let penalised = (sampling.repetition_penalty != 1.0 && !seen.is_empty()).then(penalise);
        let scores = penalised.as_deref().unwrap_or(logits);
        let token = match sampling.temperature {
            0.0 => best(scores),
            // What is drawn from is the model's own distribution.
            1.0 if penalised.is_none() => self.draw(&own, sampling),
            temperature => self.draw(&Row::new(scores, (1.0 / temperature) as f32), sampling),
        };
        (token as i64, (f64::from(logits[token] - own.best) - own.total.ln()) as f32)
    }

    /// The next choice, in [0, 1).
    pub(super) fn uniform(&mut self) -> f64 {
        (self.stream.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A token of what `sampling` keeps of a row.
    fn draw(&mut self, row: &Row<'_>, sampling: &Sampling) -> usize {
        if !draws_until_kept(sampling) {
            return row.of_kept(self.uniform(), sampling);
        }
        loop {
            let token = row.of_all(self.uniform());
            if row.is_of_nucleus(token, sampling.top_p) {
                return token;
            }
        }
    }
}

/// A distribution: the softmax of `scores` · `inverse`.
struct Row<'a> {
    scores: &'a [f32],
    /// 1 / temperature.
    inverse: f32,
    /// The highest of the scores, times `inverse`.
    best: f32,
    /// What the tokens of each [`kernels::PART`] weigh, the best one 1.
    parts: Vec<f32>,
    /// What all tokens weigh.
    total: f64,
}

impl<'a> Row<'a> {
    fn new(scores: &'a [f32], inverse: f32) -> Self {
        let mut parts = vec![0.0; scores.len().div_ceil(kernels::PART)];
        let mut best = 0.0;
        kernels::mass(scores, inverse, &mut best, &mut parts);
        let total = parts.iter().copied().map(f64::from).sum();
        Self { scores, inverse, best, parts, total }
    }

    /// What a token weighs.
    fn weight(&self, token: usize) -> f64 {
        f64::from(kernels::exp(self.scores[token] * self.inverse - self.best))
    }

    /// The token at share `uniform` of the whole mass.
    fn of_all(&self, uniform: f64) -> usize {
        let (part, left) = at_share(self.parts.iter().copied().map(f64::from), uniform * self.total);
        let first = part * kernels::PART;
        let tokens = first..self.scores.len().min(first + kernels::PART);
        first + at_share(tokens.map(|token| self.weight(token)), left).0
    }

    /// Whether the tokens before one, of equals those of lower ids, do not make up the nucleus.
    ///
    /// What is not a number counts as kept: the log-probability tells.
    fn is_of_nucleus(&self, token: usize, top_p: f64) -> bool {
        let own = self.scores[token] * self.inverse;
        let (lower, higher) = self.scores.split_at(token);
        let above = |scores: &[f32], floor: f32| {
            let mut mass = 0.0;
            kernels::mass_above(scores, self.inverse, floor, self.best, &mut mass);
            f64::from(mass)
        };
        let reached = above(lower, own.next_down()) + above(higher, own) >= top_p * self.total;
        top_p >= 1.0 || !reached
    }

    /// The token at share `uniform` of what is kept.
    fn of_kept(&self, uniform: f64, sampling: &Sampling) -> usize {
        let mut reach = REACH;
        loop {
            let mut near = gather(self.scores, self.inverse, self.best - reach);
            let complete = near.len() == self.scores.len() || reach.is_infinite();
            if let Some(kept) = self.truncate(&mut near, sampling, complete) {
                let kept = &near[..kept];
                let each = kept.iter().map(|one| weight(std::slice::from_ref(one), self.best));
                let place = at_share(each, uniform * weight(kept, self.best)).0;
                return kept.get(place).map_or(0, |(_, id)| *id);
            }
            reach = if reach > 4.0 * REACH { f32::INFINITY } else { 2.0 * reach };
        }
    }

    /// Moves the candidates that are kept to the front, in no order, and counts them; `None` where a wider net is needed to
    /// know.
    fn truncate(&self, near: &mut [Scored], sampling: &Sampling, complete: bool) -> Option<usize> {
        let (mut count, mut total) = (near.len(), self.total);
        if sampling.top_k > 0 {
            if near.len() < sampling.top_k && !complete {
                return None;
            }
            count = count.min(sampling.top_k);
            highest(near, count);
            total = weight(&near[..count], self.best);
        }
        if sampling.top_p >= 1.0 {
            return Some(count);
        }
        let kept = nucleus(&mut near[..count], sampling.top_p * total, self.best);
        kept.or((complete || sampling.top_k > 0).then_some(count))
    }
}

/// The place of the first whose sum with those before it is beyond `share`, or of the last; and what of the share those
/// before it left.
fn at_share(weights: impl Iterator<Item = f64>, share: f64) -> (usize, f64) {
    let (mut place, mut left) = (0, share);
    let mut weights = weights.peekable();
    while let Some(weight) = weights.next() {
        if left < weight || weights.peek().is_none() {
            break;
        }
        left -= weight;
        place += 1;
    }
    (place, left)
}

/// A candidate: its score divided by the temperature, and its id.
type Scored = (f32, usize);

/// Candidates whose score is at least `floor`.
fn gather(scores: &[f32], inverse: f32, floor: f32) -> Vec<Scored> {
    let mut near = Vec::with_capacity(256);
    for (first, block) in scores.chunks(64).enumerate() {
        // Nearly every block has none; the comparison of a whole block, not stopping at the first, is a few instructions.
        if block.iter().fold(false, |any, score| any | (score * inverse >= floor)) {
            let hits = block.iter().enumerate().filter(|(_, score)| **score * inverse >= floor);
            near.extend(hits.map(|(offset, score)| (score * inverse, first * 64 + offset)));
        }
    }
    near
}

/// The fewest candidates whose weights reach `wanted`, moved to the front and counted; `None` where all do not reach it.
/// Quickselect by weight: on average it looks at each candidate a few times, and sorts none.
fn nucleus(near: &mut [Scored], wanted: f64, best: f32) -> Option<usize> {
    if near.is_empty() || weight(near, best) < wanted {
        return None;
    }
    // The last one that is needed stands in first..last; what is before it has weight `reached`, too little.
    let (mut first, mut last, mut reached) = (0, near.len(), 0.0);
    while last - first > 1 {
        let open = &mut near[first..last];
        let half = open.len() / 2;
        highest(open, half);
        let upper = weight(&open[..half], best);
        if reached + upper >= wanted {
            last = first + half;
        } else {
            first += half;
            reached += upper;
        }
    }
    Some(last)
}

/// Moves the `count` highest to the front; of equals the lower id is the higher, so that the set is defined.
fn highest(near: &mut [Scored], count: usize) {
    if (1..near.len()).contains(&count) {
        near.select_nth_unstable_by(count - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    }
}

/// Sum of exp(score − `best`).
fn weight(scored: &[Scored], best: f32) -> f64 {
    scored.iter().map(|(score, _)| f64::from(kernels::exp(score - best))).sum()
}

/// The highest score's id; of equals the lowest.
fn best(scores: &[f32]) -> usize {
    let mut best = 0;
    for (id, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = id;
        }
    }
    best
}

/// As transformers: a seen token's positive score is divided, a negative one multiplied.
fn penalise(logits: &[f32], penalty: f32, seen: &HashSet<i64>) -> Vec<f32> {
    let mut scores = logits.to_vec();
    for &id in seen {
        if let Some(score) = usize::try_from(id).ok().and_then(|id| scores.get_mut(id)) {
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64, top_k: usize) -> Sampling {
        Sampling { temperature, top_p, top_k, repetition_penalty: 1.0, max_new_tokens: 1, stop: vec![] }
    }

    fn logits(count: usize) -> Vec<f32> {
        (0..count).map(|id| ((id * 7919 % 1000) as f32 / 1000.0 - 0.5) * 30.0).collect()
    }

    /// The definition: sort everything, keep the shortest head whose mass reaches top-p.
    fn reference(scores: &[f32], sampling: &Sampling) -> Vec<(usize, f64)> {
        let mut all: Vec<(f64, usize)> =
            scores.iter().enumerate().map(|(id, score)| (f64::from(*score) / sampling.temperature, id)).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        if sampling.top_k > 0 {
            all.truncate(sampling.top_k);
        }
        let best = all[0].0;
        let total: f64 = all.iter().map(|(score, _)| (score - best).exp()).sum();
        let mut kept = Vec::new();
        let mut reached = 0.0;
        for (score, id) in all {
            kept.push((id, (score - best).exp()));
            reached += (score - best).exp();
            if reached >= sampling.top_p * total {
                break;
            }
        }
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        kept.into_iter().map(|(id, weight)| (id, weight / total)).collect()
    }

    #[test]
    fn draws_follow_the_truncated_distribution() {
        // Coarse ones too, many of them equal, so that the nucleus ends among equals.
        let coarse: Vec<f32> = logits(1003).iter().map(|score| (score / 3.0).floor()).collect();
        for scores in [logits(1003), coarse] {
            for sampling in [
                sampling(1.0, 0.95, 0),
                sampling(2.0, 0.5, 0),
                sampling(2.0, 0.3, 0),
                sampling(5.0, 0.99, 0),
                sampling(1.0, 1.0, 7),
                sampling(3.0, 0.8, 50),
                sampling(1.0, 1.0, 0),
                sampling(100.0, 0.999, 0),
                sampling(100.0, 0.3, 0),
            ] {
                let expected = reference(&scores, &sampling);
                let mut sampler = Sampler::new(11);
                let draws = 20_000;
                let mut counts = vec![0u32; scores.len()];
                for _ in 0..draws {
                    counts[sampler.choose(&scores, &sampling, &HashSet::new()).0 as usize] += 1;
                }
                let inside: u32 = expected.iter().map(|(id, _)| counts[*id]).sum();
                assert_eq!(inside, draws, "{sampling:?}: a token outside the nucleus was drawn");
                for (id, share) in expected {
                    // Six standard deviations: a false alarm once in 10⁸ cells.
                    let tolerance = 6.0 * (share * (1.0 - share) / f64::from(draws)).sqrt() + 1e-4;
                    let found = f64::from(counts[id]) / f64::from(draws);
                    assert!((found - share).abs() < tolerance, "{sampling:?}: token {id}: {found}, expected {share}");
                }
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_chosen_from_and_show() {
        for bad in [f32::NAN, f32::INFINITY] {
            for sampling in [sampling(1.0, 0.9, 0), sampling(1.0, 0.3, 0), sampling(1.0, 1.0, 2)] {
                let (token, logprob) = Sampler::new(1).choose(&[1.0, bad, 0.5], &sampling, &HashSet::new());
                assert!((0..3).contains(&token) && logprob.is_nan(), "{token}, {logprob}");
            }
        }
    }

    #[test]
    fn the_log_probability_is_the_models_own() {
        let scores = logits(500);
        let (token, logprob) = Sampler::new(1).choose(&scores, &sampling(0.3, 0.5, 3), &HashSet::new());
        let total: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
        assert!((f64::from(logprob) - (f64::from(scores[token as usize]) - total.ln())).abs() < 1e-5);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_the_penalty_moves_it() {
        let scores = vec![1.0, 3.0, 3.0, -1.0];
        let mut greedy = sampling(0.0, 1.0, 0);
        assert_eq!(Sampler::new(0).choose(&scores, &greedy, &HashSet::new()).0, 1);
        greedy.repetition_penalty = 2.0;
        assert_eq!(Sampler::new(0).choose(&scores, &greedy, &HashSet::from([1])).0, 2);
    }
}
