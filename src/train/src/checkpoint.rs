//! Checkpoints in the private root: adapter, optimizer and position, never the frozen base.
//!
//! A checkpoint is one safetensors object, written whole or not at all. It carries the fingerprint of the plan (corpus,
//! model, settings, ε); a resumed run refuses another plan's.

use std::collections::HashMap;

use bytes::Bytes;
use lake::{LakeError, PrivateRoot, Zone, layout};
use lm::LmError;
use lm::adapter::Lora;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use stage::Failure;
use tch::{Kind, Tensor};

use crate::adapter::Training;
use crate::failure;

/// Where a run keeps its checkpoints.
pub struct Checkpoints<'a> {
    root: &'a PrivateRoot,
    folder: String,
    fingerprint: String,
}

impl<'a> Checkpoints<'a> {
    /// Checkpoints of `stage` of `run` under the plan that `fingerprint` names.
    pub fn new(root: &'a PrivateRoot, run: &str, stage: &str, fingerprint: String) -> Self {
        Self { root, folder: format!("{}/checkpoints", layout::working(run, stage)), fingerprint }
    }

    /// Writes the state after `training.steps` steps, then drops older checkpoints.
    pub async fn save(&self, training: &Training) -> Result<(), Failure> {
        let path = self.path(training);
        self.root.put(&path, encode(training, &self.fingerprint)?).await?;
        self.drop_before(&path).await
    }

    /// The same after the last step, unless a copy of this stage was first: the one result is what stands there then.
    pub async fn save_last(&self, training: &Training) -> Result<(), Failure> {
        let path = self.path(training);
        self.root.put_if_absent(&path, encode(training, &self.fingerprint)?).await?;
        self.drop_before(&path).await
    }

    fn path(&self, training: &Training) -> String {
        format!("{}/step-{:08}.safetensors", self.folder, training.steps)
    }

    async fn drop_before(&self, path: &str) -> Result<(), Failure> {
        for older in self.root.list(&self.folder).await?.into_iter().filter(|other| other.as_str() < path) {
            self.root.delete(&older).await?;
        }
        Ok(())
    }

    /// The newest checkpoint, with `fresh`'s shapes, or `fresh` where there is none.
    pub async fn resume(&self, fresh: Training) -> Result<Training, Failure> {
        let Some((path, body)) = self.newest().await? else { return Ok(fresh) };
        decode(&body, fresh.lora, &self.fingerprint).map_err(|error| match error {
            LmError::Malformed(found) => Failure::Input(format!(
                "{}: {found}\nhelp: remove the object to train from the start under the same reservation",
                self.root.url_of(&path)
            )),
            other => failure(other),
        })
    }

    async fn newest(&self) -> Result<Option<(String, Bytes)>, Failure> {
        while let Some(path) = self.root.list(&self.folder).await?.pop() {
            match self.root.get(&path).await {
                Ok(body) => return Ok(Some((path, body))),
                // A second copy of this stage has written a newer one since, and dropped this.
                Err(LakeError::NotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
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
        let bytes = to_bytes(tensor).map_err(failure)?;
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

fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>, LmError> {
    let values = Vec::<f32>::try_from(tensor.f_to_device(tch::Device::Cpu)?.f_flatten(0, -1)?)?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn decode(body: &[u8], lora: Lora, fingerprint: &str) -> Result<Training, LmError> {
    let malformed = |found: String| LmError::Malformed(found);
    let (_, header) = SafeTensors::read_metadata(body).map_err(|error| malformed(error.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if metadata.get("fingerprint").map(String::as_str) != Some(fingerprint) {
        return Err(malformed("the checkpoint belongs to another plan; resuming it would change ε".into()));
    }
    let steps = metadata.get("steps").and_then(|steps| steps.parse().ok());
    let steps = steps.ok_or_else(|| malformed("no step count".into()))?;
    let file = SafeTensors::deserialize(body).map_err(|error| malformed(error.to_string()))?;
    let mut training = Training { steps, ..Training::new(lora) };
    for (name, tensor) in &mut training.lora.tensors {
        training.first.push(read(&file, &format!("first.{name}"), tensor)?);
        training.second.push(read(&file, &format!("second.{name}"), tensor)?);
        *tensor = read(&file, &format!("adapter.{name}"), tensor)?;
    }
    Ok(training)
}

fn read(file: &SafeTensors, name: &str, like: &Tensor) -> Result<Tensor, LmError> {
    let malformed = |found: String| LmError::Malformed(format!("tensor {name}: {found}"));
    let view = file.tensor(name).map_err(|error| malformed(error.to_string()))?;
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    if view.dtype() != Dtype::F32 || shape != like.size() {
        return Err(malformed(format!("found {:?} {shape:?}, expected F32 {:?}", view.dtype(), like.size())));
    }
    Ok(Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?.f_to_device(like.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    const PLAN: &str = "0123abcd";

    /// The state after three steps of an adapter for a tiny decoder.
    fn trained() -> Training {
        let (_, lora) = testing::tiny(tempfile::tempdir().unwrap().path());
        let moments = |shift: f64| lora.tensors.iter().map(|(_, tensor)| tensor * 0.1 + shift).collect();
        let (first, second) = (moments(0.0), moments(1.0));
        Training { lora, first, second, steps: 3 }
    }

    /// An adapter of the same shape with other values.
    fn untrained() -> Lora {
        let mut lora = trained().lora;
        for (_, tensor) in &mut lora.tensors {
            *tensor = tensor.zeros_like();
        }
        lora
    }

    fn values(training: &Training) -> Vec<(String, Vec<u8>)> {
        groups(training).map(|(name, tensor)| (name, to_bytes(tensor).unwrap())).collect()
    }

    #[track_caller]
    fn refused(body: &[u8], plan: &str, expected: &str) {
        match decode(body, untrained(), plan) {
            Err(LmError::Malformed(found)) => assert!(found.contains(expected), "{found}"),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was accepted"),
        }
    }

    #[test]
    fn a_checkpoint_gives_back_what_it_was_made_of() {
        let training = trained();
        let read = decode(&encode(&training, PLAN).unwrap(), untrained(), PLAN).unwrap();
        assert_eq!(read.steps, 3);
        assert!(values(&read) == values(&training));
    }

    #[tokio::test]
    async fn of_two_last_checkpoints_the_first_stays() {
        let folder = tempfile::tempdir().unwrap();
        let root = PrivateRoot::open(folder.path().to_str().unwrap(), &lake::StorageOptions::default()).await.unwrap();
        let checkpoints = Checkpoints::new(&root, "demo", "train", PLAN.into());
        let (first, mut second) = (trained(), trained());
        second.lora = untrained();
        checkpoints.save(&Training { steps: 2, ..trained() }).await.unwrap();
        checkpoints.save_last(&first).await.unwrap();
        checkpoints.save_last(&second).await.unwrap();
        assert!(values(&checkpoints.resume(Training::new(untrained())).await.unwrap()) == values(&first));
    }

    #[test]
    fn a_checkpoint_of_another_plan_is_refused() {
        refused(&encode(&trained(), PLAN).unwrap(), "4567cdef", "another plan");
    }

    #[test]
    fn a_checkpoint_that_was_cut_is_refused() {
        let body = encode(&trained(), PLAN).unwrap();
        for length in [0, 4, 8, 100, body.len() / 2, body.len() - 1] {
            refused(&body[..length], PLAN, "");
        }
    }

    #[test]
    fn a_checkpoint_of_another_shape_is_refused() {
        let mut training = trained();
        training.first[1] = training.first[1].flatten(0, -1);
        refused(&encode(&training, PLAN).unwrap(), PLAN, "expected F32");
    }

    #[test]
    fn a_checkpoint_holds_no_tensor_of_the_base_model() {
        let training = trained();
        let body = encode(&training, PLAN).unwrap();
        let file = SafeTensors::deserialize(&body).unwrap();
        let mut expected: Vec<String> = Vec::new();
        for (name, _) in &training.lora.tensors {
            assert!(name.contains(".lora_A.") || name.contains(".lora_B."), "{name}");
            expected.extend(["adapter", "first", "second"].map(|group| format!("{group}.{name}")));
        }
        let mut found: Vec<String> = file.names().iter().map(|name| name.to_string()).collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }
}
