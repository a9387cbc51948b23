//! A decoder's weights packed once for sampling on CPU ([`crate::generate::native`]).

use std::sync::Arc;

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::{Decoder, Layer};
use crate::LmError;
use crate::checkpoint::DecoderConfig;
use crate::products::{Factor, Matrix, copy, is_supported};

/// A decoder's weights as the products here want them.
pub(crate) struct Weights<E> {
    pub(crate) config: DecoderConfig,
    pub(crate) embedding: Vec<E>,
    pub(crate) layers: Vec<LayerWeights<E>>,
    pub(crate) norm: Vec<f32>,
    pub(crate) output: Matrix<E>,
    /// RoPE's angle per position of each pair.
    pub(crate) frequencies: Vec<f32>,
}

/// The same of a layer.
pub(crate) struct LayerWeights<E> {
    pub(crate) input_norm: Vec<f32>,
    pub(crate) qkv: Matrix<E>,
    pub(crate) bias: Vec<f32>,
    pub(crate) o: Matrix<E>,
    pub(crate) post_norm: Vec<f32>,
    pub(crate) gate_up: Matrix<E>,
    pub(crate) down: Matrix<E>,
}

/// A packed decoder of either kind.
#[derive(Clone)]
pub(crate) enum Packed {
    /// bfloat16.
    Bf16(Arc<Weights<bf16>>),
    /// float32.
    F32(Arc<Weights<f32>>),
}

impl Packed {
    /// Packs `decoder`; `None` where libtorch has to compute: another device, a CPU without the instructions, or widths that
    /// are not whole groups of inputs.
    pub(crate) fn new(decoder: &Decoder) -> Result<Option<Self>, LmError> {
        let config = &decoder.config;
        let even = (config.hidden_size | config.intermediate_size) % 2 == 0;
        match (decoder.compute.device, decoder.compute.kind) {
            (Device::Cpu, Kind::BFloat16) if is_supported() && even => {
                Ok(Some(Self::Bf16(Arc::new(Weights::pack(decoder)?))))
            }
            (Device::Cpu, Kind::Float) if is_supported() => Ok(Some(Self::F32(Arc::new(Weights::pack(decoder)?)))),
            _ => Ok(None),
        }
    }
}

impl<E: Factor> Weights<E> {
    fn pack(decoder: &Decoder) -> Result<Self, LmError> {
        let config = decoder.config.clone();
        let layer = |layer: &Layer| -> Result<LayerWeights<E>, LmError> {
            Ok(LayerWeights {
                input_norm: floats(&layer.input_norm)?,
                qkv: Matrix::pack(&layer.qkv)?,
                bias: layer.qkv_bias.as_ref().map(floats).transpose()?.unwrap_or_default(),
                o: Matrix::pack(&layer.o)?,
                post_norm: floats(&layer.post_norm)?,
                gate_up: Matrix::pack(&layer.gate_up)?,
                down: Matrix::pack(&layer.down)?,
            })
        };
        let mut embedding = vec![E::narrow(0.0); decoder.embedding.numel()];
        copy(&decoder.embedding, &mut embedding)?;
        Ok(Self {
            embedding,
            layers: decoder.layers.iter().map(layer).collect::<Result<_, _>>()?,
            norm: floats(&decoder.norm)?,
            output: Matrix::pack(&decoder.output)?,
            frequencies: floats(decoder.rope.frequencies())?,
            config,
        })
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>, LmError> {
    Ok(Vec::<f32>::try_from(tensor.f_to_kind(Kind::Float)?.f_reshape([-1i64])?)?)
}
