//! How `withSequence` writes its numbers.

/// The part of Go's formats that `withSequence` needs: one `%d`, padded with zeros or blanks.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Format {
    before: String,
    zeros: bool,
    width: usize,
    after: String,
}

impl Format {
    /// Parses `shard-%03d`.
    pub fn parse(text: &str) -> Option<Self> {
        let (before, rest) = text.split_once('%')?;
        let end = rest.find('d')?;
        let (spec, after) = (&rest[..end], &rest[end + 1..]);
        let zeros = spec.starts_with('0');
        let width = if spec.is_empty() { 0 } else { spec.parse().ok().filter(|width| *width <= 32)? };
        let plain = !after.contains('%');
        plain.then(|| Self { before: before.to_owned(), zeros, width, after: after.to_owned() })
    }

    /// `number` in this format.
    pub fn write(&self, number: i64) -> String {
        let Format { before, zeros, width, after } = self;
        let width = *width;
        if *zeros { format!("{before}{number:0width$}{after}") } else { format!("{before}{number:width$}{after}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_go_writes_them() {
        let formats = [("%d", "-7"), ("%03d", "-07"), ("s-%4d.", "s-  -7.")];
        for (format, expected) in formats {
            assert_eq!(Format::parse(format).map(|format| format.write(-7)).as_deref(), Some(expected));
        }
        for format in ["", "x", "%s", "%d%d", "%xd", "%99d"] {
            assert_eq!(Format::parse(format), None, "{format}");
        }
        assert_eq!(Format::default().write(5), "5");
    }
}
