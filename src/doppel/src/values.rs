//! Values of flags that several commands take.

/// Splits `name=value`.
pub fn name_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as name=value".to_owned()),
    }
}

/// An ε, which bounds something, or another number that 0 would make meaningless.
pub fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
    value.ok_or_else(|| "expected a number above 0, such as 8".to_owned())
}

/// A δ: a probability.
pub fn delta(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| privacy::accounting::DELTAS.contains(value));
    value.ok_or_else(|| "expected a number between 0 and 1, such as 1e-6".to_owned())
}
