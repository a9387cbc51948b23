//! What layers are made of, with gradients: elementwise parts here, products and attention below.
//!
//! Each has one definition in libtorch's operations, which runs on every device; on CPU a kernel of our own does the same
//! in one pass ([`crate::kernels`]), and so it is with products ([`crate::products`]) and attention
//! ([`crate::attention`]). Only what is [`plain`] is differentiable by libtorch: of the others, the gradients are here too.

pub(crate) mod plain;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::LmError;
use crate::checkpoint::DecoderConfig;
use crate::cuda;
use crate::kernels::{self, Element, Heads};
use crate::rope::{self, Angles};

/// Runs the block with `E` as the element type of `$tensor`, where our kernels can compute on it; else `$otherwise`.
macro_rules! on_cpu {
    ($tensor:expr, $E:ident => $kernel:block, $otherwise:expr) => {
        match ($tensor.device(), $tensor.kind()) {
            (Device::Cpu, Kind::BFloat16) => {
                type $E = bf16;
                $kernel
            }
            (Device::Cpu, Kind::Float) => {
                type $E = f32;
                $kernel
            }
            _ => $otherwise,
        }
    };
}

// Behind the macro, which they use.
mod attention;
mod feed_forward;
mod linear;

use linear::added;

pub(crate) use attention::{Attention, Text, attend, attend_causal, attend_causal_backward, attend_padded, thirds};
pub(crate) use feed_forward::FeedForward;
pub(crate) use linear::{Frozen, linear, linear_gelu, linear_onto, matmul, matmul_onto, multiplies_all, outer};

/// `[rows]` f64: Σ x² of each row of `[rows, n]` f32, squares in float32. On CPU a row's sum is the same bits whatever rows
/// are beside it, which libtorch promises of no sum.
pub(crate) fn squares(x: &Tensor) -> Result<Tensor, LmError> {
    if x.device() != Device::Cpu {
        return Ok(x.f_square()?.f_sum_dim_intlist(1, false, Kind::Double)?);
    }
    let x = x.f_contiguous()?;
    let mut sums = vec![0f64; x.size2()?.0 as usize];
    kernels::squares(values(&x)?, &mut sums);
    Ok(Tensor::f_from_slice(&sums)?)
}

/// RMSNorm of the last dimension.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor, LmError> {
    on_cpu!(x, E => {
        let x = x.f_contiguous()?;
        let mut out = x.f_empty_like()?;
        kernels::rms_norm::<E>(values(&x)?, values(weight)?, epsilon as f32, values_mut(&mut out)?);
        Ok(out)
    }, match x.device().is_cuda() {
        true => cuda::rms_norm(x, weight, epsilon),
        false => plain::rms_norm(x, weight, epsilon),
    })
}

/// Gradient of [`rms_norm`] with respect to `x`, plus `plus`: the gradient that came around the norm.
///
/// With r = 1/√(mean x² + ε) and g = ∂y·w: ∂x = r·(g − x·r²·mean(g·x)).
pub(crate) fn rms_norm_backward(
    gradient: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    plus: Option<&Tensor>,
) -> Result<Tensor, LmError> {
    on_cpu!(x, E => {
        let (x, gradient) = (x.f_contiguous()?, gradient.f_contiguous()?);
        let plus = plus.map(Tensor::f_contiguous).transpose()?;
        let plus = plus.as_ref().map(values).transpose()?;
        let mut out = x.f_empty_like()?;
        let (weight, epsilon) = (values(weight)?, epsilon as f32);
        kernels::rms_norm_backward::<E>(values(&gradient)?, values(&x)?, weight, epsilon, plus, values_mut(&mut out)?);
        Ok(out)
    }, {
        if x.device().is_cuda() {
            return added(cuda::rms_norm_backward(gradient, x, weight, epsilon)?, plus);
        }
        let kind = x.kind();
        let x = x.f_to_kind(Kind::Float)?;
        let weighted = gradient.f_to_kind(Kind::Float)?.f_mul(&weight.f_to_kind(Kind::Float)?)?;
        let mean = |values: Tensor| values.f_mean_dim(-1i64, true, Kind::Float);
        let inverse = mean(x.f_square()?)?.f_add_scalar(epsilon)?.f_rsqrt()?;
        let shift = mean(weighted.f_mul(&x)?)?.f_mul(&inverse.f_square()?)?;
        let own = weighted.f_sub(&x.f_mul(&shift)?)?.f_mul(&inverse)?;
        let whole = match plus {
            Some(plus) => own.f_add(plus)?,
            None => own,
        };
        Ok(whole.f_to_kind(kind)?)
    })
}

/// LayerNorm of the last dimension.
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor, LmError> {
    on_cpu!(x, E => {
        let x = x.f_contiguous()?;
        let mut out = x.f_empty_like()?;
        kernels::layer_norm::<E>(values(&x)?, values(weight)?, values(bias)?, epsilon as f32, values_mut(&mut out)?);
        Ok(out)
    }, Ok(x.f_layer_norm(weight.size(), Some(weight), Some(bias), epsilon, false)?))
}

/// silu(gate) · up, of `[…, 2 · inner]`.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor, LmError> {
    on_cpu!(gate_up, E => {
        let gate_up = gate_up.f_contiguous()?;
        let (shape, inner) = halved(&gate_up);
        let mut out = Tensor::f_empty(shape, (E::KIND, Device::Cpu))?;
        kernels::swiglu::<E>(values(&gate_up)?, inner, values_mut(&mut out)?);
        Ok(out)
    }, plain::swiglu(gate_up))
}

/// Gradient of [`swiglu`] with respect to `gate_up`.
pub(crate) fn swiglu_backward(gradient: &Tensor, gate_up: &Tensor) -> Result<Tensor, LmError> {
    on_cpu!(gate_up, E => {
        let (gate_up, gradient) = (gate_up.f_contiguous()?, gradient.f_contiguous()?);
        let mut out = gate_up.f_empty_like()?;
        let inner = halved(&gate_up).1;
        kernels::swiglu_backward::<E>(values(&gradient)?, values(&gate_up)?, inner, values_mut(&mut out)?);
        Ok(out)
    }, {
        let inner = halved(gate_up).1 as i64;
        let halves = |whole: &Tensor| -> Result<[Tensor; 2], LmError> {
            Ok([whole.f_narrow(-1, 0, inner)?, whole.f_narrow(-1, inner, inner)?])
        };
        let out = gate_up.f_empty_like()?;
        let ([gate, up], [of_gate, mut of_up]) = (halves(gate_up)?, halves(&out)?);
        let _ = gate.f_silu_backward_grad_input(&of_gate, &gradient.f_mul(&up)?)?;
        let _ = gate.f_silu_out(&of_up)?;
        let _ = of_up.f_mul_(gradient)?;
        Ok(out)
    })
}

/// `([rows] f32 losses, [rows, hidden])`: cross-entropy of each row of logits `[rows, vocab]`, which are x · outputᵀ, and
/// its gradient with respect to x. The logits are used up.
///
/// In bf16 on CPU, tokens of little probability are drawn by lot ([`kernels::drawn_cross_entropy`]); elsewhere the product
/// is whole.
pub(crate) fn cross_entropy(logits: Tensor, labels: &Tensor, output: &Frozen) -> Result<(Tensor, Tensor), LmError> {
    if logits.device() != Device::Cpu || logits.kind() != Kind::BFloat16 {
        let (losses, gradient) = whole_cross_entropy(logits, labels)?;
        return Ok((losses, matmul(&gradient, output, None)?));
    }
    let (logits, vocabulary) = (logits.f_contiguous()?, output.f_contiguous()?);
    let labels = Vec::<i64>::try_from(labels)?;
    let mut losses = vec![0f32; labels.len()];
    let mut gradient = Tensor::f_empty([logits.size2()?.0, output.size2()?.1], (Kind::BFloat16, Device::Cpu))?;
    let (logits, vocabulary, out) = (values(&logits)?, values(&vocabulary)?, values_mut(&mut gradient)?);
    kernels::drawn_cross_entropy::<bf16>(logits, vocabulary, &labels, &mut losses, out);
    Ok((Tensor::f_from_slice(&losses)?, gradient))
}

/// `([rows] f32 losses, [rows, vocab])`: cross-entropy of each row of logits, and its gradient with respect to them. The
/// logits are used up.
fn whole_cross_entropy(logits: Tensor, labels: &Tensor) -> Result<(Tensor, Tensor), LmError> {
    let (rows, vocab) = logits.size2()?;
    on_cpu!(logits, E => {
        let mut logits = logits.f_contiguous()?;
        let labels = Vec::<i64>::try_from(labels)?;
        let mut losses = vec![0f32; rows as usize];
        kernels::cross_entropy::<E>(values_mut(&mut logits)?, vocab as usize, &labels, &mut losses);
        Ok((Tensor::f_from_slice(&losses)?, logits))
    }, {
        let labels = labels.f_unsqueeze(1)?;
        let log_probabilities = logits.f_log_softmax(-1, Kind::Float)?;
        let losses = log_probabilities.f_gather(1, &labels, false)?.f_squeeze_dim(1)?.f_neg()?;
        let mut gradient = log_probabilities;
        let _ = gradient.f_exp_()?;
        let minus_one = Tensor::f_full_like(&labels, -1.0)?.f_to_kind(Kind::Float)?;
        let _ = gradient.f_scatter_add_(1, &labels, &minus_one)?;
        Ok((losses, gradient.f_to_kind(logits.kind())?))
    })
}

/// Turns the query and key heads of `[batch, length, q + k + v]` by the angles of their positions; the input is used up.
pub(crate) fn rotate(qkv: Tensor, config: &DecoderConfig, angles: &Angles) -> Result<Tensor, LmError> {
    let (heads, turned, width) = (config.heads + 2 * config.kv_heads, config.heads + config.kv_heads, config.head_dim);
    on_cpu!(qkv, E => {
        let mut qkv = qkv.f_contiguous()?;
        let heads = Heads { all: heads as usize, turned: turned as usize, width: width as usize };
        let (cos, sin) = (angles.cos.f_contiguous()?, angles.sin.f_contiguous()?);
        kernels::rotate::<E>(values_mut(&mut qkv)?, heads, values(&cos)?, values(&sin)?);
        Ok(qkv)
    }, {
        let (batch, length, _) = qkv.size3()?;
        let qkv = qkv.f_contiguous()?;
        let mut front = qkv.f_view([batch, length, heads, width])?.f_narrow(2, 0, turned)?;
        rope::rotate_(&mut front, angles)?;
        Ok(qkv)
    })
}

/// Shape with the last dimension halved, and that half.
fn halved(tensor: &Tensor) -> (Vec<i64>, usize) {
    let mut shape = tensor.size();
    let last = shape.last_mut();
    let inner = last.map_or(0, |last| {
        *last /= 2;
        *last
    });
    (shape, inner as usize)
}

/// The values of a contiguous tensor on CPU.
fn values<E: Element>(tensor: &Tensor) -> Result<&[E], LmError> {
    check::<E>(tensor)?;
    // SAFETY: the memory is on this machine, contiguous and of this type (checked), and lives as long as the tensor.
    Ok(unsafe { std::slice::from_raw_parts(pointer(tensor), tensor.numel()) })
}

/// The same, to write. The caller made the tensor, so that nothing else reads it.
fn values_mut<E: Element>(tensor: &mut Tensor) -> Result<&mut [E], LmError> {
    check::<E>(tensor)?;
    // SAFETY: as above, and no other slice of this tensor exists while it is borrowed mutably.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer(tensor), tensor.numel()) })
}

/// A slice of nothing still needs an aligned pointer, and libtorch has none for an empty tensor.
fn pointer<E: Element>(tensor: &Tensor) -> *mut E {
    match tensor.numel() {
        0 => std::ptr::NonNull::dangling().as_ptr(),
        _ => tensor.data_ptr().cast(),
    }
}

fn check<E: Element>(tensor: &Tensor) -> Result<(), LmError> {
    match tensor.device() == Device::Cpu && tensor.kind() == E::KIND && tensor.is_contiguous() {
        true => Ok(()),
        false => Err(LmError::Malformed(format!(
            "a tensor of {:?} on {:?} where {:?} on CPU was expected",
            tensor.kind(),
            tensor.device(),
            E::KIND
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tests::{largest_difference, tiny, wave};

    /// Calls `op` with float32, which our kernels take, and with float64, which goes through libtorch's operations.
    fn check(shapes: &[&[i64]], op: impl Fn(&[Tensor]) -> Vec<Tensor>) {
        let inputs = |kind: Kind| -> Vec<Tensor> {
            shapes.iter().enumerate().map(|(seed, shape)| wave(seed, shape).to_kind(kind)).collect()
        };
        let (found, expected) = (op(&inputs(Kind::Float)), op(&inputs(Kind::Double)));
        for (found, expected) in found.iter().zip(&expected) {
            let difference = largest_difference(&found.to_kind(Kind::Double), &expected.to_kind(Kind::Double));
            assert!(difference < 2e-5, "{difference}");
        }
    }

    #[test]
    fn kernels_do_what_libtorch_does() {
        // Widths that fill no vector, and one row more than a vector has lanes.
        check(&[&[3, 17, 37], &[37]], |x| vec![rms_norm(&x[0], &x[1], 1e-5).unwrap()]);
        check(&[&[2, 5, 96], &[2, 5, 96], &[96], &[2, 5, 96]], |x| {
            let own = rms_norm_backward(&x[0], &x[1], &x[2], 1e-5, None).unwrap();
            vec![own, rms_norm_backward(&x[0], &x[1], &x[2], 1e-5, Some(&x[3])).unwrap()]
        });
        check(&[&[3, 17, 37], &[37], &[37]], |x| vec![layer_norm(&(&x[0] + 3.0), &x[1], &x[2], 1e-5).unwrap()]);
        check(&[&[33, 2 * 45]], |x| vec![swiglu(&(&x[0] * 6.0)).unwrap()]);
        check(&[&[33, 45], &[33, 2 * 45]], |x| vec![swiglu_backward(&x[0], &(&x[1] * 6.0)).unwrap()]);
        check(&[&[9, 131]], |x| {
            let (losses, gradient) =
                whole_cross_entropy(&x[0] * 9.0, &Tensor::arange(9, (Kind::Int64, Device::Cpu))).unwrap();
            vec![losses, gradient]
        });
    }

    #[test]
    fn squares_of_a_row_do_not_depend_on_its_company() {
        let x = wave(1, &[5, 40_003]);
        let all = squares(&x).unwrap();
        let expected = x.square().sum_dim_intlist(1, false, Kind::Double);
        assert!((&all / expected - 1.0).abs().max().double_value(&[]) < 1e-12);
        for row in 0..5 {
            assert_eq!(squares(&x.narrow(0, row, 1)).unwrap(), all.narrow(0, row, 1));
        }
        assert_eq!(squares(&x.narrow(0, 0, 0)).unwrap().size(), [0]);
        assert_eq!(squares(&x.narrow(1, 0, 0)).unwrap(), Tensor::zeros([5], (Kind::Double, Device::Cpu)));
    }

    #[test]
    fn what_lots_move_is_little_and_nothing_on_average() {
        // Rows of one distribution. What is added to all logits of a row gives it other lots; eighths, so that bf16 rounds
        // no sum.
        const ROWS: i64 = 2048;
        let (vocab, shifts) = (9001, 16);
        let logits = (wave(1, &[vocab]) * 40.0).round() / 8.0;
        let logits = logits + Tensor::arange(ROWS, (Kind::Float, Device::Cpu)).remainder(shifts).unsqueeze(1) / 8.0;
        let labels = Tensor::arange(ROWS, (Kind::Int64, Device::Cpu)).floor_divide_scalar(shifts);
        // Rows of the vocabulary that have much in common, so that leaving any out would be seen.
        let vocabulary = (wave(2, &[vocab, 16]) + 0.5).to_kind(Kind::BFloat16);
        let [found, expected] = [Kind::BFloat16, Kind::Double].map(|kind| {
            let (losses, gradient) =
                cross_entropy(logits.to_kind(kind), &labels, &vocabulary.to_kind(kind).into()).unwrap();
            (losses.to_kind(Kind::Double), gradient.to_kind(Kind::Double))
        });
        assert!(largest_difference(&found.0, &expected.0) < 1e-5);
        let norm = |tensor: &Tensor| tensor.norm().double_value(&[]);
        let error = &found.1 - &expected.1;
        let moved = norm(&error) / norm(&expected.1);
        assert!((0.003..0.03).contains(&moved), "{moved}");
        // The squares of independent errors add up as the square of their sum does: the quotient is 1, give or take its half,
        // and every thousandth of a row that was left out would add some hundred.
        let together = norm(&error.sum_dim_intlist(0, false, Kind::Double)) / norm(&error);
        assert!(together < 2.0, "{together}");
    }

    #[test]
    fn lots_of_a_row_do_not_depend_on_its_company() {
        let logits = (wave(1, &[40, 5000]) * 9.0).to_kind(Kind::BFloat16);
        let labels = Tensor::arange(40, (Kind::Int64, Device::Cpu));
        let vocabulary: Frozen = wave(2, &[5000, 70]).to_kind(Kind::BFloat16).into();
        let (losses, gradient) = cross_entropy(logits.copy(), &labels, &vocabulary).unwrap();
        for row in [0, 7, 39] {
            let part = |tensor: &Tensor| tensor.narrow(0, row, 1);
            let alone = cross_entropy(part(&logits), &part(&labels), &vocabulary).unwrap();
            assert_eq!(alone, (part(&losses), part(&gradient)));
        }
    }

    #[test]
    fn rotation_by_the_kernel_is_rotation_by_libtorch() {
        let decoder = tiny("smollm2");
        let angles = decoder.rope.first(11).unwrap();
        let wide = Angles::new(angles.cos.to_kind(Kind::Double), angles.sin.to_kind(Kind::Double)).unwrap();
        let x = wave(3, &[2, 11, 10 * 8]);
        let expected = rotate(x.to_kind(Kind::Double), &decoder.config, &wide).unwrap();
        let found = rotate(x.copy(), &decoder.config, &angles).unwrap();
        assert!(largest_difference(&found.to_kind(Kind::Double), &expected) < 1e-6);
        let back = rotate(found, &decoder.config, &angles.inverse().unwrap()).unwrap();
        assert!(largest_difference(&back, &x) < 1e-6);
    }
}
