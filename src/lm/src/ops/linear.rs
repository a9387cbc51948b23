//! Products of matrices, by our own where they can be ([`products`]), else by libtorch.

use std::ops::Deref;
use std::sync::OnceLock;

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::{values, values_mut};
use crate::LmError;
use crate::device::Compute;
use crate::kernels::Element;
use crate::products::{self, Activation, Factor, Multiplier, Packed, Plus, View, Weight};

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

impl Frozen {
    /// It packed for our products, as [`Factored::packed`], where they can have so many inputs.
    pub(super) fn own<E: Factor>(&self, turned: bool) -> Result<Option<&Packed>, LmError> {
        let (outputs, inputs) = self.size2()?;
        match multiplies::<E>(if turned { inputs } else { outputs }) {
            true => self.packed::<E>(turned),
            false => Ok(None),
        }
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

pub(super) fn added(mut product: Tensor, rows: Option<&Tensor>) -> Result<Tensor, LmError> {
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
pub(super) fn multiplies<E: Factor>(inputs: i64) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tests::{largest_difference, wave};

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
}
