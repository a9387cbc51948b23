//! The ledger's promises, on a local disk.

use std::path::PathBuf;
use std::time::Duration;

use lake::{PrivateRoot, StorageOptions};
use privacy::event::Event;
use tempfile::TempDir;

use crate::entry::Seal;
use crate::*;

const CORPUS: &str = "chats";
const UNIT: &str = "conversation_id";
const DELTA: f64 = 5e-7;

pub(crate) struct Fixture {
    pub(crate) folder: TempDir,
    pub(crate) root: PrivateRoot,
}

impl Fixture {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = StorageOptions { timeout: Duration::from_secs(20) };
        let root = PrivateRoot::open(folder.path().to_str().unwrap(), &options).await.unwrap();
        Self { folder, root }
    }

    pub(crate) async fn with_budget(epsilon: f64) -> Self {
        let fixture = Self::new().await;
        set_budget(&fixture.root, CORPUS, epsilon, DELTA).await.unwrap();
        fixture
    }

    fn object(&self, sequence: u64) -> PathBuf {
        self.folder.path().join(format!("ledger/{CORPUS}/{sequence:08}.json"))
    }

    /// Replaces `from` by `to` in an entry, which must contain it.
    fn tamper(&self, sequence: u64, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.object(sequence)).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(self.object(sequence), text.replacen(from, to, 1)).unwrap();
    }

    async fn read_error(&self) -> String {
        let error = read(&self.root, CORPUS).await.unwrap_err();
        assert_eq!(error.exit_code(), 3, "{error}");
        error.to_string()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// One histogram as in the paper: ε = 0.4125 at δ = 5e-7 by design.md.
pub(crate) fn votes(run: &str) -> Request {
    Request {
        corpus: CORPUS.into(),
        version: 3,
        unit: UNIT.into(),
        conditions: vec!["deduplicated across records".into()],
        run: run.into(),
        stage: "vote".into(),
        event: Event::DiscreteGaussian { noise_multiplier: 10.0 },
        fingerprint: "f1".into(),
    }
}

/// The paper's training: ε = 2.860 at δ = 5e-7, 2.897 with the histogram, by design.md.
fn training(run: &str) -> Request {
    let event = Event::PoissonSampledGaussian {
        sampling_probability: 4096.0 / 180_000.0,
        noise_multiplier: 1.1220,
        steps: 439,
    };
    Request { stage: "train".into(), event, ..votes(run) }
}

#[tokio::test]
async fn a_run_reserves_and_settles_and_the_ledger_tells_what_was_spent() {
    let fixture = Fixture::with_budget(3.0).await;
    let root = &fixture.root;
    let train = reserve(root, &training("paper")).await.unwrap();
    settle(root, &train).await.unwrap();
    settle(root, &train).await.unwrap();
    let vote = reserve(root, &votes("paper")).await.unwrap();
    assert_eq!((train.sequence, vote.sequence), (1, 3));

    let ledger = read(root, CORPUS).await.unwrap();
    assert_eq!(ledger.entries.len(), 4);
    assert_eq!(ledger.budget(), Some(Budget { epsilon: 3.0, delta: DELTA }));
    assert_eq!(ledger.spent(), [training("").event, votes("").event]);
    assert!(ledger.is_settled(train.sequence) && !ledger.is_settled(vote.sequence));
    let history: Vec<f64> = ledger.history(DELTA).unwrap().iter().map(|spent| spent.epsilon.pld).collect();
    assert!((history[0] - 2.860).abs() < 2e-3 && (history[1] - 2.897).abs() < 2e-3, "{history:?}");
    assert_eq!(ledger.epsilon(DELTA).unwrap().pld, history[1]);
}

#[tokio::test]
async fn a_resumed_run_pays_nothing_and_a_new_run_pays() {
    // Enough for one histogram, not for two.
    let fixture = Fixture::with_budget(0.45).await;
    let first = reserve(&fixture.root, &votes("a")).await.unwrap();
    assert_eq!(reserve(&fixture.root, &votes("a")).await.unwrap(), first);
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 2);
    let error = reserve(&fixture.root, &votes("b")).await.unwrap_err();
    assert!(matches!(error, LedgerError::OverBudget(_)), "{error}");
    assert_eq!(error.exit_code(), 4);
    // The early look at the budget tells the same of both.
    let event = votes("a").event;
    check(&fixture.root, CORPUS, UNIT, ("a", "vote"), &event).await.unwrap();
    let error = check(&fixture.root, CORPUS, UNIT, ("b", "vote"), &event).await.unwrap_err();
    assert!(matches!(error, LedgerError::OverBudget(_)), "{error}");
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 2);
}

#[tokio::test]
async fn epsilon_of_different_privacy_units_is_not_added_up() {
    let fixture = Fixture::with_budget(10.0).await;
    let first = reserve(&fixture.root, &votes("a")).await.unwrap();
    let other = Request { unit: "user".into(), ..votes("b") };
    let early = check(&fixture.root, CORPUS, "user", ("b", "vote"), &other.event).await;
    for error in [early.unwrap_err(), reserve(&fixture.root, &other).await.unwrap_err()] {
        assert_eq!(error.exit_code(), 2);
        let told = error.to_string();
        assert!(told.contains("entry 1 is `conversation_id`") && told.contains("now `user`"), "{told}");
    }
    assert_eq!(reserve(&fixture.root, &votes("a")).await.unwrap(), first);
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 2);
}

#[tokio::test]
async fn over_budget_shows_the_arithmetic() {
    let fixture = Fixture::with_budget(0.45).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let error = reserve(&fixture.root, &votes("b")).await.unwrap_err().to_string();
    for part in [
        "chats: this run would bring ε to 0.5",
        "at δ = 5e-7; the budget is 0.45",
        "spent so far: ε = 0.41",
        "by 1 reserved mechanism\n",
        "a histogram with discrete Gaussian noise, σ = 10, ε = 0.41",
        "(stage vote of run `b`)",
        "help: `doppel budget --corpus chats`",
    ] {
        assert!(error.contains(part), "{part} not in {error}");
    }
}

#[tokio::test]
async fn a_run_id_reserved_for_something_else_is_refused_naming_what_differs() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let check = async |request: Request, expected: &str| {
        let error = reserve(&fixture.root, &request).await.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("choose a new --run"), "{text}");
        assert!(!text.contains("f1") && !text.contains("f2"), "the fingerprint is private: {text}");
    };
    let fingerprint = "f2".to_string();
    let changed = "a setting, the content of an input, or the device or precision that auto came to mean, changed";
    check(Request { fingerprint: fingerprint.clone(), ..votes("a") }, changed).await;
    check(Request { version: 4, fingerprint, ..votes("a") }, "the corpus was at version 3, now it is 4").await;
    check(Request { unit: "user".into(), ..votes("a") }, "unit was `conversation_id`, now it is `user`").await;
    let event = Event::DiscreteGaussian { noise_multiplier: 9.0 };
    check(Request { event, ..votes("a") }, "σ = 10, now it is a histogram with discrete Gaussian noise, σ = 9").await;
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 2);
}

#[tokio::test]
async fn parameters_without_a_short_decimal_are_recognised_when_resumed() {
    // That any float is read back as it was written is a property test of `privacy::event`.
    let fixture = Fixture::with_budget(8.0).await;
    for (run, sampling_probability) in [("a", 4096.0 / 180_000.0), ("b", 1.0 / 3.0), ("c", 0.1 + 0.2)] {
        let noise_multiplier = 10.0 + 1.0 / 7.0;
        let event = Event::PoissonSampledGaussian { sampling_probability, noise_multiplier, steps: 2 };
        let request = Request { event, ..training(run) };
        let first = reserve(&fixture.root, &request).await.unwrap();
        assert_eq!(reserve(&fixture.root, &request).await.unwrap(), first);
    }
}

#[tokio::test]
async fn without_a_budget_nothing_is_spent() {
    let fixture = Fixture::new().await;
    let error = reserve(&fixture.root, &votes("a")).await.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("`doppel budget set --corpus chats --epsilon E --delta D`"), "{error}");
    let ledger = read(&fixture.root, CORPUS).await.unwrap();
    assert_eq!((ledger.entries.len(), ledger.budget()), (0, None));
    assert_eq!(ledger.epsilon(DELTA).unwrap().pld, 0.0);
}

#[tokio::test]
async fn a_budget_can_be_raised_and_lowered_and_both_are_on_record() {
    let fixture = Fixture::with_budget(0.1).await;
    assert!(reserve(&fixture.root, &votes("a")).await.is_err());
    set_budget(&fixture.root, CORPUS, 1.0, DELTA).await.unwrap();
    set_budget(&fixture.root, CORPUS, 1.0, DELTA).await.unwrap();
    reserve(&fixture.root, &votes("a")).await.unwrap();
    set_budget(&fixture.root, CORPUS, 0.1, DELTA).await.unwrap();
    assert!(reserve(&fixture.root, &votes("b")).await.is_err());
    // What was reserved stays reserved.
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let ledger = read(&fixture.root, CORPUS).await.unwrap();
    assert_eq!((ledger.entries.len(), ledger.budget()), (4, Some(Budget { epsilon: 0.1, delta: DELTA })));
}

#[tokio::test]
async fn nonsense_is_refused_before_anything_is_written() {
    let fixture = Fixture::new().await;
    for (epsilon, delta) in [(0.0, 1e-6), (-1.0, 1e-6), (f64::NAN, 1e-6), (f64::INFINITY, 1e-6), (1.0, 0.0), (1.0, 1.0)]
    {
        let error = set_budget(&fixture.root, CORPUS, epsilon, delta).await.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{epsilon} {delta}");
    }
    for corpus in ["", "..", "a/b", "-x", "a b"] {
        let error = set_budget(&fixture.root, corpus, 1.0, 1e-6).await.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{corpus}");
    }
    set_budget(&fixture.root, CORPUS, 1.0, DELTA).await.unwrap();
    let event = Event::Gaussian { noise_multiplier: f64::NAN };
    assert!(reserve(&fixture.root, &Request { event, ..votes("a") }).await.is_err());
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_stages_that_race_for_the_last_of_a_budget_exactly_one_wins() {
    let fixture = Fixture::with_budget(0.45).await;
    let racers = (0..12).map(|number| {
        let root = fixture.root.clone();
        tokio::spawn(async move { reserve(&root, &votes(&format!("run-{number}"))).await })
    });
    let results = futures::future::join_all(racers.collect::<Vec<_>>()).await;
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().map(Result::unwrap).partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 11));
    assert!(lost.iter().all(|error| matches!(error, Err(LedgerError::OverBudget(_)))), "{lost:?}");
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 2);
}

/// Writers that share nothing but the store: each has its own thread, runtime and connection, as processes have.
#[test]
fn of_writers_that_share_only_the_store_exactly_one_wins_the_last_of_a_budget() {
    let fixture = runtime().block_on(Fixture::with_budget(0.45));
    let url = fixture.folder.path().to_str().unwrap().to_string();
    let start = std::sync::Arc::new(std::sync::Barrier::new(8));
    let racers = (0..8).map(|number| {
        let (url, start) = (url.clone(), start.clone());
        std::thread::spawn(move || {
            runtime().block_on(async {
                let root = PrivateRoot::open(&url, &StorageOptions::default()).await.unwrap();
                start.wait();
                reserve(&root, &votes(&format!("run-{number}"))).await
            })
        })
    });
    let results = racers.collect::<Vec<_>>().into_iter().map(|racer| racer.join().unwrap());
    let (won, lost): (Vec<_>, Vec<_>) = results.partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 7), "{lost:?}");
    assert!(lost.iter().all(|error| matches!(error, Err(LedgerError::OverBudget(_)))), "{lost:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn copies_of_one_stage_that_race_share_one_reservation() {
    let fixture = Fixture::with_budget(0.45).await;
    let racers = (0..12).map(|_| {
        let root = fixture.root.clone();
        tokio::spawn(async move {
            let reservation = reserve(&root, &votes("a")).await?;
            settle(&root, &reservation).await?;
            Ok::<_, LedgerError>(reservation.sequence)
        })
    });
    for result in futures::future::join_all(racers.collect::<Vec<_>>()).await {
        assert_eq!(result.unwrap().unwrap(), 1);
    }
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 3);
}

#[tokio::test]
async fn a_changed_entry_shows_even_if_it_is_the_last() {
    let fixture = Fixture::with_budget(0.45).await;
    fixture.tamper(0, "0.45", "9.45");
    let error = fixture.read_error().await;
    assert!(error.contains("00000000.json: its content does not match its digest"), "{error}");
    // Nothing is spent on a ledger that cannot be trusted.
    assert_eq!(reserve(&fixture.root, &votes("a")).await.unwrap_err().exit_code(), 3);
}

/// Writes the entry at `sequence` anew, with `change` made and sealed by `seal`.
fn rewrite(fixture: &Fixture, sequence: u64, seal: &Seal, change: impl Fn(&mut Body)) {
    let mut entry = Entry::parse(&std::fs::read(fixture.object(sequence)).unwrap()).unwrap();
    change(&mut entry.body);
    let sealed = Entry::seal(seal, CORPUS, sequence, entry.previous, entry.body).unwrap();
    std::fs::write(fixture.object(sequence), sealed).unwrap();
}

fn other_noise(noise: f64) -> impl Fn(&mut Body) {
    move |body| match body {
        Body::Reserve { event: Event::DiscreteGaussian { noise_multiplier }, .. } => *noise_multiplier = noise,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_newest_entry_cannot_be_sealed_anew_without_the_noise_key() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    for seal in [Seal::Plain, Seal::keyed(&privacy::keyed::NoiseKey::new([7; 32]))] {
        rewrite(&fixture, 1, &seal, other_noise(1e3));
        let error = fixture.read_error().await;
        assert!(error.contains("00000001.json: its content does not match its digest"), "{error}");
    }
}

#[tokio::test]
async fn a_budget_cannot_be_raised_without_the_noise_key_once_anything_was_reserved() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let (_, previous) = chain::load(&fixture.root, CORPUS).await.unwrap();
    let raised = Body::Budget { epsilon: 80.0, delta: DELTA };
    std::fs::write(fixture.object(2), Entry::seal(&Seal::Plain, CORPUS, 2, previous, raised).unwrap()).unwrap();
    assert!(fixture.read_error().await.contains("00000002.json: its content does not match its digest"));
}

#[tokio::test]
async fn an_entry_with_parameters_without_meaning_is_malformed() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let seal = Seal::keyed(&noise_key(&fixture.root).await.unwrap());
    rewrite(&fixture, 1, &seal, other_noise(-1.0));
    let error = fixture.read_error().await;
    assert!(error.contains("00000001.json: noise_multiplier: expected a positive number"), "{error}");
    let negative = |body: &mut Body| *body = Body::Budget { epsilon: -1.0, delta: DELTA };
    rewrite(&fixture, 0, &Seal::Plain, negative);
    assert!(fixture.read_error().await.contains("00000000.json: budget: ε is -1"));
}

#[tokio::test]
async fn who_may_not_read_the_noise_key_may_read_the_ledger_but_not_write() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let key = fixture.folder.path().join("keys/noise.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o0)).unwrap();
    if std::fs::read(&key).is_ok() {
        return; // Permissions do not bind the administrator.
    }
    assert_eq!(read(&fixture.root, CORPUS).await.unwrap().entries.len(), 2);
    assert_eq!(reserve(&fixture.root, &votes("b")).await.unwrap_err().exit_code(), 3);
}

#[tokio::test]
async fn an_entry_that_was_written_anew_breaks_the_chain() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    let other = Fixture::with_budget(80.0).await;
    std::fs::copy(other.object(0), fixture.object(0)).unwrap();
    let error = fixture.read_error().await;
    assert!(error.contains("00000001.json: does not follow from the entry before"), "{error}");
}

#[tokio::test]
async fn a_gap_shows() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    reserve(&fixture.root, &votes("b")).await.unwrap();
    std::fs::remove_file(fixture.object(1)).unwrap();
    let error = fixture.read_error().await;
    assert!(error.contains("00000001.json: is missing; found ledger/chats/00000002.json"), "{error}");
}

#[tokio::test]
async fn an_entry_of_another_ledger_or_number_shows() {
    let fixture = Fixture::with_budget(8.0).await;
    set_budget(&fixture.root, "other", 80.0, DELTA).await.unwrap();
    let original = std::fs::read(fixture.object(0)).unwrap();
    std::fs::copy(fixture.folder.path().join("ledger/other/00000000.json"), fixture.object(0)).unwrap();
    assert!(fixture.read_error().await.contains("belongs to the ledger of corpus `other`"));
    std::fs::write(fixture.object(0), &original).unwrap();
    std::fs::write(fixture.object(1), &original).unwrap();
    assert!(fixture.read_error().await.contains("00000001.json: says that it is entry 0"));
}

#[tokio::test]
async fn an_unknown_event_is_refused_not_skipped() {
    let fixture = Fixture::with_budget(8.0).await;
    reserve(&fixture.root, &votes("a")).await.unwrap();
    fixture.tamper(1, "discrete_gaussian", "laplace");
    let error = fixture.read_error().await;
    assert!(
        error.contains("00000001.json: not an entry that this version knows: unknown variant `laplace`"),
        "{error}"
    );
    std::fs::write(fixture.object(1), "{").unwrap();
    assert!(fixture.read_error().await.contains("00000001.json: not JSON"));
}
