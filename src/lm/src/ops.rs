//! The elementwise parts of a layer and their gradients, and attention with its gradient.
//!
//! Each has one definition in libtorch's operations, which runs on every device; on CPU a kernel of our own does the same
//! in one pass ([`crate::kernels`]), and so it is with products ([`crate::products`]) and attention ([`crate::attention`]). None of them is differentiable: the gradients are here too.

use std::ops::Deref;
use std::sync::OnceLock;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::LmError;
use crate::attention::{self, Sequence, Work};
use crate::checkpoint::DecoderConfig;
use crate::cuda;
use crate::decoder::layer::{self, join_heads, split_heads};
use crate::decoder::rope::{self, Angles};
use crate::device::Compute;
use crate::kernels::{self, Element, Heads};
use crate::products::{self, Activation, Factor, Multiplier, Packed, Plus, View, Weight};

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

/// A weight of products, `[outputs, inputs]` or `[inputs, outputs]`.
pub(crate) trait Factored {
    /// The weight.
    fn tensor(&self) -> &Tensor;

    /// It packed for `x · weightᵀ` where `turned`, else for `x · weight`; `None` where that is to be done on the way.
    fn packed<E: Factor>(&self, turned: bool) -> Result<Option<&Packed>, LmError>;
}

impl Factored for Tensor {
    fn tensor(&self) -> &Tensor {
        self
    }

    fn packed<E: Factor>(&self, _: bool) -> Result<Option<&Packed>, LmError> {
        Ok(None)
    }
}

/// A weight that does not change, packed when it is first multiplied by.
pub(crate) struct Frozen {
    tensor: Tensor,
    plain: OnceLock<Option<Packed>>,
    turned: OnceLock<Option<Packed>>,
}

impl From<Tensor> for Frozen {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, plain: OnceLock::new(), turned: OnceLock::new() }
    }
}

impl Deref for Frozen {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl Factored for Frozen {
    fn tensor(&self) -> &Tensor {
        self
    }

    fn packed<E: Factor>(&self, turned: bool) -> Result<Option<&Packed>, LmError> {
        let place = if turned { &self.turned } else { &self.plain };
        if let Some(packed) = place.get() {
            return Ok(packed.as_ref());
        }
        let weight = self.tensor.f_contiguous()?;
        let view = view::<E>(&weight)?;
        // Whoever else wants it meanwhile waits.
        let pack = || Packed::new(if turned { Weight::Outputs(view) } else { Weight::Inputs(view) });
        Ok(place.get_or_init(pack).as_ref())
    }
}

/// `x · weightᵀ + bias + rows` of x `[…, inputs]`, a weight `[outputs, inputs]` and rows `[…, outputs]`.
pub(crate) fn linear(
    x: &Tensor,
    weight: &impl Factored,
    bias: Option<&Tensor>,
    rows: Option<&Tensor>,
) -> Result<Tensor, LmError> {
    let done = own_linear(x, weight, (bias, rows), Activation::Identity)?;
    done.map_or_else(|| added(x.f_linear(weight.tensor(), bias)?, rows), Ok)
}

/// GELU(`x · weightᵀ + bias`), with the error function.
pub(crate) fn linear_gelu(x: &Tensor, weight: &impl Factored, bias: &Tensor) -> Result<Tensor, LmError> {
    let done = own_linear(x, weight, (Some(bias), None), Activation::Gelu)?;
    done.map_or_else(|| Ok(x.f_linear(weight.tensor(), Some(bias))?.f_gelu("none")?), Ok)
}

/// [`linear`] by our product, where that can compute it.
fn own_linear(
    x: &Tensor,
    weight: &impl Factored,
    plus: (Option<&Tensor>, Option<&Tensor>),
    activation: Activation,
) -> Result<Option<Tensor>, LmError> {
    on_cpu!(x, E => {
        if !multiplies::<E>(weight.tensor().size2()?.1) {
            return Ok(None);
        }
        if let Some(packed) = weight.packed::<E>(true)? {
            return product::<E>(x, Multiplier::Packed(packed), plus, activation).map(Some);
        }
        let weight = weight.tensor().f_contiguous()?;
        product::<E>(x, Multiplier::Plain(Weight::Outputs(view(&weight)?)), plus, activation).map(Some)
    }, Ok(None))
}

/// `x · weight + rows` of x `[…, inputs]`, a weight `[inputs, outputs]` and rows `[…, outputs]`.
pub(crate) fn matmul(x: &Tensor, weight: &impl Factored, rows: Option<&Tensor>) -> Result<Tensor, LmError> {
    on_cpu!(x, E => {
        if multiplies::<E>(weight.tensor().size2()?.0) {
            if let Some(packed) = weight.packed::<E>(false)? {
                return product::<E>(x, Multiplier::Packed(packed), (None, rows), Activation::Identity);
            }
            let weight = weight.tensor().f_contiguous()?;
            let weight = Multiplier::Plain(Weight::Inputs(view(&weight)?));
            return product::<E>(x, weight, (None, rows), Activation::Identity);
        }
    }, {});
    added(x.f_matmul(weight.tensor())?, rows)
}

/// `x · weightᵀ + rows`, as [`linear`]; the rows are used up.
pub(crate) fn linear_onto(rows: Tensor, x: &Tensor, weight: &impl Factored) -> Result<Tensor, LmError> {
    match rows.device().is_cuda() {
        true => product_onto(rows, x, &weight.tensor().f_transpose(0, 1)?),
        false => linear(x, weight, None, Some(&rows)),
    }
}

/// `x · weight + rows`, as [`matmul`]; the rows are used up.
pub(crate) fn matmul_onto(rows: Tensor, x: &Tensor, weight: &impl Factored) -> Result<Tensor, LmError> {
    match rows.device().is_cuda() {
        true => product_onto(rows, x, weight.tensor()),
        false => matmul(x, weight, Some(&rows)),
    }
}

/// Adds a product to contiguous rows where they are.
fn product_onto(rows: Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor, LmError> {
    let (inputs, outputs) = weight.size2()?;
    let _ = rows.f_view([-1, outputs])?.f_addmm_(&x.f_reshape([-1, inputs])?, weight)?;
    Ok(rows)
}

/// `leftᵀ · right` of each `[length, left]` and `[length, right]` of a batch: `[batch, left, right]`.
pub(crate) fn outer(left: &Tensor, right: &Tensor) -> Result<Tensor, LmError> {
    let (_, length, width) = right.size3()?;
    on_cpu!(left, E => {
        if multiplies::<E>(length) {
            let (left, right) = (left.f_transpose(1, 2)?.f_contiguous()?, right.f_contiguous()?);
            let (batch, rows, _) = left.size3()?;
            let mut out = Tensor::f_empty([batch, rows, width], (E::KIND, Device::Cpu))?;
            let (length, width) = (length as usize, width as usize);
            let lefts = values::<E>(&left)?.chunks_exact(rows as usize * length);
            let rights = values::<E>(&right)?.chunks_exact(length * width);
            let outs = values_mut::<E>(&mut out)?.chunks_exact_mut(rows as usize * width);
            for ((left, right), out) in lefts.zip(rights).zip(outs) {
                let weight = Weight::Inputs(View::new(right, width, 0..length, 0..width));
                products::product(left, Multiplier::Plain(weight), Plus::NOTHING, Activation::Identity, out);
            }
            return Ok(out);
        }
    }, {});
    Ok(left.f_transpose(1, 2)?.f_bmm(right)?)
}

fn added(mut product: Tensor, rows: Option<&Tensor>) -> Result<Tensor, LmError> {
    match rows {
        None => Ok(product),
        Some(rows) => Ok(product.f_add_(rows)?),
    }
}

/// Whether our products compute all of a model's, with so many inputs each.
pub(crate) fn multiplies_all(compute: Compute, inputs: impl IntoIterator<Item = i64>) -> bool {
    let mut inputs = inputs.into_iter();
    match (compute.device, compute.kind) {
        (Device::Cpu, Kind::BFloat16) => inputs.all(multiplies::<bf16>),
        (Device::Cpu, Kind::Float) => inputs.all(multiplies::<f32>),
        _ => false,
    }
}

/// Whether our products can have so many inputs.
fn multiplies<E: Factor>(inputs: i64) -> bool {
    products::is_supported() && inputs > 0 && (inputs as usize).is_multiple_of(E::GROUP)
}

/// The rows of a contiguous matrix.
fn view<E: Element>(matrix: &Tensor) -> Result<View<'_, E>, LmError> {
    let (rows, width) = matrix.size2()?;
    Ok(View::new(values(matrix)?, width as usize, 0..rows as usize, 0..width as usize))
}

fn product<E: Factor>(
    x: &Tensor,
    weight: Multiplier<'_, E>,
    (bias, rows): (Option<&Tensor>, Option<&Tensor>),
    activation: Activation,
) -> Result<Tensor, LmError> {
    let x = x.f_contiguous()?;
    let rows = rows.map(Tensor::f_contiguous).transpose()?;
    let plus = Plus { bias: bias.map(values).transpose()?, rows: rows.as_ref().map(values).transpose()? };
    let mut shape = x.size();
    shape.pop();
    shape.push(weight.outputs() as i64);
    let mut out = Tensor::f_empty(shape, (E::KIND, Device::Cpu))?;
    products::product(values(&x)?, weight, plus, activation, values_mut(&mut out)?);
    Ok(out)
}

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
        false => layer::rms_norm(x, weight, epsilon),
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
    }, layer::swiglu(gate_up))
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

/// `([rows] f32 losses, [rows, vocab])`: cross-entropy of each row of logits, and its gradient with respect to them. The
/// logits are used up.
pub(crate) fn cross_entropy(logits: Tensor, labels: &Tensor) -> Result<(Tensor, Tensor), LmError> {
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

/// Causal attention and what its gradient needs.
pub(crate) struct Attention {
    /// Queries, keys and values, `[batch, length, (heads + 2 · key-value heads) · head_dim]`.
    joint: Tensor,
    heads: attention::Heads,
    /// `[batch, length, heads · head_dim]`.
    pub(crate) output: Tensor,
    way: Way,
}

/// How attention is computed.
enum Way {
    /// Our kernel.
    Own,
    /// libtorch's kernel for CPU: its q, k, v and output, `[batch, heads, length, head_dim]`, and the row-wise log of the sum
    /// of exponentials that it gave.
    Flash([Tensor; 4], Tensor),
    /// Whatever libtorch has for the device, with its gradient: q, k, v and the output.
    Autograd([Tensor; 4]),
}

impl Attention {
    /// Attention of a group's joined heads `[batch, length, (heads + 2 · key-value heads) · head_dim]`.
    pub(crate) fn forward(joint: Tensor, config: &DecoderConfig) -> Result<Self, LmError> {
        let heads = attention::Heads {
            queries: config.heads as usize,
            keys: config.kv_heads as usize,
            width: config.head_dim as usize,
        };
        on_cpu!(joint, E => {
            let length = joint.size3()?.1;
            if can_attend::<E>(length, heads) {
                let visible: Vec<usize> = (1..=length as usize).collect();
                let joint = joint.f_contiguous()?;
                let output = attended::<E>(&joint, heads, &visible)?;
                return Ok(Self { joint, heads, output, way: Way::Own });
            }
        }, {});
        let (q, k, v) = split_heads(&joint, config)?;
        match joint.device() {
            Device::Cpu => Self::by_flash(joint, heads, q, k, v),
            _ => Self::by_autograd(joint, heads, q, k, v),
        }
    }

    fn by_flash(joint: Tensor, heads: attention::Heads, q: Tensor, k: Tensor, v: Tensor) -> Result<Self, LmError> {
        let (wide_k, wide_v) = (repeated(&k, &q)?, repeated(&v, &q)?);
        let (output, normaliser) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &q,
            &wide_k,
            &wide_v,
            0.0,
            true,
            None::<&Tensor>,
            None,
        )?;
        let way = Way::Flash([q, k, v, output.shallow_clone()], normaliser);
        Ok(Self { joint, heads, output: join_heads(&output)?, way })
    }

    /// Autograd over this one operation: its kernels differ by device, kind and head width.
    fn by_autograd(joint: Tensor, heads: attention::Heads, q: Tensor, k: Tensor, v: Tensor) -> Result<Self, LmError> {
        let leaf = |tensor: Tensor| tensor.f_detach()?.f_set_requires_grad(true);
        let (q, k, v) = (leaf(q)?, leaf(k)?, leaf(v)?);
        let output = tch::with_grad(|| -> Result<Tensor, LmError> {
            let (wide_k, wide_v) = (repeated(&k, &q)?, repeated(&v, &q)?);
            let none = None::<&Tensor>;
            Ok(Tensor::f_scaled_dot_product_attention(&q, &wide_k, &wide_v, none, 0.0, true, None, false)?)
        })?;
        Ok(Self { joint, heads, output: join_heads(&output.detach())?, way: Way::Autograd([q, k, v, output]) })
    }

    /// The output alone, where no gradient is wanted.
    pub(crate) fn inference(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, LmError> {
        let (wide_k, wide_v) = (repeated(k, q)?, repeated(v, q)?);
        Ok(Tensor::f_scaled_dot_product_attention(q, &wide_k, &wide_v, None::<&Tensor>, 0.0, true, None, false)?)
    }

    /// Gradient of the joined heads, of which the output's gradient is `gradient` `[batch, length, heads · head_dim]`.
    pub(crate) fn backward(self, gradient: &Tensor) -> Result<Tensor, LmError> {
        let Self { joint, heads, way, .. } = self;
        let (batch, length, width) = joint.size3()?;
        let apart = |rows: &Tensor| -> Result<Tensor, LmError> {
            Ok(rows.f_reshape([batch, length, -1, heads.width as i64])?.f_transpose(1, 2)?)
        };
        let (q, k, v) = match way {
            Way::Own => return own_backward(gradient, &joint, heads),
            Way::Flash([q, k, v, output], normaliser) => {
                let (wide_k, wide_v) = (repeated(&k, &q)?, repeated(&v, &q)?);
                let (of_q, of_k, of_v) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
                    &apart(gradient)?,
                    &q,
                    &wide_k,
                    &wide_v,
                    &output,
                    &normaliser,
                    0.0,
                    true,
                    None::<&Tensor>,
                    None,
                )?;
                (of_q, summed(&of_k, &k)?, summed(&of_v, &v)?)
            }
            Way::Autograd([q, k, v, output]) => {
                let gradient = apart(gradient)?;
                let objective = tch::with_grad(|| output.f_mul(&gradient)?.f_sum(Kind::Float))?;
                let found = Tensor::f_run_backward(&[objective], &[&q, &k, &v], false, false)?;
                match <[Tensor; 3]>::try_from(found) {
                    Ok([q, k, v]) => (q, k, v),
                    Err(_) => return Err(LmError::Malformed("attention: libtorch gave no gradient".into())),
                }
            }
        };
        let joint = Tensor::f_cat(&[q.f_transpose(1, 2)?, k.f_transpose(1, 2)?, v.f_transpose(1, 2)?], 2)?;
        Ok(joint.f_reshape([batch, length, width])?)
    }
}

/// A text among others, one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct Text {
    /// Its tokens, padding included.
    pub(crate) length: usize,
    /// The first ones, which are no padding.
    pub(crate) own: usize,
}

/// Attention of each text to its own tokens, by our kernel where that can compute it: joined heads `[tokens, 3 · heads ·
/// head_dim]` to `[tokens, heads · head_dim]`. The texts must make up all tokens.
pub(crate) fn attend(joint: &Tensor, heads: i64, texts: &[Text]) -> Result<Option<Tensor>, LmError> {
    let (tokens, width) = joint.size2()?;
    let count = heads as usize;
    let heads = attention::Heads { queries: count, keys: count, width: width as usize / 3 / count };
    let lengths = texts.iter().map(|text| text.length);
    assert!(heads.row() == width as usize && lengths.sum::<usize>() == tokens as usize);
    on_cpu!(joint, E => {
        if !texts.iter().all(|text| can_attend::<E>(text.length as i64, heads)) {
            return Ok(None);
        }
        let joint = joint.f_contiguous()?;
        let mut out = Tensor::f_empty([tokens, heads.out() as i64], (E::KIND, Device::Cpu))?;
        let (mut rows, mut outs, mut work) = (values::<E>(&joint)?, values_mut(&mut out)?, Work::new());
        for text in texts {
            let (own_rows, own_outs);
            (own_rows, rows) = rows.split_at(text.length * heads.row());
            (own_outs, outs) = outs.split_at_mut(text.length * heads.out());
            Sequence { rows: own_rows, heads, visible: &vec![text.own; text.length] }.forward(&mut work, own_outs);
        }
        Ok(Some(out))
    }, Ok(None))
}

/// The same by libtorch, of texts of one length: joined heads `[texts, length, 3 · heads · head_dim]`, to whose scores
/// `blocked` is added.
pub(crate) fn attend_padded(joint: &Tensor, heads: i64, blocked: &Tensor) -> Result<Tensor, LmError> {
    let [q, k, v] = thirds(joint, heads)?;
    join_heads(&Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(blocked), 0.0, false, None, false)?)
}

/// Queries, keys and values, `[texts, heads, length, head_dim]` each, of joined heads `[texts, length, 3 · heads · head_dim]`.
pub(crate) fn thirds(joint: &Tensor, heads: i64) -> Result<[Tensor; 3], LmError> {
    let split = joint.f_unflatten(-1, [3, heads, -1])?;
    let part = |index: i64| split.f_select(2, index)?.f_transpose(1, 2);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// Whether our kernel can have such sequences.
fn can_attend<E: Factor>(length: i64, heads: attention::Heads) -> bool {
    multiplies::<E>(length) && multiplies::<E>(heads.width as i64)
}

/// What our kernel gives for sequences `[batch, length, row of heads]`, which all see what `visible` says.
fn attended<E: Factor>(joint: &Tensor, heads: attention::Heads, visible: &[usize]) -> Result<Tensor, LmError> {
    let (batch, length, _) = joint.size3()?;
    let mut out = Tensor::f_empty([batch, length, heads.out() as i64], (E::KIND, Device::Cpu))?;
    let mut work = Work::new();
    let rows = values::<E>(joint)?.chunks_exact(length as usize * heads.row());
    let outs = values_mut(&mut out)?.chunks_exact_mut(length as usize * heads.out());
    for (rows, out) in rows.zip(outs) {
        Sequence { rows, heads, visible }.forward(&mut work, out);
    }
    Ok(out)
}

/// Gradient of what [`Attention::forward`] had from our kernel.
fn own_backward(gradient: &Tensor, joint: &Tensor, heads: attention::Heads) -> Result<Tensor, LmError> {
    on_cpu!(joint, E => {
        let length = joint.size3()?.1 as usize;
        let gradient = gradient.f_contiguous()?;
        let mut out = joint.f_empty_like()?;
        let mut work = Work::new();
        let visible: Vec<usize> = (1..=length).collect();
        let rows = values::<E>(joint)?.chunks_exact(length * heads.row());
        let gradients = values::<E>(&gradient)?.chunks_exact(length * heads.out());
        let outs = values_mut::<E>(&mut out)?.chunks_exact_mut(length * heads.row());
        for ((rows, gradient), out) in rows.zip(gradients).zip(outs) {
            Sequence { rows, heads, visible: &visible }.backward(gradient, &mut work, out);
        }
        Ok(out)
    }, Err(LmError::Malformed("attention by our kernel on another device than the CPU".into())))
}

/// Key-value heads, one for each query head.
fn repeated(heads: &Tensor, q: &Tensor) -> Result<Tensor, LmError> {
    let repeats = q.size()[1] / heads.size()[1];
    match repeats {
        1 => Ok(heads.shallow_clone()),
        _ => Ok(heads.f_repeat_interleave_self_int(repeats, 1, None::<i64>)?),
    }
}

/// The reverse: gradients of the copies, summed by head.
fn summed(gradient: &Tensor, heads: &Tensor) -> Result<Tensor, LmError> {
    let [batch, wide, length, width] = <[i64; 4]>::from(gradient.size4()?);
    let count = heads.size()[1];
    match wide / count {
        1 => Ok(gradient.shallow_clone()),
        repeats => {
            let groups = gradient.f_reshape([batch, count, repeats, length, width])?;
            Ok(groups.f_sum_dim_intlist(2i64, false, gradient.kind())?)
        }
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
                cross_entropy(&x[0] * 9.0, &Tensor::arange(9, (Kind::Int64, Device::Cpu))).unwrap();
            vec![losses, gradient]
        });
    }

    #[test]
    fn products_are_what_libtorch_gives() {
        // More inputs than are multiplied at once, and sizes that fill no panel and no tile.
        for (inputs, outputs) in [(6, 5), (64, 32), (70, 130), (2 * 2048 + 70, 65)] {
            for rows in [1, 12, 97] {
                for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-3)] {
                    let value = |seed, shape: &[i64]| wave(seed, shape).to_kind(kind);
                    let (x, weight) = (value(1, &[rows, inputs]), value(2, &[outputs, inputs]));
                    let (bias, plus) = (value(3, &[outputs]), value(4, &[rows, outputs]));
                    let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);
                    let plain = wide(&x).matmul(&wide(&weight).tr());
                    let size = plain.abs().max().double_value(&[]).max(1.0);
                    let close = |found: Tensor, expected: Tensor| {
                        let difference = largest_difference(&wide(&found), &expected) / size;
                        assert!(difference < tolerance, "{kind:?} {rows} × {inputs} × {outputs}: {difference}");
                    };
                    close(linear(&x, &weight, None, None).unwrap(), plain.copy());
                    let all = &plain + wide(&bias) + wide(&plus);
                    close(linear(&x, &weight, Some(&bias), Some(&plus)).unwrap(), all);
                    let gelu = (&plain + wide(&bias)).gelu("none");
                    close(linear_gelu(&x, &weight, &bias).unwrap(), gelu);
                    let turned = weight.tr().contiguous();
                    close(matmul(&x, &turned, Some(&plus)).unwrap(), &plain + wide(&plus));
                    // Packed before or on the way, not a bit differs.
                    let frozen = |weight: &Tensor| Frozen::from(weight.shallow_clone());
                    let packed = linear(&x, &frozen(&weight), Some(&bias), Some(&plus)).unwrap();
                    assert_eq!(packed, linear(&x, &weight, Some(&bias), Some(&plus)).unwrap());
                    let packed = matmul(&x, &frozen(&turned), Some(&plus)).unwrap();
                    assert_eq!(packed, matmul(&x, &turned, Some(&plus)).unwrap());
                }
            }
        }
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
    fn rows_of_a_product_do_not_depend_on_their_company() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (x, weight) = (wave(1, &[100, 96]).to_kind(kind), wave(2, &[70, 96]).to_kind(kind));
            let all = linear(&x, &weight, None, None).unwrap();
            for row in [0, 5, 41, 99] {
                let alone = linear(&x.narrow(0, row, 1), &weight, None, None).unwrap();
                assert_eq!(alone, all.narrow(0, row, 1));
            }
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

    #[test]
    fn attention_is_the_same_by_autograd() {
        // Lengths that fill no panel, some panels, and several blocks; with query heads that share a key and without.
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
            for (name, length) in [("smollm2", 12), ("llama2", 64), ("smollm2", 2 * 96 + 20), ("smollm2", 13)] {
                let config = tiny(name).config;
                let width = (config.heads + 2 * config.kv_heads) * config.head_dim;
                let joint = wave(1, &[2, length, width]).to_kind(kind);
                let gradient = wave(9, &[2, length, config.heads * config.head_dim]).to_kind(kind);
                tch::no_grad(|| {
                    let one = Attention::forward(joint.copy(), &config).unwrap();
                    let wide = joint.to_kind(Kind::Double);
                    let (q, k, v) = split_heads(&wide, &config).unwrap();
                    let other = Attention::by_autograd(wide, one.heads, q, k, v).unwrap();
                    let close = |one: &Tensor, other: &Tensor| {
                        let difference = largest_difference(&one.to_kind(Kind::Double), other);
                        assert!(difference < tolerance, "{kind:?} {name} {length}: {difference}");
                    };
                    close(&one.output, &other.output);
                    let found = one.backward(&gradient).unwrap();
                    close(&found, &other.backward(&gradient.to_kind(Kind::Double)).unwrap());
                });
            }
        }
    }

    #[test]
    fn texts_attend_to_their_own_tokens() {
        let heads = 4;
        let texts = [(72, 70), (8, 3), (200, 200), (8, 7)].map(|(length, own)| Text { length, own });
        let all = texts.iter().map(|text| text.length as i64).sum();
        let joint = wave(5, &[all, 3 * heads * 32]);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.02)] {
            let found = attend(&joint.to_kind(kind), heads, &texts).unwrap();
            assert_eq!(found.is_some(), products::is_supported());
            let mut first = 0;
            for Text { length, own } in texts {
                let (length, own) = (length as i64, own as i64);
                let part = joint.narrow(0, first, length).unsqueeze(0);
                let is_padding = Tensor::arange(length, (Kind::Int64, Device::Cpu)).ge(own).reshape([1, 1, 1, -1]);
                let by_libtorch = |kind| {
                    let blocked = Tensor::zeros([1, 1, 1, length], (kind, Device::Cpu));
                    let blocked = blocked.masked_fill(&is_padding, f64::NEG_INFINITY);
                    attend_padded(&part.to_kind(kind), heads, &blocked).unwrap().get(0)
                };
                let found = found.as_ref().map_or_else(|| by_libtorch(kind), |all| all.narrow(0, first, length));
                let [found, expected] = [found.to_kind(Kind::Double), by_libtorch(Kind::Double)];
                let difference = largest_difference(&found.narrow(0, 0, own), &expected.narrow(0, 0, own));
                assert!(difference < tolerance, "{kind:?} {own} of {length}: {difference}");
                first += length;
            }
        }
    }
}
