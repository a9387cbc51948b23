//! The ledger's verbs: set a budget, reserve, settle.

use lake::PrivateRoot;
use privacy::event::Event;

use crate::LedgerError;
use crate::chain::{self, Decision};
use crate::entry::{Adjacency, Body};
use crate::spent::{Budget, Ledger, epsilon};

/// What a mechanism asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Corpus name.
    pub corpus: String,
    /// Corpus table version.
    pub version: i64,
    /// Privacy unit column as the corpus was partitioned by.
    pub unit: String,
    /// What the guarantee is conditioned on, such as deduplication across records; from the corpus's terms.
    pub conditions: Vec<String>,
    /// Run id.
    pub run: String,
    /// Stage.
    pub stage: String,
    /// The event that will be spent.
    pub event: Event,
    /// Fingerprint of configuration and inputs with their digests: binds a resumed run to what it reserved.
    pub fingerprint: String,
}

/// A reservation that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Sequence number of the entry.
    pub sequence: u64,
    /// Corpus name.
    pub corpus: String,
}

/// Reserves what `request` will spend, before its mechanism first reads private data.
///
/// The same run and stage with the same fingerprint gets the reservation it has: resuming pays nothing. With anything
/// else it is refused, since one run id would then stand for two uses of noise. Where ε of everything spent with this
/// request, by PLD at the budget's δ, exceeds the budget: [`LedgerError::OverBudget`] with the arithmetic. All reservations of
/// a ledger are for one privacy unit.
pub async fn reserve(root: &PrivateRoot, request: &Request) -> Result<Reservation, LedgerError> {
    let sequence = chain::update(root, &request.corpus, |ledger| {
        if let Some(sequence) = standing(ledger, request)? {
            return Ok(Decision::Done(sequence));
        }
        check_unit(ledger, &request.unit)?;
        afford(ledger, &request.run, &request.stage, &request.event)?;
        Ok(Decision::Append(entry(request), |sequence| sequence))
    })
    .await?;
    Ok(Reservation { sequence, corpus: request.corpus.clone() })
}

/// Refuses early what [`reserve`] would refuse for want of budget or for its privacy unit; where (run, stage) has a
/// reservation, nothing is missing.
///
/// It reads the ledger alone: a stage calls it before it binds its run id and takes the digests that a reservation needs.
pub async fn check(
    root: &PrivateRoot,
    corpus: &str,
    unit: &str,
    (run, stage): (&str, &str),
    event: &Event,
) -> Result<(), LedgerError> {
    let (ledger, _) = chain::load(root, corpus).await?;
    let reserved = ledger.entries.iter().any(|entry| match &entry.body {
        Body::Reserve { run: other, stage: of, .. } => (other.as_str(), of.as_str()) == (run, stage),
        _ => false,
    });
    if reserved {
        return Ok(());
    }
    check_unit(&ledger, unit)?;
    afford(&ledger, run, stage, event)
}

/// Marks a reservation as used. Settling twice is fine.
pub async fn settle(root: &PrivateRoot, reservation: &Reservation) -> Result<(), LedgerError> {
    let sequence = reservation.sequence;
    chain::update(root, &reservation.corpus, |ledger| {
        if ledger.is_settled(sequence) {
            return Ok(Decision::Done(()));
        }
        let reserved = usize::try_from(sequence).ok().and_then(|at| ledger.entries.get(at));
        if !matches!(reserved.map(|entry| &entry.body), Some(Body::Reserve { .. })) {
            return Err(LedgerError::Malformed(format!(
                "ledger of `{}`: entry {sequence} is no reservation, so it cannot be settled\n\
                 help: the ledger was replaced while the stage ran; restore it from the store's versions or a backup",
                ledger.corpus
            )));
        }
        Ok(Decision::Append(Body::Settle { reservation: sequence }, |_| ()))
    })
    .await
}

/// Sets the budget of `corpus`. It applies from now on and may be below what was spent: then nothing more fits.
pub async fn set_budget(root: &PrivateRoot, corpus: &str, epsilon: f64, delta: f64) -> Result<(), LedgerError> {
    let new = Budget { epsilon, delta };
    new.check().map_err(LedgerError::Usage)?;
    chain::update(root, corpus, |ledger| match ledger.budget() {
        Some(budget) if budget == new => Ok(Decision::Done(())),
        _ => Ok(Decision::Append(Body::Budget { epsilon, delta }, |_| ())),
    })
    .await
}

fn entry(request: &Request) -> Body {
    Body::Reserve {
        run: request.run.clone(),
        stage: request.stage.clone(),
        version: request.version,
        unit: request.unit.clone(),
        adjacency: Adjacency::AddOrRemoveOne,
        conditions: request.conditions.clone(),
        event: request.event.clone(),
        fingerprint: request.fingerprint.clone(),
    }
}

/// The reservation that (run, stage) has, if it is for the same thing.
fn standing(ledger: &Ledger, request: &Request) -> Result<Option<u64>, LedgerError> {
    for entry in &ledger.entries {
        let Body::Reserve { run, stage, version, unit, conditions, event, fingerprint, .. } = &entry.body else {
            continue;
        };
        if (run, stage) != (&request.run, &request.stage) {
            continue;
        }
        let mut differs = Vec::new();
        if *version != request.version {
            differs.push(format!("the corpus was at version {version}, now it is {}", request.version));
        }
        if *unit != request.unit {
            differs.push(format!("the privacy unit was `{unit}`, now it is `{}`", request.unit));
        }
        if *conditions != request.conditions {
            differs.push("the conditions of the corpus changed".to_string());
        }
        if *event != request.event {
            differs.push(format!("the mechanism was {}, now it is {}", describe(event), describe(&request.event)));
        }
        // PRIVACY: the fingerprint itself depends on the records and is not told.
        if *fingerprint != request.fingerprint && differs.is_empty() {
            let changed =
                "a setting, the content of an input, or the device or precision that auto came to mean, changed";
            differs.push(changed.to_string());
        }
        if differs.is_empty() {
            return Ok(Some(entry.sequence));
        }
        return Err(LedgerError::Usage(format!(
            "run `{run}`, stage {stage}: entry {} of the ledger of `{}` reserved for something else: {}\n\
             help: a run id stands for one use of the budget; repeat it as it was, on a machine like the first one, or \
             choose a new --run, which is paid for anew; where machines differ, name --dtype and --device from the start",
            entry.sequence,
            ledger.corpus,
            differs.join("; ")
        )));
    }
    Ok(None)
}

/// Refuses another privacy unit than that of what was spent before. ε of different units do not add up: what a mechanism
/// tells of one record says nothing of what it tells of a user with many.
fn check_unit(ledger: &Ledger, unit: &str) -> Result<(), LedgerError> {
    let other = ledger.entries.iter().find_map(|entry| match &entry.body {
        Body::Reserve { unit: other, .. } if other != unit => Some((entry.sequence, other)),
        _ => None,
    });
    let Some((sequence, other)) = other else { return Ok(()) };
    Err(LedgerError::Usage(format!(
        "ledger of `{}`: the privacy unit of entry {sequence} is `{other}`, and that of the corpus is now `{unit}`; ε of \
         different units do not add up\n\
         help: partition under another corpus name, with a budget of its own that leaves room for what was spent",
        ledger.corpus
    )))
}

fn no_budget(corpus: &str) -> LedgerError {
    LedgerError::Usage(format!(
        "corpus `{corpus}` has no privacy budget, so nothing may be spent on it\n\
         help: `doppel budget set --corpus {corpus} --epsilon E --delta D`"
    ))
}

/// Refuses what the budget cannot pay.
fn afford(ledger: &Ledger, run: &str, stage: &str, event: &Event) -> Result<(), LedgerError> {
    let budget = ledger.budget().ok_or_else(|| no_budget(&ledger.corpus))?;
    let spent = ledger.spent();
    let all: Vec<Event> = spent.iter().chain([event]).cloned().collect();
    let total = epsilon(&all, budget.delta)?.pld;
    // Written so that a total that is not a number is refused too.
    if total <= budget.epsilon {
        return Ok(());
    }
    let before = epsilon(&spent, budget.delta)?.pld;
    let alone = epsilon(std::slice::from_ref(event), budget.delta)?.pld;
    let corpus = &ledger.corpus;
    Err(LedgerError::OverBudget(format!(
        "{corpus}: this run would bring ε to {} at δ = {:e}; the budget is {}\n\
         spent so far: ε = {} by {} reserved mechanism{}\n\
         this request: {}, ε = {} alone (stage {} of run `{}`)\n\
         together:     ε = {} by PLD, more than {}\n\
         help: `doppel budget --corpus {corpus}` shows what was spent; lower --steps, raise --noise-multiplier, or \
         raise the budget if its owner agrees",
        up(total),
        budget.delta,
        budget.epsilon,
        up(before),
        spent.len(),
        if spent.len() == 1 { "" } else { "s" },
        describe(event),
        up(alone),
        stage,
        run,
        up(total),
        budget.epsilon,
    )))
}

/// ε with four decimals, rounded up: a total over the budget must not look like the budget.
fn up(epsilon: f64) -> String {
    if epsilon.is_finite() { format!("{:.4}", (epsilon * 1e4).ceil() / 1e4) } else { epsilon.to_string() }
}

fn describe(event: &Event) -> String {
    match event {
        Event::Gaussian { noise_multiplier } => {
            format!("Gaussian with noise multiplier {noise_multiplier}")
        }
        Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps } => format!(
            "{steps} steps of Poisson-sampled Gaussian with noise multiplier {noise_multiplier} and sampling \
             probability {sampling_probability}"
        ),
        Event::DiscreteGaussian { noise_multiplier } => {
            format!("a histogram with discrete Gaussian noise, σ = {noise_multiplier}")
        }
    }
}
