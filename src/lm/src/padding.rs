//! How long a sequence is made, by itself.
//!
//! What a private record's gradient or vector is must not depend on who shares its batch: one more record would otherwise
//! change what others contribute. A neighbour's padding does change it, in bf16 by some percent.

/// Padded lengths are multiples of this. Kernels of products take four rows at once and add up what is left over in another
/// order, and where a sequence begins is a matter of company (measured with MKL and oneDNN: whole fours give equal bits
/// wherever they stand, pairs do not).
const LENGTH_STEP: usize = 4;

/// Sequences are padded to this length at least: a product of a few numbers has another kernel, and how many numbers a
/// product has is a matter of company, too.
const SHORTEST: usize = 8;

/// Length that a sequence of `length` tokens is padded to.
pub(crate) fn padded(length: usize) -> usize {
    length.max(SHORTEST).next_multiple_of(LENGTH_STEP)
}
