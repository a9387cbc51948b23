//! Checkpoints in the private root: adapter, optimizer and position, never the frozen base.
//!
//! A checkpoint is one safetensors object, written whole or not at all. It carries the fingerprint of the plan (corpus,
//! model, settings, ε); a resumed run refuses another plan's.

use std::collections::HashMap;

use bytes::Bytes;
use lake::{LakeError, PrivateRoot, Zone};
use lm::adapter::Lora;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use stage::Failure;
use tch::{Kind, Tensor};

use crate::adapter::Training;

/// Where a run keeps its checkpoints.
pub struct Checkpoints<'a> {
    root: &'a PrivateRoot,
    folder: String,
    fingerprint: &'a str,
}

impl<'a> Checkpoints<'a> {
    /// Checkpoints of `run` under the plan that `fingerprint` names.
    pub fn new(root: &'a PrivateRoot, run: &str, fingerprint: &'a str) -> Self {
        Self { root, folder: format!("runs/{run}/train/checkpoints"), fingerprint }
    }

    /// Writes the state after `training.steps` steps, then drops older checkpoints.
    pub async fn save(&self, training: &Training) -> Result<(), Failure> {
        let path = format!("{}/step-{:08}.safetensors", self.folder, training.steps);
        let body = encode(training, self.fingerprint)?;
        self.root.put(&path, body).await?;
        for older in self.root.list(&self.folder).await?.into_iter().filter(|other| *other < path) {
            self.root.delete(&older).await?;
        }
        Ok(())
    }

    /// The newest checkpoint, with `fresh`'s shapes, or `fresh` where there is none.
    pub async fn resume(&self, fresh: Training) -> Result<Training, Failure> {
        match self.root.list(&self.folder).await?.pop() {
            None => Ok(fresh),
            Some(path) => {
                let body = self.root.get(&path).await?;
                decode(&body, fresh.lora, self.fingerprint).map_err(|found| {
                    Failure::from(LakeError::Malformed(format!(
                        "{}/{path}: {found}\nhelp: remove the object to train from the start under the same reservation",
                        self.root.url()
                    )))
                })
            }
        }
    }
}

fn groups(training: &Training) -> impl Iterator<Item = (String, &Tensor)> {
    let names = || training.lora.tensors.iter().map(|(name, _)| name);
    let adapter = training.lora.tensors.iter().map(|(name, tensor)| (format!("adapter.{name}"), tensor));
    let first = names().zip(&training.first).map(|(name, tensor)| (format!("first.{name}"), tensor));
    let second = names().zip(&training.second).map(|(name, tensor)| (format!("second.{name}"), tensor));
    adapter.chain(first).chain(second)
}

fn encode(training: &Training, fingerprint: &str) -> Result<Bytes, Failure> {
    let bug = |error: String| Failure::Bug(format!("checkpoint: {error}"));
    let mut bodies = Vec::new();
    for (name, tensor) in groups(training) {
        let values = Vec::<f32>::try_from(tensor.to_device(tch::Device::Cpu).flatten(0, -1))
            .map_err(|error| bug(error.to_string()))?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape: Vec<usize> = tensor.size().iter().map(|&size| size as usize).collect();
        bodies.push((name, shape, bytes));
    }
    let views = bodies
        .iter()
        .map(|(name, shape, bytes)| Ok((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| bug(error.to_string()))?;
    let metadata = HashMap::from([
        ("steps".to_string(), training.steps.to_string()),
        ("fingerprint".to_string(), fingerprint.to_string()),
    ]);
    let body = safetensors::serialize(views, Some(metadata)).map_err(|error| bug(error.to_string()))?;
    Ok(body.into())
}

fn decode(body: &[u8], lora: Lora, fingerprint: &str) -> Result<Training, String> {
    let (_, header) = SafeTensors::read_metadata(body).map_err(|error| error.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if metadata.get("fingerprint").map(String::as_str) != Some(fingerprint) {
        return Err("the checkpoint belongs to another plan; resuming it would change ε".into());
    }
    let steps = metadata.get("steps").and_then(|steps| steps.parse().ok()).ok_or("no step count")?;
    let file = SafeTensors::deserialize(body).map_err(|error| error.to_string())?;
    let mut training = Training::new(lora);
    training.steps = steps;
    let names: Vec<String> = training.lora.tensors.iter().map(|(name, _)| name.clone()).collect();
    for (index, name) in names.iter().enumerate() {
        let like = training.lora.tensors[index].1.shallow_clone();
        training.lora.tensors[index].1 = read(&file, &format!("adapter.{name}"), &like)?;
        training.first[index] = read(&file, &format!("first.{name}"), &like)?;
        training.second[index] = read(&file, &format!("second.{name}"), &like)?;
    }
    Ok(training)
}

fn read(file: &SafeTensors, name: &str, like: &Tensor) -> Result<Tensor, String> {
    let view = file.tensor(name).map_err(|error| format!("tensor {name}: {error}"))?;
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    if view.dtype() != Dtype::F32 || shape != like.size() {
        return Err(format!("tensor {name}: found {:?} {shape:?}, expected F32 {:?}", view.dtype(), like.size()));
    }
    Ok(Tensor::from_data_size(view.data(), &shape, Kind::Float).to_device(like.device()))
}
