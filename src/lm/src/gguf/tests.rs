//! Blocks against gguf-py (the package `gguf` 0.19.0), whose values are golden here; files against what they promise.

use super::*;
use crate::device::Compute;

const CPU: Compute = Compute { device: Device::Cpu, kind: Kind::Float };

/// One block of each type, bytes and values in hex, by tests/golden/gguf_blocks.py.
const GOLDEN: &str = include_str!("golden.json");

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn blocks_become_the_floats_that_gguf_py_makes() {
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    let golden = golden.as_array().unwrap();
    assert_eq!(golden.len(), 8);
    for case in golden {
        let number = case["type"].as_u64().unwrap() as u32;
        let kind = BlockType::new(number).unwrap();
        let blocks = hex(case["blocks"].as_str().unwrap());
        let expected: Vec<f32> = hex(case["values"].as_str().unwrap())
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(kind.bytes_of(&[expected.len() as u64]), Some(blocks.len()), "{kind:?}");
        let mut found = vec![0.0; expected.len()];
        kind.dequantise(&blocks, &mut found);
        assert_eq!(found, expected, "{kind:?}");
    }
}

#[test]
fn many_blocks_are_shared_out_and_stay_in_order() {
    let count = 3 * 4096 * 32 + 32;
    let blocks: Vec<u8> = (0..count / 32)
        .flat_map(|block| {
            let scale = half::f16::from_f32((block % 7) as f32).to_le_bytes();
            scale.into_iter().chain((0..32).map(|value| value as u8))
        })
        .collect();
    let mut found = vec![0.0; count];
    BlockType::Q8_0.dequantise(&blocks, &mut found);
    for (at, value) in found.iter().enumerate() {
        assert_eq!(*value, ((at / 32) % 7 * (at % 32)) as f32);
    }
}

#[test]
fn rows_are_whole_blocks() {
    assert_eq!(BlockType::Q4_0.bytes_of(&[64, 3]), Some(2 * 3 * 18));
    assert_eq!(BlockType::Q4_0.bytes_of(&[33, 3]), None);
    assert_eq!(BlockType::F32.bytes_of(&[u64::MAX, u64::MAX]), None);
}

/// A file with one F32 tensor `x` of shape `[2, 3]` and some metadata.
pub(crate) fn small_file() -> Vec<u8> {
    let text = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    };
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.extend(3u64.to_le_bytes());
    file.extend(text("general.architecture"));
    file.extend(8u32.to_le_bytes());
    file.extend(text("mamba"));
    file.extend(text("list"));
    file.extend(9u32.to_le_bytes());
    file.extend(5u32.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend((-1i32).to_le_bytes());
    file.extend(7i32.to_le_bytes());
    file.extend(text("number"));
    file.extend(6u32.to_le_bytes());
    file.extend(0.5f32.to_le_bytes());
    file.extend(text("x"));
    file.extend(2u32.to_le_bytes());
    file.extend(3u64.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend((0..6).flat_map(|value| (value as f32).to_le_bytes()));
    file
}

fn open(bytes: &[u8]) -> Result<Gguf, LmError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

fn error(result: Result<impl Sized, LmError>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_file_gives_its_metadata_and_tensors() {
    let gguf = open(&small_file()).unwrap();
    assert_eq!(gguf.text("general.architecture").unwrap(), "mamba");
    assert_eq!(gguf.integers("list").unwrap(), [-1, 7]);
    assert_eq!(gguf.number("number").unwrap(), Some(0.5));
    assert_eq!(gguf.shape("x").unwrap(), [2, 3]);
    let x = gguf.tensor("x", &[2, 3], CPU).unwrap();
    assert_eq!(Vec::<f32>::try_from(x.reshape([-1])).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn every_cut_of_a_file_is_an_error_and_never_a_panic() {
    let file = small_file();
    for length in 0..file.len() {
        let message = error(open(&file[..length]));
        assert!(message.contains("model.gguf"), "{message}");
        assert!(length == 0 || message.contains("cut short"), "{length}: {message}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let gguf = open(&small_file()).unwrap();
    assert!(error(gguf.tensor("x", &[3, 2], CPU)).contains("tensor x has shape [2, 3], expected [3, 2]"));
    assert!(error(gguf.tensor("y", &[1], CPU)).contains("no tensor y"));
    assert!(error(gguf.text("number")).contains("number: found a number, expected a string"));
    let mut other = small_file();
    other[4] = 9;
    assert!(error(open(&other)).contains("GGUF version 9, expected 2 or 3"));
    assert!(error(open(b"PK\x03\x04....")).contains("not a GGUF file"));
}
