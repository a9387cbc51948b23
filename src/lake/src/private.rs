//! A value computed from private records, whose `Debug` tells nothing.

/// Holds a private value. It has no `Display`, and `Debug` prints `<private>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Private<T>(T);

impl<T> Private<T> {
    /// Marks `value` as private.
    pub fn new(value: T) -> Self {
        Self(value)
    }
    /// The value, for computation only: what comes of it is private again until a mechanism releases it.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> std::fmt::Debug for Private<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<private>")
    }
}
