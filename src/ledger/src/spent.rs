//! What the ledger of a corpus says: its budget, and what was spent of it.

use std::collections::HashSet;

use privacy::Epsilon;
use privacy::event::Event;

use crate::LedgerError;
use crate::entry::{Body, Entry};

/// The checked ledger of a corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct Ledger {
    /// Corpus name.
    pub corpus: String,
    /// All entries, by sequence number.
    pub entries: Vec<Entry>,
    /// Whether the digest of each was checked, for which the noise key must be readable once something is reserved.
    /// Without, whoever may write to the root could have written all of it anew.
    pub verified: bool,
}

/// What all mechanisms on a corpus together may spend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Upper bound on ε.
    pub epsilon: f64,
    /// δ at which ε is computed.
    pub delta: f64,
}

/// ε after one reservation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spent {
    /// Number of the reservation.
    pub sequence: u64,
    /// ε of this and all reservations before, at the δ asked for.
    pub epsilon: Epsilon,
}

impl Budget {
    /// Whether it can be one; the error says what is wrong.
    pub(crate) fn check(self) -> Result<(), String> {
        let Self { epsilon, delta } = self;
        if !(epsilon.is_finite() && epsilon > 0.0) {
            return Err(format!("budget: ε is {epsilon}; expected a number above 0"));
        }
        if !privacy::accounting::DELTAS.contains(&delta) {
            return Err(format!("budget: δ is {delta}; expected a number between 0 and 1, such as 1e-6"));
        }
        Ok(())
    }
}

impl Ledger {
    /// The budget that holds now.
    pub fn budget(&self) -> Option<Budget> {
        self.entries.iter().rev().find_map(|entry| match entry.body {
            Body::Budget { epsilon, delta } => Some(Budget { epsilon, delta }),
            _ => None,
        })
    }

    /// Everything spent: the events of all reservations, settled or not.
    pub fn spent(&self) -> Vec<Event> {
        self.reservations().map(|(_, event)| event.clone()).collect()
    }

    /// ε of everything spent, at `delta`; 0 when nothing was.
    pub fn epsilon(&self, delta: f64) -> Result<Epsilon, LedgerError> {
        Ok(epsilon(&self.spent(), delta)?)
    }

    /// ε after each reservation, at `delta`, for tables and plots.
    pub fn history(&self, delta: f64) -> Result<Vec<Spent>, LedgerError> {
        let events = self.spent();
        let after = |(count, (sequence, _)): (usize, (u64, &Event))| {
            Ok(Spent { sequence, epsilon: epsilon(&events[..=count], delta)? })
        };
        self.reservations().enumerate().map(after).collect()
    }

    /// Whether the mechanism of reservation `sequence` ran to its end.
    pub fn is_settled(&self, sequence: u64) -> bool {
        self.settled().contains(&sequence)
    }

    /// Whether anything was ever reserved: then there is a noise key, which no other may replace.
    pub(crate) fn has_reservation(&self) -> bool {
        self.reservations().next().is_some()
    }

    fn settled(&self) -> HashSet<u64> {
        let settled = self.entries.iter().filter_map(|entry| match entry.body {
            Body::Settle { reservation } => Some(reservation),
            _ => None,
        });
        settled.collect()
    }

    fn reservations(&self) -> impl Iterator<Item = (u64, &Event)> {
        self.entries.iter().filter_map(|entry| match &entry.body {
            Body::Reserve { event, .. } => Some((entry.sequence, event)),
            _ => None,
        })
    }
}

/// ε of `events`; none cost nothing, which the accountant need not be asked.
pub(crate) fn epsilon(events: &[Event], delta: f64) -> Result<Epsilon, privacy::AccountingError> {
    match events {
        [] => Ok(Epsilon { pld: 0.0, rdp: 0.0 }),
        events => privacy::epsilon(events, delta),
    }
}
