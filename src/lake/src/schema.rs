//! Columns of doppel's tables: names, types and what a reader may rely on. All columns are non-null.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

/// The corpus: one row for each record that partition kept.
pub fn corpus() -> SchemaRef {
    columns(&["record_id", "unit", "text", "split"])
}

/// Sampled instructions.
pub fn synthetic() -> SchemaRef {
    columns(&["id", "shard", "seed", "text", "tokens", "finish_reason", "mean_logprob"])
}

/// Embeddings of public texts.
pub fn embeddings() -> SchemaRef {
    columns(&["id", "embedding"])
}

/// Embeddings of the corpus.
pub fn private_embeddings() -> SchemaRef {
    columns(&["id", "unit", "split", "embedding"])
}

/// The cluster of each synthetic row.
pub fn clusters() -> SchemaRef {
    columns(&["id", "bin", "distance"])
}

/// Noisy votes and what was made of them, by bin.
pub fn histogram() -> SchemaRef {
    columns(&["bin", "noisy_count", "synthetic_count", "selected_count"])
}

/// The resampled texts.
pub fn selected() -> SchemaRef {
    columns(&["id", "text", "bin"])
}

/// Loss by step and split.
pub fn loss() -> SchemaRef {
    columns(&["step", "split", "loss"])
}

/// Distance of sets of texts to the real test records.
pub fn comparison() -> SchemaRef {
    columns(&["set", "total_variation"])
}

/// Counts and shares behind [`comparison`], by bin.
pub fn comparison_bins() -> SchemaRef {
    columns(&["bin", "set", "count", "share"])
}

/// The type that a column of this name has in every table of doppel's; `None` for names that are not ours.
///
/// Scans hold foreign tables to it, so that a stage that asks for `text` gets strings and nothing else.
pub fn expected_type(column: &str) -> Option<DataType> {
    Some(match column {
        "record_id" | "unit" | "text" | "split" | "id" | "finish_reason" | "set" => DataType::Utf8,
        "shard" | "tokens" | "bin" => DataType::Int32,
        "seed" | "step" | "count" | "noisy_count" | "synthetic_count" | "selected_count" => DataType::Int64,
        "mean_logprob" | "distance" => DataType::Float32,
        "loss" | "total_variation" | "share" => DataType::Float64,
        "embedding" => DataType::List(Arc::new(Field::new("element", DataType::Float32, false))),
        _ => return None,
    })
}

fn columns(names: &[&str]) -> SchemaRef {
    let field = |name: &&str| expected_type(name).map(|kind| Field::new(*name, kind, false));
    Arc::new(Schema::new(names.iter().filter_map(field).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_column_has_a_type() {
        assert_eq!(super::synthetic().fields().len(), 7);
        assert_eq!(super::private_embeddings().fields().len(), 4);
        assert_eq!(super::histogram().fields().len(), 4);
        assert_eq!(super::comparison_bins().fields().len(), 4);
    }
}
