//! GGUF files: metadata, tensors and dequantisation (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K).
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Versions 2 and 3, little endian. What the
//! names mean for one architecture is not known here; see `checkpoint::llama_gguf`.

mod blocks;
mod reader;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use tch::{Device, Kind, Tensor};

use crate::{LmError, device::Compute};
use blocks::BlockType;
pub use reader::Value;

/// A GGUF file, memory-mapped.
pub struct Gguf {
    path: PathBuf,
    bytes: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    /// In libtorch's order, slowest dimension first: the reverse of the file's.
    shape: Vec<i64>,
    kind: BlockType,
    begin: usize,
    end: usize,
}

impl Gguf {
    /// Opens a file and checks that it is whole.
    pub fn open(path: &Path) -> Result<Self, LmError> {
        let file = File::open(path).map_err(|error| LmError::Malformed(format!("{}: {error}", path.display())))?;
        // SAFETY: the map is read-only; a model file is not written to while a stage runs, which is what mapping asks.
        let bytes =
            unsafe { Mmap::map(&file) }.map_err(|error| LmError::Malformed(format!("{}: {error}", path.display())))?;
        let mut gguf = Self { path: path.into(), bytes, metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        let header = reader::read(&gguf.bytes).map_err(|what| gguf.malformed(&what))?;
        gguf.metadata = header.metadata;
        for tensor in header.tensors {
            let entry = gguf.entry(&tensor, header.data)?;
            gguf.tensors.insert(tensor.name, entry);
        }
        Ok(gguf)
    }

    fn entry(&self, tensor: &reader::TensorInfo, data: usize) -> Result<Entry, LmError> {
        let name = &tensor.name;
        let kind = BlockType::new(tensor.kind).ok_or_else(|| {
            self.malformed(&format!(
                "tensor {name} has ggml type {}, expected one of {}\nhelp: choose another quantisation of the model",
                tensor.kind,
                BlockType::known()
            ))
        })?;
        let shape: Vec<i64> = tensor.dimensions.iter().rev().map(|&size| size as i64).collect();
        let size = kind.bytes_of(&tensor.dimensions).ok_or_else(|| {
            self.malformed(&format!("tensor {name}: its shape {shape:?} is not made of whole blocks of {kind:?}"))
        })?;
        let begin = usize::try_from(tensor.offset).ok().and_then(|offset| data.checked_add(offset));
        let range = begin.and_then(|begin| Some((begin, begin.checked_add(size)?)));
        match range {
            Some((begin, end)) if end <= self.bytes.len() => Ok(Entry { shape, kind, begin, end }),
            _ => Err(self.malformed(&format!(
                "cut short: tensor {name} needs {size} bytes at {}, the file has {}\nhelp: download the file again",
                begin.unwrap_or(usize::MAX),
                self.bytes.len()
            ))),
        }
    }

    /// An error about this file.
    pub(crate) fn malformed(&self, what: &str) -> LmError {
        LmError::Malformed(format!("{}: {what}", self.path.display()))
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Names of all tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a tensor of that name exists.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor's shape, slowest dimension first.
    pub fn shape(&self, name: &str) -> Result<&[i64], LmError> {
        self.find(name).map(|entry| entry.shape.as_slice())
    }

    fn find(&self, name: &str) -> Result<&Entry, LmError> {
        self.tensors.get(name).ok_or_else(|| {
            self.malformed(&format!(
                "no tensor {name} among {}\nhelp: the file does not hold a whole model, or another kind of model",
                self.tensors.len()
            ))
        })
    }

    /// Loads one tensor, dequantised, in `compute`'s kind and device; checks its shape.
    pub fn tensor(&self, name: &str, shape: &[i64], compute: Compute) -> Result<Tensor, LmError> {
        let entry = self.find(name)?;
        if entry.shape != shape {
            return Err(self.malformed(&format!(
                "tensor {name} has shape {:?}, expected {shape:?}\nhelp: the metadata and the tensors disagree",
                entry.shape
            )));
        }
        let bytes = &self.bytes[entry.begin..entry.end];
        let values = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
        let count = shape.iter().product::<i64>() as usize;
        // SAFETY: a new contiguous CPU tensor of `count` floats that nobody else sees yet.
        let out = unsafe { std::slice::from_raw_parts_mut(values.data_ptr().cast::<f32>(), count) };
        entry.kind.dequantise(bytes, out);
        Ok(values.f_to_device(compute.device)?.f_to_kind(compute.kind)?)
    }

    /// A metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A metadata string.
    pub fn text(&self, key: &str) -> Result<&str, LmError> {
        match self.value(key) {
            Some(Value::Text(text)) => Ok(text),
            other => Err(self.unexpected(key, other, "a string")),
        }
    }

    /// A metadata integer, if it is there and is one.
    pub fn integer(&self, key: &str) -> Option<i64> {
        match self.value(key) {
            Some(Value::Integer(value)) => Some(*value),
            _ => None,
        }
    }

    /// A metadata flag, if it is there and is one.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.value(key) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    /// A metadata number, if it is there.
    pub fn number(&self, key: &str) -> Result<Option<f64>, LmError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Float(value)) if value.is_finite() => Ok(Some(*value)),
            other => Err(self.unexpected(key, other, "a number")),
        }
    }

    /// A metadata number.
    pub fn required_number(&self, key: &str) -> Result<f64, LmError> {
        self.number(key)?.ok_or_else(|| self.unexpected(key, None, "a number"))
    }

    /// A positive metadata integer.
    pub fn size(&self, key: &str) -> Result<i64, LmError> {
        self.optional_size(key)?.ok_or_else(|| self.unexpected(key, None, "a positive integer"))
    }

    /// A positive metadata integer, if it is there.
    pub fn optional_size(&self, key: &str) -> Result<Option<i64>, LmError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(value)) if (1..=i64::from(i32::MAX)).contains(value) => Ok(Some(*value)),
            other => Err(self.unexpected(key, other, "a positive integer")),
        }
    }

    /// A metadata list of strings.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>, LmError> {
        fn text(value: &Value) -> Option<&str> {
            match value {
                Value::Text(text) => Some(text),
                _ => None,
            }
        }
        self.list(key, "a list of strings", text)
    }

    /// A metadata list of integers.
    pub fn integers(&self, key: &str) -> Result<Vec<i64>, LmError> {
        let integer = |value: &Value| match value {
            Value::Integer(value) => Some(*value),
            _ => None,
        };
        self.list(key, "a list of integers", integer)
    }

    /// A metadata list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Vec<f64>, LmError> {
        let number = |value: &Value| match value {
            Value::Float(value) => Some(*value),
            _ => None,
        };
        self.list(key, "a list of numbers", number)
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        item: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Vec<T>, LmError> {
        let items = match self.value(key) {
            Some(Value::List(items)) => items.iter().map(item).collect::<Option<Vec<T>>>(),
            _ => None,
        };
        items.ok_or_else(|| self.unexpected(key, self.value(key), expected))
    }

    fn unexpected(&self, key: &str, found: Option<&Value>, expected: &str) -> LmError {
        let found = found.map_or("nothing", Value::type_name);
        self.malformed(&format!(
            "{key}: found {found}, expected {expected}\nhelp: the file does not hold a whole model"
        ))
    }
}

#[cfg(test)]
mod tests;
