//! Choosing one token of every row of logits where these are, without moving the logits.
//!
//! As [`super::sampler`] does where most of the mass is kept, for all rows at once: draws until a token is of the nucleus.

use tch::{Device, Kind, Tensor};

use super::Sampling;
use super::sampler::{Sampler, draws_until_kept};
use crate::LmError;

/// Most logits that are looked at together; of each, some 30 bytes are held.
const CHUNK: i64 = 1 << 26;

/// Whether this is how to choose from logits on `device`.
pub(super) fn chooses(device: Device, sampling: &Sampling) -> bool {
    device.is_cuda() && sampling.temperature > 0.0 && sampling.repetition_penalty == 1.0 && draws_until_kept(sampling)
}

/// `(token, its log-probability in the model's own distribution)` of each row of `logits` `[rows, vocab]` f32, each by its
/// own sampler.
pub(super) fn choose(
    logits: &Tensor,
    samplers: &mut [&mut Sampler],
    sampling: &Sampling,
) -> Result<Vec<(i64, f32)>, LmError> {
    let width = logits.size2()?.1;
    let step = (CHUNK / width).max(1);
    let mut chosen = Vec::with_capacity(samplers.len());
    for (index, samplers) in samplers.chunks_mut(step as usize).enumerate() {
        let rows = logits.f_narrow(0, index as i64 * step, samplers.len() as i64)?;
        chosen.append(&mut Rows::new(&rows, sampling)?.choose(samplers)?);
    }
    Ok(chosen)
}

/// Rows of one distribution each.
struct Rows {
    /// `[rows, vocab]`: model's logits.
    logits: Tensor,
    /// `[rows, 1]`: log of the sum of their exponentials.
    normaliser: Tensor,
    /// `[rows, vocab]` f32: what each token weighs in the distribution that is drawn from, the best one 1.
    weights: Tensor,
    /// `[rows, vocab]` f64: of each token and those before it.
    sums: Tensor,
    /// `[vocab]`
    ids: Tensor,
    top_p: f64,
}

/// One draw of each of some rows.
struct Draw {
    tokens: Vec<i64>,
    logprobs: Vec<f64>,
    is_kept: Vec<bool>,
}

impl Rows {
    fn new(logits: &Tensor, sampling: &Sampling) -> Result<Self, LmError> {
        let width = logits.size2()?.1;
        let scores = match sampling.temperature {
            1.0 => logits.shallow_clone(),
            temperature => logits.f_mul_scalar(1.0 / temperature)?,
        };
        let best = scores.f_amax([1i64], true)?;
        let mut weights = scores.f_sub(&best)?;
        let _ = weights.f_exp_()?;
        let sums = weights.f_cumsum(1, Kind::Double)?;
        let ids = Tensor::f_arange(width, (Kind::Int64, logits.device()))?;
        let normaliser = match sampling.temperature {
            1.0 => sums.f_narrow(1, width - 1, 1)?.f_log()?.f_add(&best)?,
            _ => logits.f_logsumexp([1i64], true)?,
        };
        Ok(Self { logits: logits.shallow_clone(), normaliser, weights, sums, ids, top_p: sampling.top_p })
    }

    fn choose(&self, samplers: &mut [&mut Sampler]) -> Result<Vec<(i64, f32)>, LmError> {
        let mut chosen = vec![(0, 0.0); samplers.len()];
        let mut open: Vec<usize> = (0..samplers.len()).collect();
        while !open.is_empty() {
            let uniforms: Vec<f64> = open.iter().map(|&row| samplers[row].uniform()).collect();
            let draw = match open.len() == samplers.len() {
                true => self.draw(&uniforms)?,
                false => self.of(&open)?.draw(&uniforms)?,
            };
            for (place, &row) in open.iter().enumerate() {
                chosen[row] = (draw.tokens[place], draw.logprobs[place] as f32);
            }
            let mut kept = draw.is_kept.into_iter();
            open.retain(|_| !kept.next().unwrap_or(true));
        }
        Ok(chosen)
    }

    /// Some of the rows.
    fn of(&self, rows: &[usize]) -> Result<Self, LmError> {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let rows = Tensor::f_from_slice(&rows)?.f_to_device(self.weights.device())?;
        let some = |all: &Tensor| all.f_index_select(0, &rows);
        Ok(Self {
            logits: some(&self.logits)?,
            normaliser: some(&self.normaliser)?,
            weights: some(&self.weights)?,
            sums: some(&self.sums)?,
            ids: self.ids.shallow_clone(),
            top_p: self.top_p,
        })
    }

    /// A token of each row at the given share of its whole mass.
    fn draw(&self, uniforms: &[f64]) -> Result<Draw, LmError> {
        let width = self.ids.size()[0];
        let total = self.sums.f_narrow(1, width - 1, 1)?;
        let shares = Tensor::f_from_slice(uniforms)?.f_to_device(total.device())?.f_unsqueeze(1)?;
        // The first whose sum is beyond the share: one that weighs nothing is never it.
        let tokens = shares.f_mul(&total)?.f_searchsorted(&self.sums, false, true, "right", None::<&Tensor>)?;
        let tokens = tokens.f_clamp_max(width - 1)?;
        let is_kept = self.is_of_nucleus(&tokens, &total)?;
        let logprobs = self.logits.f_gather(1, &tokens, false)?.f_sub(&self.normaliser)?;
        // One transfer for all; ids are far below the 2⁵³ that float64 holds exactly.
        let double = |column: &Tensor| column.f_to_kind(Kind::Double);
        let all = Tensor::f_cat(&[double(&tokens)?, double(&logprobs)?, double(&is_kept)?], 1)?;
        let all = Vec::<f64>::try_from(all.f_to_device(Device::Cpu)?.f_reshape([-1i64])?)?;
        let column = |index: usize| all.iter().skip(index).step_by(3);
        Ok(Draw {
            tokens: column(0).map(|&token| token as i64).collect(),
            logprobs: column(1).copied().collect(),
            is_kept: column(2).map(|&kept| kept != 0.0).collect(),
        })
    }

    /// Whether the tokens before it do not make up the nucleus; of equals the lower id comes first. `[rows, 1]`.
    ///
    /// What is not a number counts as kept: the log-probability tells.
    fn is_of_nucleus(&self, tokens: &Tensor, total: &Tensor) -> Result<Tensor, LmError> {
        if self.top_p >= 1.0 {
            return Ok(tokens.f_ones_like()?);
        }
        let weight = self.weights.f_gather(1, tokens, false)?;
        let equal = self.weights.f_eq_tensor(&weight)?.f_logical_and(&self.ids.f_lt_tensor(tokens)?)?;
        let before = self.weights.f_mul(&self.weights.f_gt_tensor(&weight)?.f_logical_or(&equal)?)?;
        let before = before.f_sum_dim_intlist(1i64, true, Kind::Float)?;
        Ok(before.f_ge_tensor(&total.f_mul_scalar(self.top_p)?)?.f_logical_not()?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling { temperature, top_p, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 1, stop: vec![] }
    }

    /// Coarse logits, many of them equal, so that the nucleus ends among equals.
    fn logits(rows: i64) -> Tensor {
        let row: Vec<f32> = (0..301).map(|id| ((id * 7919 % 1000) as f32 / 100.0).floor() * 0.75).collect();
        Tensor::from_slice(&row).unsqueeze(0).repeat([rows, 1])
    }

    /// Probability of each token of the nucleus: sort everything, keep the shortest head whose mass reaches top-p.
    fn nucleus(scores: &[f64], top_p: f64) -> HashMap<i64, f64> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let total: f64 = scores.iter().map(|score| score.exp()).sum();
        let (mut kept, mut reached) = (HashMap::new(), 0.0);
        for id in order {
            kept.insert(id as i64, scores[id].exp());
            reached += scores[id].exp();
            if reached >= top_p * total {
                break;
            }
        }
        kept.values_mut().for_each(|weight| *weight /= reached);
        kept
    }

    #[test]
    fn draws_follow_the_truncated_distribution() {
        let rows = 20_000;
        let logits = logits(rows);
        let row = Vec::<f32>::try_from(logits.get(0)).unwrap();
        for (temperature, top_p) in [(1.0, 0.95), (1.0, 1.0), (2.0, 0.5), (0.4, 0.9)] {
            let sampling =
                Sampling { temperature, top_p, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 1, stop: vec![] };
            let mut samplers: Vec<Sampler> = (0..rows as u64).map(Sampler::new).collect();
            let mut samplers: Vec<&mut Sampler> = samplers.iter_mut().collect();
            let chosen = choose(&logits, &mut samplers, &sampling).unwrap();
            let mut counts: HashMap<i64, f64> = HashMap::new();
            let normaliser = row.iter().map(|&score| f64::from(score).exp()).sum::<f64>().ln();
            for (token, logprob) in chosen {
                *counts.entry(token).or_default() += 1.0;
                let expected = f64::from(row[token as usize]) - normaliser;
                assert!((f64::from(logprob) - expected).abs() < 1e-5, "{logprob}, expected {expected}");
            }
            let scores: Vec<f64> = row.iter().map(|&score| f64::from(score) / temperature).collect();
            let expected = nucleus(&scores, top_p);
            assert!(counts.keys().all(|token| expected.contains_key(token)), "a token outside the nucleus was drawn");
            for (token, share) in expected {
                let found = counts.get(&token).copied().unwrap_or_default() / rows as f64;
                // Six standard deviations: a false alarm once in 10⁸ cells.
                let tolerance = 6.0 * (share * (1.0 - share) / rows as f64).sqrt() + 1e-4;
                assert!((found - share).abs() < tolerance, "{top_p}: token {token}: {found}, expected {share}");
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_chosen_from_and_show() {
        for bad in [f32::NAN, f32::INFINITY] {
            let logits = Tensor::from_slice(&[1.0, bad, 0.5]).unsqueeze(0);
            let sampling = sampling(1.0, 0.9);
            let (token, logprob) = choose(&logits, &mut [&mut Sampler::new(1)], &sampling).unwrap()[0];
            assert!((0..3).contains(&token) && logprob.is_nan(), "{token}, {logprob}");
        }
    }

    #[test]
    fn a_choice_does_not_depend_on_its_company() {
        let sampling = sampling(1.0, 0.6);
        let all = |seeds: &[u64]| {
            let mut samplers: Vec<Sampler> = seeds.iter().copied().map(Sampler::new).collect();
            let mut samplers: Vec<&mut Sampler> = samplers.iter_mut().collect();
            choose(&logits(seeds.len() as i64), &mut samplers, &sampling).unwrap()
        };
        let together = all(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let alone: Vec<(i64, f32)> = (1..=9).flat_map(|seed| all(&[seed])).collect();
        assert_eq!(together, alone);
    }
}
