//! What a corpus promises about its privacy units: written by partition, read by whoever spends budget on it.

use serde::{Deserialize, Serialize};

use crate::{LakeError, PrivateRoot, Zone, layout};

/// The terms under which a guarantee about a corpus holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusTerms {
    /// The column whose value is protected, with the rule that derives the unit from it, such as `id up to the first _`.
    pub privacy_unit: String,
    /// Most records of one unit.
    pub max_per_unit: u32,
    /// What conditions the guarantee, such as deduplication across records.
    pub conditions: Vec<String>,
}

impl CorpusTerms {
    /// Writes the terms of `corpus`, replacing those of an earlier partition.
    pub async fn write(&self, root: &PrivateRoot, corpus: &str) -> Result<(), LakeError> {
        let body = serde_json::to_vec_pretty(self).map_err(|error| LakeError::Malformed(error.to_string()))?;
        root.put(&layout::terms(corpus), body.into()).await
    }

    /// Reads the terms of `corpus`.
    pub async fn read(root: &PrivateRoot, corpus: &str) -> Result<Self, LakeError> {
        let body = root.get(&layout::terms(corpus)).await.map_err(|error| match error {
            LakeError::NotFound(found) => {
                LakeError::NotFound(format!("{found}; the corpus is not complete\nhelp: run partition to its end"))
            }
            other => other,
        })?;
        serde_json::from_slice(&body).map_err(|error| {
            LakeError::Malformed(format!(
                "{}/{}: {error}\nhelp: run partition again",
                root.url(),
                layout::terms(corpus)
            ))
        })
    }
}
