//! DP mathematics: events, accounting, keyed noise and sampling. No I/O, no async, no clock, no torch.
//!
//! # The guarantee
//!
//! *What is promised.* For every two corpora that differ by one unit, and every set of outputs S,
//! `P(S) ≤ e^ε · P'(S) + δ`, over all releases from the corpus together, whatever else the reader knows.
//!
//! *Privacy unit*: the value of a column that the operator names (user, conversation, record). Whoever speaks in several
//! units is protected in each, not in all together. partition bounds the records per unit; train samples units, and clips
//! each unit's summed gradient; a unit's vote vector has L2 norm ≤ 1.
//!
//! *Adjacency*: add or remove one unit. ε is the worse of the two.
//!
//! *Training* ([`training`]): true Poisson sampling of units with `sampling_probability`; per-unit gradients clipped to
//! `clip_norm` in L2 over all trainable parameters; Gaussian noise of standard deviation `noise_multiplier · clip_norm`
//! added once to the sum over the whole logical batch; divided by the *expected* batch size. An empty batch is a step like
//! any other. The loss of one example must not depend on who else is in the batch.
//!
//! *Votes* ([`histogram`]): counts over clusters that were built from synthetic data only, plus discrete Gaussian noise.
//!
//! *Accounting* ([`accounting`]): the privacy loss distribution (PLD) composed over all mechanisms that touched a corpus,
//! RDP as a second opinion.
//!
//! *Randomness* ([`keyed`]): noise comes from ChaCha20 streams and sampling coins from BLAKE3, both keyed by a 256-bit
//! secret, with a context that names run, inputs with their digests, configuration, stage, step and tensor: a resumed
//! or repeated run reproduces the same noise rather than drawing a second sample, and whenever anything differs, the
//! data above all, the noise is fresh. Gaussian noise is generated in float64 and guarded against floating-point
//! attacks; counts get exact discrete Gaussian noise.
//!
//! *What is covered*: the adapter, the noised histogram, and whatever is computed from those alone, such as every
//! synthetic text, its embedding, the clusters and the selection, in the release zone; for as long as they exist.
//!
//! *What conditions it*: a filter that compares records with each other (deduplication) makes the guarantee hold for the
//! corpus *as partitioned*, not for the raw data, since a record can keep another out. The ledger says so, and the filter
//! can be turned off. On CUDA and on x86 CPUs without AVX2, where kernels may add up in another order when a batch has
//! another shape, it holds up to that rounding. It also rests on ChaCha20 and BLAKE3 being pseudo-random, and on the
//! secret staying in the private root: who has it can subtract the noise.
//!
//! *What is public*: every setting, among them q, the noise multiplier, the number of steps, the expected batch size and
//! the clip norm, the privacy unit's name, and ε itself. The number of records is private unless the operator declares it.
//!
//! *What is not covered*:
//! - Validation loss, the comparison with held-out records, and whatever else is computed without a mechanism. They stay
//!   in the private zone. To choose a model by them and then release it is a release that nobody accounted for.
//! - Hyper-parameter tuning. Every run that is tried on the corpus is reserved and counts, whether or not its result is
//!   kept. That pays for the runs. The choice among them is only paid for if it looks at released outputs alone; tune on
//!   public data, or choose by what the release zone shows, which can make δ larger than stated by a small factor: the
//!   composed total is that of settings that were fixed beforehand.
//! - Units that are in two corpora: each corpus has its own ledger, and for such units the two ε add up.
//! - The base model and public texts: what they learned elsewhere is not the corpus's.
//!
//! *Repeated runs*: the same run again draws the same noise and is one release, paid once. A new run id is a new release
//! on the same units and pays again: ε of all runs on a corpus, its versions included, adds up in one ledger, under one
//! budget.
//!
//! # Where to start reading
//!
//! | to check | read |
//! |---|---|
//! | that what is accounted is what runs | [`training`]: one value makes the event, the coins and the noise |
//! | what one unit can change | [`training::ClippedSum`], train's `step.rs`, which clips for it, and [`histogram`] |
//! | what a mechanism is, as the ledger stores it | [`event`] |
//! | that ε is an upper bound | [`accounting`], then its modules `loss` (one step) and `compose` (their sum) |
//! | Gaussian noise, and its guard against floating point | [`gaussian`] |
//! | exact noise for counts | [`discrete_gaussian`] |
//! | that noise is fresh or the same, as it must be | [`keyed`] |
//! | which settings meet a target | [`plan`] |

pub mod accounting;
pub mod discrete_gaussian;
pub mod event;
pub mod gaussian;
pub mod histogram;
pub mod keyed;
pub mod plan;
pub mod training;

pub use accounting::{AccountingError, Bounds, Epsilon, bounds, calibrate, delta, epsilon};
