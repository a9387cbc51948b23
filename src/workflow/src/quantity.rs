//! Kubernetes quantities (`500m`, `16Gi`) and Argo durations (`30s`, `1h30m`).

use std::time::Duration;

/// A quantity in thousandths: `2` → 2000, `500m` → 500, `1Ki` → 1,024,000.
pub fn thousandths(text: &str) -> Option<u128> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let scale: u128 = match suffix {
        "m" => 1,
        "" => 1_000,
        "k" => 1_000_000,
        "M" => 1_000_000_000,
        "G" => 1_000_000_000_000,
        "T" => 1_000_000_000_000_000,
        "Ki" => 1_000 << 10,
        "Mi" => 1_000 << 20,
        "Gi" => 1_000 << 30,
        "Ti" => 1_000 << 40,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if number.is_empty() || whole.len() > 12 || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("0{whole}{fraction}").parse().ok()?;
    // Rounded up, as Kubernetes does.
    Some((digits * scale).div_ceil(10u128.pow(fraction.len() as u32)))
}

/// A quantity in whole units, rounded up: bytes, GPUs.
pub fn units(text: &str) -> Option<u64> {
    u64::try_from(thousandths(text)?.div_ceil(1_000)).ok()
}

/// A duration: seconds, or Go's `1h30m`, or days as `2d`.
pub fn duration(text: &str) -> Option<Duration> {
    if text.chars().all(|c| c.is_ascii_digit()) {
        return text.parse().ok().map(Duration::from_secs);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let seconds = match &rest[..end] {
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3_600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[end..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, expected) in [
            ("2", Some(2_000)),
            ("500m", Some(500)),
            ("0.5", Some(500)),
            ("1.5Gi", Some(1_536 * (1_000 << 20))),
            ("16Gi", Some(16 * (1_000 << 30))),
            ("", None),
            ("Gi", None),
            ("1x", None),
            ("1.2.3", None),
            ("-1", None),
        ] {
            assert_eq!(thousandths(text), expected, "{text}");
        }
        assert_eq!(units("100m"), Some(1));
    }

    #[test]
    fn durations() {
        for (text, expected) in [
            ("30", Some(30.0)),
            ("30s", Some(30.0)),
            ("1h30m", Some(5_400.0)),
            ("0.5s", Some(0.5)),
            ("250ms", Some(0.25)),
            ("2d", Some(172_800.0)),
            ("x", None),
            ("1y", None),
            ("s", None),
        ] {
            assert_eq!(duration(text).map(|d| d.as_secs_f64()), expected, "{text}");
        }
    }
}
