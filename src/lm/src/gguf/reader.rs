//! The header of a GGUF file. Every read is bounds-checked: a file cut short is an error that says where.

use std::collections::BTreeMap;

/// A metadata value. Integers and floats of all widths are one each.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer.
    Integer(i64),
    /// Any float.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// A string.
    Text(String),
    /// A list of values of one type.
    List(Vec<Value>),
}

impl Value {
    /// What an error calls it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bool(_) => "a flag",
            Value::Text(_) => "a string",
            Value::List(_) => "a list",
        }
    }
}

pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
    /// Where the tensors' data begin.
    pub(super) data: usize,
}

pub(super) struct TensorInfo {
    pub(super) name: String,
    /// In the file's order, fastest first.
    pub(super) dimensions: Vec<u64>,
    /// ggml's type number.
    pub(super) kind: u32,
    pub(super) offset: u64,
}

/// Reads the header; the error says what was found and expected, and the caller adds the file's name.
pub(super) fn read(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != b"GGUF" {
        return Err("not a GGUF file: it does not begin with GGUF\nhelp: check the path of the model".into());
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF version {version}, expected 2 or 3\nhelp: convert the model again"));
    }
    let tensor_count = cursor.u64()?;
    let value_count = cursor.u64()?;
    let mut metadata = BTreeMap::new();
    for _ in 0..value_count {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, 0)?;
        metadata.insert(key, value);
    }
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        let name = cursor.text()?;
        let dimensions = cursor.u32()?;
        if dimensions > 4 {
            return Err(format!("tensor {name} has {dimensions} dimensions, expected at most 4"));
        }
        let dimensions = (0..dimensions).map(|_| cursor.u64()).collect::<Result<_, _>>()?;
        tensors.push(TensorInfo { name, dimensions, kind: cursor.u32()?, offset: cursor.u64()? });
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Integer(alignment)) if *alignment > 0 && *alignment <= 1 << 20 => *alignment as usize,
        Some(_) => return Err("general.alignment: expected a positive integer".into()),
    };
    Ok(Header { metadata, tensors, data: cursor.at.next_multiple_of(alignment) })
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            format!(
                "cut short in the header: {count} bytes wanted at {}, the file has {}\nhelp: download the file again",
                self.at,
                self.bytes.len()
            )
        })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, String> {
        let at = self.at;
        let length = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("the string at byte {at} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Integer(self.array::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < 4 => {
                let kind = self.u32()?;
                let count = self.u64()?;
                // No capacity in advance: a corrupt count must end in "cut short", not in an allocation.
                let mut items = Vec::new();
                for _ in 0..count {
                    items.push(self.value(kind, depth + 1)?);
                }
                Value::List(items)
            }
            10 => Value::Integer(i64::try_from(self.u64()?).unwrap_or(i64::MAX)),
            11 => Value::Integer(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} at byte {}: expected 0 to 12", self.at)),
        })
    }
}
