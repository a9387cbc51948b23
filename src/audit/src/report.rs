//! What the audit tells.

use privacy::training::TrainingMechanism;
use serde::Serialize;
use serde_json::json;
use stage::Summary;

/// Outcome of one audit.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Finding {
    /// Which one.
    pub audit: &'static str,
    /// ε as accounted.
    pub claimed_epsilon: f64,
    /// ε that the attack proves.
    pub lower_bound: f64,
    /// Canaries; for single steps, canaries in all steps.
    pub canaries: u64,
    /// How many of them the attacker dared to guess.
    pub guesses: u64,
    /// How many guesses were right.
    pub right: u64,
}

/// All audits of one mechanism.
pub(crate) struct Report {
    pub mechanism: TrainingMechanism,
    pub delta: f64,
    pub confidence: f64,
    pub audits: Vec<Finding>,
}

impl Report {
    /// Why the claim cannot be true, if an audit proves that.
    pub fn refuted(&self) -> Option<String> {
        let finding = self.audits.iter().find(|finding| finding.lower_bound > finding.claimed_epsilon)?;
        Some(format!(
            "the audit of {} proves ε ≥ {:.3} with {} % confidence, and ε = {:.3} is claimed at δ = {:e}",
            finding.audit,
            finding.lower_bound,
            100.0 * self.confidence,
            finding.claimed_epsilon,
            self.delta
        ))
    }

    /// The same for people and for machines.
    pub fn summary(&self) -> Summary {
        let audits = &self.audits;
        let holds = self.refuted().is_none();
        Summary {
            text: self.table(),
            json: json!({
                "mechanism": {
                    "sampling_probability": self.mechanism.sampling_probability(),
                    "noise_multiplier": self.mechanism.noise_multiplier(),
                    "steps": self.mechanism.steps(),
                },
                "delta": self.delta, "confidence": self.confidence, "audits": audits, "refuted": !holds,
            }),
        }
    }

    fn table(&self) -> String {
        let headings = ["audit", "canaries", "guesses", "right", "claimed ε", "lower bound"].map(String::from);
        let rows = self.audits.iter().map(|finding| {
            [
                finding.audit.to_string(),
                finding.canaries.to_string(),
                finding.guesses.to_string(),
                finding.right.to_string(),
                format!("{:.3}", finding.claimed_epsilon),
                format!("{:.3}", finding.lower_bound),
            ]
        });
        let rows: Vec<[String; 6]> = std::iter::once(headings).chain(rows).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let line = |row: &[String; 6]| {
            let cells = row.iter().enumerate().map(|(column, cell)| match (column, width(column)) {
                (0, width) => format!("{cell:<width$}"),
                (_, width) => format!("{cell:>width$}"),
            });
            cells.collect::<Vec<_>>().join("  ")
        };
        let lines: Vec<String> = rows.iter().map(line).collect();
        format!(
            "{}\nat δ = {:e}; each bound holds with {} % confidence",
            lines.join("\n"),
            self.delta,
            100.0 * self.confidence
        )
    }
}
