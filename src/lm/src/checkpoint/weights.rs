//! Safetensors files of one folder, memory-mapped, as one set of named tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::read_json;
use crate::{LmError, device::Compute};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a folder's safetensors files.
pub(crate) struct Weights {
    folder: PathBuf,
    files: Vec<Mapped>,
    tensors: BTreeMap<String, Entry>,
}

struct Mapped {
    path: PathBuf,
    bytes: Mmap,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    begin: usize,
    end: usize,
}

impl Weights {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    pub(crate) fn open(folder: &Path) -> Result<Self, LmError> {
        let mut weights = Self { folder: folder.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        for name in weight_files(folder)? {
            weights.add(&folder.join(name))?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> Result<(), LmError> {
        let file = File::open(path).map_err(|error| {
            LmError::Malformed(format!("{}: {error}\nhelp: download the model again", path.display()))
        })?;
        // SAFETY: the map is read-only; a model folder is not written to while a stage runs, which is what mapping asks.
        let bytes =
            unsafe { Mmap::map(&file) }.map_err(|error| LmError::Malformed(format!("{}: {error}", path.display())))?;
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| {
            LmError::Malformed(format!(
                "{}: not a safetensors file, or cut short ({} bytes): {error}\nhelp: download the file again",
                path.display(),
                bytes.len()
            ))
        })?;
        let data = 8 + header;
        let expected = data + metadata.data_len();
        if bytes.len() < expected {
            return Err(LmError::Malformed(format!(
                "{}: cut short: {} bytes found, {expected} expected\nhelp: download the file again",
                path.display(),
                bytes.len()
            )));
        }
        for (name, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.iter().map(|&size| size as i64).collect(),
                begin: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            self.tensors.insert(name, entry);
        }
        self.files.push(Mapped { path: path.to_path_buf(), bytes });
        Ok(())
    }

    /// Whether a tensor of that name exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Loads one tensor in `compute`'s kind and device; checks its shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[i64], compute: Compute) -> Result<Tensor, LmError> {
        let entry = self.tensors.get(name).ok_or_else(|| {
            LmError::Malformed(format!(
                "{}: no tensor {name} (expected shape {shape:?}) among {} tensors\n\
                 help: the weights do not belong to this config.json",
                self.folder.display(),
                self.tensors.len()
            ))
        })?;
        let path = &self.files[entry.file].path;
        if entry.shape != shape {
            return Err(LmError::Malformed(format!(
                "{}: tensor {name} has shape {:?}, expected {shape:?}\n\
                 help: the weights do not belong to this config.json",
                path.display(),
                entry.shape
            )));
        }
        let kind = kind(entry.dtype).ok_or_else(|| {
            LmError::Malformed(format!(
                "{}: tensor {name} is {:?}, expected F32, F16 or BF16\nhelp: use an unquantised checkpoint, or GGUF",
                path.display(),
                entry.dtype
            ))
        })?;
        let bytes = &self.files[entry.file].bytes[entry.begin..entry.end];
        place(bytes, shape, kind, compute)
    }
}

/// Copies `bytes` once, converting, into a new tensor of `compute`.
pub(crate) fn place(bytes: &[u8], shape: &[i64], kind: Kind, compute: Compute) -> Result<Tensor, LmError> {
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes());
    let source = match aligned {
        // SAFETY: the view lives shorter than `bytes`, and the caller checked that they hold `shape` elements of `kind`.
        true => unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &[], kind, Device::Cpu)? },
        // The format does not promise alignment, and libtorch assumes it.
        false => Tensor::f_from_data_size(bytes, shape, kind)?,
    };
    let mut tensor = Tensor::f_empty(shape, (compute.kind, compute.device))?;
    tensor.f_copy_(&source)?;
    Ok(tensor)
}

fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// Names of the weight files of a folder, sorted.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<String>, LmError> {
    if folder.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_string()]);
    }
    let index = folder.join(INDEX);
    if !index.is_file() {
        return Err(LmError::Malformed(format!(
            "{}: neither {SINGLE} nor {INDEX} is there\n\
             help: only safetensors and GGUF weights are read; convert pickled ones (pytorch_model.bin) first",
            folder.display()
        )));
    }
    let value = read_json(&index)?;
    let malformed =
        |what: &str| LmError::Malformed(format!("{}: {what}\nhelp: download the model again", index.display()));
    let map = value.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| malformed("expected an object weight_map"))?;
    let mut files = std::collections::BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().filter(|name| !name.contains(['/', '\\']));
        files.insert(name.ok_or_else(|| malformed("weight_map: expected file names of this folder"))?.to_string());
    }
    Ok(files.into_iter().collect())
}
