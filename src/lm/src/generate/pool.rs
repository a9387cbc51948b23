//! Workers that each sample some of the sequences from their first token to their last.
//!
//! The caller's thread hands out requests and takes completions; workers share nothing but the packed weights, and never
//! wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use super::native::{Engine, Row};
use super::{Completion, Request, Sampling, Sequence};
use crate::decoder::packed::Weights;
use crate::products::Factor;
use crate::{LmError, workers};

/// Requests that wait at each worker, so that a slot is refilled at once.
const AHEAD: usize = 2;

/// Samples every request with at most `batch` sequences at a time.
pub(super) fn run<E: Factor>(
    weights: &Arc<Weights<E>>,
    sampling: &Sampling,
    mut requests: impl Iterator<Item = Result<Request, LmError>>,
    batch: usize,
    done: &mut impl FnMut(Completion) -> Result<(), LmError>,
) -> Result<(), LmError> {
    let count = workers::count(tch::Device::Cpu).min(batch);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (finished, completions) = channel();
        let mut feeds = Vec::with_capacity(count);
        for number in 0..count {
            let (feed, waiting) = channel();
            let slots = batch / count + usize::from(number < batch % count);
            let worker = Worker { number, weights: weights.clone(), sampling, slots, stop: &stop };
            let finished = finished.clone();
            scope.spawn(move || worker.run(&waiting, &finished));
            feeds.push((feed, slots + AHEAD));
        }
        drop(finished);
        // Dropping the feeds at the end, on an error too, lets the workers go.
        let feeds = feeds;
        let result = hand_out(&mut requests, &feeds, &completions, done);
        stop.fetch_or(result.is_err(), Ordering::Relaxed);
        result
    })
}

/// Keeps every worker supplied until there is nothing left to hand out or to take.
fn hand_out(
    requests: &mut impl Iterator<Item = Result<Request, LmError>>,
    feeds: &[(Sender<Request>, usize)],
    completions: &Receiver<Finished>,
    done: &mut impl FnMut(Completion) -> Result<(), LmError>,
) -> Result<(), LmError> {
    let mut outstanding = 0usize;
    let deepest = feeds.iter().map(|(_, depth)| *depth).max().unwrap_or_default();
    // Round by round, so that a short run is spread over all workers.
    for round in 0..deepest {
        for (feed, _) in feeds.iter().filter(|(_, depth)| round < *depth) {
            let Some(request) = requests.next() else { break };
            outstanding += usize::from(feed.send(request?).is_ok());
        }
    }
    while outstanding > 0 {
        // Nothing means that a worker panicked; the scope passes that on.
        let Ok(Some((number, completion))) = completions.recv() else { break };
        outstanding -= 1;
        if let (Some(request), Some((feed, _))) = (requests.next().transpose()?, feeds.get(number)) {
            outstanding += usize::from(feed.send(request).is_ok());
        }
        done(completion)?;
    }
    Ok(())
}

/// A worker's number and what it finished; nothing from one that panics.
type Finished = Option<(usize, Completion)>;

/// Tells of a panic. The channel alone would not: the other workers hold it open while they wait for requests.
struct Alarm<'a> {
    finished: &'a Sender<Finished>,
    stop: &'a AtomicBool,
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.stop.store(true, Ordering::Relaxed);
            let _ = self.finished.send(None);
        }
    }
}

struct Worker<'a, E> {
    number: usize,
    weights: Arc<Weights<E>>,
    sampling: &'a Sampling,
    slots: usize,
    stop: &'a AtomicBool,
}

impl<E: Factor> Worker<'_, E> {
    fn run(&self, waiting: &Receiver<Request>, finished: &Sender<Finished>) {
        let _alarm = Alarm { finished, stop: self.stop };
        let mut engine = Engine::new(self.weights.clone(), self.slots);
        let mut live: Vec<Option<(Sequence, usize)>> = Vec::new();
        live.resize_with(self.slots, || None);
        let send = |completion: Completion| finished.send(Some((self.number, completion))).is_ok();
        while !self.stop.load(Ordering::Relaxed) {
            if !self.fill(&mut engine, &mut live, waiting, &send) {
                return;
            }
            let rows: Vec<Row> = live.iter().enumerate().filter_map(|(slot, live)| next_row(slot, live)).collect();
            if rows.is_empty() {
                continue;
            }
            let mut ended = vec![None; rows.len()];
            engine.step(&rows, |row, logits| {
                if let Some((sequence, length)) = &mut live[rows[row].slot] {
                    *length += 1;
                    ended[row] = sequence.advance(logits, self.sampling);
                }
            });
            for (row, ended) in rows.iter().zip(ended) {
                if let Some(stopped) = ended
                    && let Some((sequence, _)) = live[row.slot].take()
                    && !send(sequence.finish(stopped))
                {
                    return;
                }
            }
        }
    }

    /// Gives free slots to waiting requests; waits for one only where nothing is live. False at the end of the run.
    fn fill(
        &self,
        engine: &mut Engine<E>,
        live: &mut [Option<(Sequence, usize)>],
        waiting: &Receiver<Request>,
        send: &impl Fn(Completion) -> bool,
    ) -> bool {
        while let Some(slot) = live.iter().position(Option::is_none) {
            let request = match live.iter().all(Option::is_none) {
                true => waiting.recv().map_err(|_| TryRecvError::Disconnected),
                false => waiting.try_recv(),
            };
            let request = match request {
                Ok(request) => request,
                Err(TryRecvError::Disconnected) => return live.iter().any(Option::is_some),
                Err(TryRecvError::Empty) => return true,
            };
            let mut sequence = Sequence::new(&request, self.sampling);
            let room = request.prompt.len() + self.sampling.max_new_tokens;
            let ended = match self.sampling.max_new_tokens {
                0 => Some(false),
                _ => sequence.advance(engine.start(slot, &request.prompt, room), self.sampling),
            };
            match ended {
                None => live[slot] = Some((sequence, request.prompt.len())),
                Some(stopped) if !send(sequence.finish(stopped)) => return false,
                Some(_) => {}
            }
        }
        true
    }
}

/// The token that a live sequence feeds next.
fn next_row(slot: usize, live: &Option<(Sequence, usize)>) -> Option<Row> {
    let (sequence, position) = live.as_ref()?;
    Some(Row { slot, position: *position, token: *sequence.tokens.last()? })
}
