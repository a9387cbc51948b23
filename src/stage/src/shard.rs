//! One of several parts of a stage's work.

use std::str::FromStr;

/// One of several parts of the work, on the command line `index/count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub index: u32,
    /// How many there are.
    pub count: u32,
}

impl Shard {
    /// The only part.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// `(index, count)`, as a claim has it.
    pub fn pair(self) -> (u32, u32) {
        (self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match parts {
            // A column `shard` is a 32-bit integer.
            Some((index, count)) if index < count && count <= i32::MAX as u32 => Ok(Self { index, count }),
            _ => Err("expected I/N with I from 0 to N - 1, such as 0/8".into()),
        }
    }
}

/// Id of the application transactions by which a stage appends rows: of one of its shards such as
/// `demo/synthesize/3-of-8`, of the whole `demo/synthesize`.
pub fn transaction(run: &str, stage: &str, shard: Option<Shard>) -> String {
    match shard {
        Some(Shard { index, count }) => format!("{run}/{stage}/{index}-of-{count}"),
        None => format!("{run}/{stage}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_one_of_several() {
        assert_eq!("0/1".parse(), Ok(Shard::WHOLE));
        assert_eq!("31/32".parse(), Ok(Shard { index: 31, count: 32 }));
        for wrong in ["8/8", "1", "/", "a/b", "-1/2", "0/0", "", "0/4294967295"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_shard_has_transactions_of_its_own() {
        assert_eq!(transaction("demo", "embed", None), "demo/embed");
        assert_eq!(transaction("demo", "embed", Some(Shard { index: 3, count: 8 })), "demo/embed/3-of-8");
    }
}
