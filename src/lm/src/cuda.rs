//! Operations that libtorch has for CUDA alone, in one kernel each where plain operations would pass over memory many times
//! or be started for each sequence.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use tch::{Device, Kind, TchError, Tensor};

use crate::checkpoint::DecoderConfig;
use crate::{LmError, device};

/// Generation of GPUs (compute capability, major) from which on flash attention has kernels.
const AMPERE: i32 = 8;
/// Widest head that they take.
const WIDEST: i64 = 256;
/// Sequences whose products are computed in one call are fewer than this.
const MOST_PRODUCTS: i64 = 1024;
/// Numbers of bfloat16 in the 16 bytes that rows must begin at.
const ALIGNED: i64 = 8;

unsafe extern "C" {
    fn doppel_causal_attention(
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        offsets: *const c_void,
        longest: i64,
        found: *mut *mut c_void,
    ) -> *mut c_char;

    fn doppel_cached_attention(
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        queries: *const c_void,
        starts: *const c_void,
        lengths: *const c_void,
        capacity: i64,
        found: *mut *mut c_void,
    ) -> *mut c_char;

    fn doppel_causal_attention_backward(
        gradient: *const c_void,
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        output: *const c_void,
        normaliser: *const c_void,
        offsets: *const c_void,
        longest: i64,
        one: *const c_void,
        other: *const c_void,
        found: *mut *mut c_void,
    ) -> *mut c_char;

    fn doppel_rms_norm_backward(
        gradient: *const c_void,
        x: *const c_void,
        inverse: *const c_void,
        weight: *const c_void,
        found: *mut *mut c_void,
    ) -> *mut c_char;
}

/// Whether [`Attention`] can be had for heads of this width.
pub(crate) fn has_attention(device: Device, kind: Kind, width: i64) -> bool {
    device.is_cuda()
        && kind == Kind::BFloat16
        && width % ALIGNED == 0
        && width <= WIDEST
        && device::cuda_generation().is_some_and(|generation| generation >= AMPERE)
}

/// Sequences that stand one behind the other.
pub(crate) struct Sequences {
    /// `[sequences + 1]` i32: where each begins, and the end.
    offsets: Tensor,
    /// Length of the longest.
    longest: i64,
}

impl Sequences {
    /// Sequences of these lengths.
    pub(crate) fn new(lengths: impl Iterator<Item = i64>, device: Device) -> Result<Self, LmError> {
        let (mut offsets, mut end, mut longest) = (vec![0i32], 0i64, 0);
        for length in lengths {
            end += length;
            longest = longest.max(length);
            let place = i32::try_from(end)
                .map_err(|_| LmError::Usage("2³¹ tokens or more\nhelp: lower --micro-batch-tokens".into()))?;
            offsets.push(place);
        }
        Ok(Self { offsets: Tensor::f_from_slice(&offsets)?.f_to_device(device)?, longest })
    }

    fn count(&self) -> i64 {
        self.offsets.size()[0] - 1
    }
}

/// Causal attention of sequences that stand one behind the other, and what its gradient needs.
pub(crate) struct Attention {
    /// Queries, keys and values, `[1, tokens, (heads + 2 · key-value heads) · head_dim]`.
    joint: Tensor,
    heads: [i64; 2],
    /// `[tokens, heads, head_dim]`
    output: Tensor,
    /// Log of each row's sum of exponentials.
    normaliser: Tensor,
    /// Of dropout, which there is none of; the backward pass asks for it all the same.
    dropout: [Tensor; 2],
}

impl Attention {
    /// Of joined heads `[1, tokens, (heads + 2 · key-value heads) · head_dim]`.
    pub(crate) fn forward(joint: Tensor, config: &DecoderConfig, sequences: &Sequences) -> Result<Self, LmError> {
        let heads = [config.heads, config.kv_heads];
        let [q, k, v] = apart(&joint, heads)?;
        let (offsets, longest) = (raw(&sequences.offsets), sequences.longest);
        let mut found = [ptr::null_mut(); 4];
        // SAFETY: all are live tensors; the function fills `found` with new ones or returns a text.
        let [output, normaliser, one, other] = unsafe {
            let failure = doppel_causal_attention(raw(&q), raw(&k), raw(&v), offsets, longest, found.as_mut_ptr());
            taken(failure, found)?
        };
        Ok(Self { joint, heads, output, normaliser, dropout: [one, other] })
    }

    /// `[1, tokens, heads · head_dim]`
    pub(crate) fn output(&self) -> Result<Tensor, LmError> {
        Ok(self.output.f_flatten(1, 2)?.f_unsqueeze(0)?)
    }

    /// Gradient of the joined heads, of which the output's gradient is `gradient` `[1, tokens, heads · head_dim]`.
    pub(crate) fn backward(self, gradient: &Tensor, sequences: &Sequences) -> Result<Tensor, LmError> {
        let Self { joint, heads, output, normaliser, dropout: [one, other] } = self;
        let [q, k, v] = apart(&joint, heads)?;
        let gradient = gradient.f_reshape(output.size())?;
        let mut found = [ptr::null_mut(); 3];
        // SAFETY: all are live tensors; the function fills `found` with new ones or returns a text.
        let [of_q, of_k, of_v] = unsafe {
            let failure = doppel_causal_attention_backward(
                raw(&gradient),
                raw(&q),
                raw(&k),
                raw(&v),
                raw(&output),
                raw(&normaliser),
                raw(&sequences.offsets),
                sequences.longest,
                raw(&one),
                raw(&other),
                found.as_mut_ptr(),
            );
            taken(failure, found)?
        };
        Ok(Tensor::f_cat(&[of_q, of_k, of_v], 1)?.f_reshape(joint.size())?)
    }
}

/// How far the rows of a cache are filled.
pub(crate) struct Filled {
    /// `[rows + 1]` i32: the first query of each row, of which it has one, and the end.
    queries: Tensor,
    /// `[rows + 1]` i32: its first position among all rows', and the end.
    starts: Tensor,
    /// `[rows]` i32: positions that it sees.
    lengths: Tensor,
    /// Positions that a row has room for.
    capacity: i64,
}

impl Filled {
    /// Of rows with room for `capacity` positions, of which each sees so many.
    pub(crate) fn new(lengths: &Tensor, capacity: i64) -> Result<Self, LmError> {
        let queries = Tensor::f_arange(lengths.size1()? + 1, (Kind::Int, lengths.device()))?;
        let starts = queries.f_mul_scalar(capacity)?;
        Ok(Self { queries, starts, lengths: lengths.f_to_kind(Kind::Int)?, capacity })
    }

    /// What attention gives for a query of each row, `[rows, heads, head_dim]`, of keys and values
    /// `[rows, capacity, key-value heads, head_dim]`. A row depends on no other but by rounding, and by that on how many there
    /// are and on the capacity.
    pub(crate) fn attend(&self, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor, LmError> {
        let (k, v) = (keys.f_flatten(0, 1)?, values.f_flatten(0, 1)?);
        let (queries, starts, lengths) = (raw(&self.queries), raw(&self.starts), raw(&self.lengths));
        let mut found = [ptr::null_mut()];
        // SAFETY: all are live tensors; the function fills `found` with a new one or returns a text.
        let [output] = unsafe {
            let (q, k, v, found_at) = (raw(q), raw(&k), raw(&v), found.as_mut_ptr());
            let failure = doppel_cached_attention(q, k, v, queries, starts, lengths, self.capacity, found_at);
            taken(failure, found)?
        };
        Ok(output)
    }
}

/// Queries, keys and values, `[tokens, heads, head_dim]` each, of joined heads `[1, tokens, row]`.
fn apart(joint: &Tensor, [heads, kv_heads]: [i64; 2]) -> Result<[Tensor; 3], LmError> {
    let all = joint.f_squeeze_dim(0)?.f_unflatten(1, [heads + 2 * kv_heads, -1])?;
    let part = |first: i64, count: i64| all.f_narrow(1, first, count);
    Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
}

/// Whether [`outer`] can be had for rows of these widths.
pub(crate) fn has_outer(sequences: &Sequences, left: i64, right: i64) -> bool {
    sequences.count() < MOST_PRODUCTS && left % ALIGNED == 0 && right % ALIGNED == 0
}

/// `leftᵀ · right` of each sequence's rows `[tokens, left]` and `[tokens, right]`: `[sequences, left, right]`.
pub(crate) fn outer(left: &Tensor, right: &Tensor, sequences: &Sequences) -> Result<Tensor, LmError> {
    let ends = sequences.offsets.f_narrow(0, 1, sequences.count())?;
    Ok(left.f_transpose(0, 1)?.f_internal_grouped_mm(right, Some(&ends), None, None)?)
}

/// RMSNorm of the last dimension in one kernel.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor, LmError> {
    Ok(normed(x, weight, epsilon)?.0)
}

/// Its gradient with respect to `x`.
pub(crate) fn rms_norm_backward(
    gradient: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
) -> Result<Tensor, LmError> {
    let inverse = normed(x, weight, epsilon)?.1;
    let mut found = [ptr::null_mut()];
    // SAFETY: all are live tensors; the function fills `found` with a new one or returns a text.
    let [gradient] = unsafe {
        let failure = doppel_rms_norm_backward(raw(gradient), raw(x), raw(&inverse), raw(weight), found.as_mut_ptr());
        taken(failure, found)?
    };
    Ok(gradient)
}

/// The norm, and 1/√(mean x² + ε) of each row.
fn normed(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor), LmError> {
    Ok(x.f_internal_fused_rms_norm(weight.size(), Some(weight), epsilon)?)
}

fn raw(tensor: &Tensor) -> *const c_void {
    tensor.as_ptr().cast()
}

/// The tensors that a call made, or what it complains of.
///
/// # Safety
/// `failure` is null, and then `found` are new tensors, or a text of `malloc`.
unsafe fn taken<const N: usize>(failure: *mut c_char, found: [*mut c_void; N]) -> Result<[Tensor; N], TchError> {
    if failure.is_null() {
        // SAFETY: the caller says so.
        return Ok(found.map(|tensor| unsafe { Tensor::from_ptr(tensor.cast()) }));
    }
    // SAFETY: the caller says so.
    unsafe {
        let text = CStr::from_ptr(failure).to_string_lossy().into_owned();
        libc::free(failure.cast());
        Err(TchError::Torch(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tests::{largest_difference, tiny, wave};
    use crate::device::{Compute, DeviceChoice, DtypeChoice};
    use crate::ops;

    /// Where there is a GPU: rows that are filled to different lengths, with heads that share keys and without.
    #[test]
    fn cached_attention_sees_what_is_filled() {
        let Ok(compute) = Compute::resolve(DeviceChoice::Cuda, DtypeChoice::Bf16) else { return };
        // Where heads share keys, those of a large cache are dealt to several threads.
        for (capacity, width, heads, kv_heads) in
            [(128, 64, 4, 4), (128, 64, 8, 2), (1088, 64, 8, 2), (1088, 128, 4, 4)]
        {
            let lengths = [1i64, 65, capacity, 17, capacity - 28];
            let rows = lengths.len() as i64;
            let value = |seed: usize, shape: &[i64]| wave(seed, shape).to_kind(Kind::BFloat16);
            let q = value(1, &[rows, heads, width]);
            let (keys, values) =
                (value(2, &[rows, capacity, kv_heads, width]), value(3, &[rows, capacity, kv_heads, width]));
            let on_gpu = |tensor: &Tensor| tensor.to_device(compute.device);
            let filled = Filled::new(&on_gpu(&Tensor::from_slice(&lengths)), capacity).unwrap();
            let found = filled.attend(&on_gpu(&q), &on_gpu(&keys), &on_gpu(&values)).unwrap();
            let found = found.to_device(Device::Cpu).to_kind(Kind::Float);
            for (row, length) in lengths.into_iter().enumerate() {
                let of = |cache: &Tensor| {
                    let seen = cache.get(row as i64).narrow(0, 0, length).to_kind(Kind::Float).transpose(0, 1);
                    seen.repeat_interleave_self_int(heads / kv_heads, 0, None)
                };
                let q = q.get(row as i64).to_kind(Kind::Float).unsqueeze(1);
                let scores = q.matmul(&of(&keys).transpose(1, 2)) / (width as f64).sqrt();
                let expected = scores.softmax(-1, Kind::Float).matmul(&of(&values)).squeeze_dim(1);
                let difference = largest_difference(&found.get(row as i64), &expected);
                assert!(difference < 0.01, "{heads} heads, {length}: {difference}");
            }
        }
    }

    /// Where there is a GPU: sequences so long that many threads add to the gradient of one query.
    #[test]
    fn attention_of_long_sequences_has_the_same_gradient_each_time() {
        let Ok(compute) = Compute::resolve(DeviceChoice::Cuda, DtypeChoice::Bf16) else { return };
        let config = DecoderConfig { heads: 8, kv_heads: 4, head_dim: 64, ..tiny("smollm2").config };
        let lengths = [700, 1, 1300];
        let total = lengths.iter().sum::<i64>();
        let joint = wave(1, &[1, total, 16 * 64]).to_kind(Kind::BFloat16);
        let gradient = wave(9, &[1, total, 8 * 64]).to_kind(Kind::BFloat16);
        tch::no_grad(|| {
            let sequences = Sequences::new(lengths.into_iter(), compute.device).unwrap();
            let backward = || {
                let attention = Attention::forward(joint.to_device(compute.device), &config, &sequences).unwrap();
                attention.backward(&gradient.to_device(compute.device), &sequences).unwrap().to_device(Device::Cpu)
            };
            let found = backward();
            for _ in 0..5 {
                assert_eq!(backward(), found);
            }
            let mut first = 0;
            for length in lengths {
                let part = |whole: &Tensor| whole.narrow(1, first, length).to_kind(Kind::Float);
                let attention = ops::Attention::forward(&part(&joint), &config).unwrap();
                let expected = attention.backward(&part(&gradient)).unwrap();
                let difference = largest_difference(&part(&found), &expected);
                assert!(difference < 0.02, "{length}: {difference}");
                first += length;
            }
        });
    }
}
