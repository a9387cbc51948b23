//! The privacy ledger of a corpus: reserve before a mechanism reads, settle after, refuse above the budget.
//!
//! The one place where a budget meets storage. Entries are numbered objects `ledger/<corpus>/<seq>.json` in the
//! private root, written by put-if-absent, so that concurrent writers serialise: whoever loses a number reads the
//! winner's entry and decides anew. Every entry carries a digest of itself and the hash of the object before it, and
//! the whole chain is checked at every read, so that changes and gaps show. From the first reservation on the digest is
//! keyed by a secret that follows from the noise key: who can write objects but does not hold the key cannot make an
//! entry, and a root whose noise key was lost or replaced is refused, since its runs would draw a second sample of noise
//! that was paid for once. What cannot show from within is that the newest entries were removed: that is for the store's
//! permissions, versioning and object lock.
//!
//! A reservation counts as spent from the moment it is written, whether or not its mechanism ever ran: a crash never
//! erases one. All versions of a corpus share one ledger, since they share units; of another corpus with the same units it
//! knows nothing. The same (run, stage) with the same
//! fingerprint gets the reservation it has, so that resuming pays once.
//!
//! Start reading at [`reserve`]; [`entry`] is the format. Also the keeper of the [`noise_key`].

mod chain;
pub mod entry;
mod error;
mod key;
mod reserve;
mod spent;
#[cfg(test)]
mod tests;

pub use chain::{corpora, noise_key, read};
pub use entry::{Adjacency, Body, Entry};
pub use error::LedgerError;
pub use reserve::{Request, Reservation, check, reserve, set_budget, settle};
pub use spent::{Budget, Ledger, Spent};
