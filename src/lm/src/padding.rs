//! How long a sequence is made, by itself.
//!
//! What a private record's gradient or vector is must not depend on who shares its batch: one more record would otherwise
//! change what others contribute. A neighbour's padding does change it, in bf16 by some percent.

/// How sequences are padded.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Padding {
    /// For products of our own, which compute each row alone: to whole pairs, which attention in bf16 multiplies.
    Pairs,
    /// For libtorch's kernels, which take four rows at once and add up what is left over in another order, and where a
    /// sequence begins is a matter of company (measured with MKL and oneDNN: whole fours give equal bits wherever they
    /// stand, pairs do not). A product of a few numbers has another kernel, and how many numbers a product has is a matter
    /// of company, too: so to eight at least.
    Fours,
}

impl Padding {
    /// Length that a sequence of `length` tokens is padded to.
    pub(crate) fn padded(self, length: usize) -> usize {
        match self {
            Self::Pairs => length.max(1).next_multiple_of(2),
            Self::Fours => length.max(8).next_multiple_of(4),
        }
    }
}
