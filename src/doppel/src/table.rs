//! Tables, times and digests as text for standard output.

/// Rows under headings, in columns two blanks apart; the columns in `right` are set flush right.
pub fn table(headings: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| {
            if right.contains(&i) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let headings: Vec<String> = headings.iter().map(|heading| (*heading).to_owned()).collect();
    std::iter::once(line(&headings)).chain(rows.iter().map(|row| line(row))).collect::<Vec<_>>().join("\n")
}

/// A span of time for people: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`.
pub fn duration(time: std::time::Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// As much of a digest as tells it from others.
pub fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

/// A time without its fraction of a second.
pub fn seconds(time: &str) -> String {
    time.get(..19).unwrap_or(time).replace('T', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "10".to_owned()], vec!["longer".to_owned(), "5".to_owned()]];
        assert_eq!(table(&["name", "n"], &rows, &[1]), "name     n\na       10\nlonger   5");
    }

    #[test]
    fn durations_read_well() {
        let told: Vec<String> = [400, 12_000, 185_000, 7_800_000].map(Duration::from_millis).map(duration).into();
        assert_eq!(told, ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]);
    }
}
