//! Conversations that never happened: a ShareGPT-shaped file to run the pipeline on.

use std::path::Path;

use serde_json::{Value, json};

const FORMS: [&str; 7] = ["poem", "story", "letter", "recipe", "plan", "joke", "speech"];
const TOPICS: [&str; 9] = ["rain", "trains", "bread", "whales", "snow", "chess", "rivers", "moss", "kites"];
const READERS: [&str; 5] = ["children", "sailors", "a friend", "my class", "bakers"];

/// The first user turn of conversation `index`: no two are equal, and none shares ten words with another.
pub fn instruction(index: usize) -> String {
    let (form, topic) = (FORMS[index % FORMS.len()], TOPICS[index / FORMS.len() % TOPICS.len()]);
    let reader = READERS[index / FORMS.len() / TOPICS.len() % READERS.len()];
    format!("Write a {form} about {topic} for {reader}.")
}

/// Most conversations that [`instruction`] tells apart.
pub const DISTINCT: usize = FORMS.len() * TOPICS.len() * READERS.len();

/// Writes `count` conversations, at most [`DISTINCT`], as one JSON array. Ids look like `AbC12_0`; every tenth
/// conversation has a second part, `AbC12_1`, of the same privacy unit.
pub fn write(path: &Path, count: usize) -> std::io::Result<()> {
    assert!(count <= DISTINCT, "{count} conversations would repeat");
    let array: Vec<Value> = (0..count).map(conversation).collect();
    std::fs::write(path, Value::Array(array).to_string())
}

fn conversation(index: usize) -> Value {
    let is_second_part = index % 10 == 9;
    let (unit, part) = if is_second_part { (index - 1, 1) } else { (index, 0) };
    json!({
        "id": format!("u{unit:05}_{part}"),
        "conversations": [
            { "from": "human", "value": instruction(index) },
            { "from": "gpt", "value": "Gladly." },
        ],
    })
}
