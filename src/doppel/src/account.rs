//! `doppel account`: ε of mechanisms, a noise multiplier for a target ε, the trade-off between ε and δ.

use std::path::PathBuf;

use clap::Args;
use privacy::event::Event;
use privacy::{Bounds, Epsilon};
use serde_json::{Value, json};
use stage::{Failure, Format, Summary, Verbosity};

use crate::budget::{mechanism, up};
use crate::plot::{self, Chart};
use crate::table::table;
use crate::values::{delta, positive};

/// Compute the ε of mechanisms, or the noise multiplier for a target ε.
///
/// Adjacency is adding or removing one privacy unit. ε is by privacy loss distributions (`pld`), rounded up, and by
/// Rényi DP (`rdp`) as a second opinion.
///
/// Example: the paper's training and its vote.
///
/// doppel account --delta 5e-7 --mechanism noise_multiplier=1.122,sampling_probability=0.022756,steps=439 \
///     --mechanism noise_multiplier=10,kind=discrete_gaussian
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub struct AccountArgs {
    /// The δ at which ε is taken.
    #[arg(long, allow_negative_numbers = true, value_parser = delta)]
    pub delta: f64,
    /// A mechanism: noise_multiplier=S[,sampling_probability=Q][,steps=N][,kind=gaussian|discrete_gaussian]; repeatable,
    /// all are composed. With --target-epsilon, one of them leaves noise_multiplier out.
    #[arg(long = "mechanism", value_name = "SPEC", required = true)]
    pub mechanisms: Vec<String>,
    /// Find the smallest noise multiplier for which the composition keeps to this ε.
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = positive)]
    pub target_epsilon: Option<f64>,
    /// Print the trade-off between ε and δ; with a .svg or .png path, write it there as a plot too.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub curve: Option<Option<PathBuf>>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Does what `args` ask.
pub fn account(args: &AccountArgs) -> Result<Summary, Failure> {
    let mut specs = args.mechanisms.iter().map(|text| Spec::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let calibrated = match args.target_epsilon {
        Some(target) => Some(calibrate(&mut specs, target, args.delta)?),
        None => None,
    };
    let events = specs.iter().map(Spec::event).collect::<Result<Vec<_>, _>>()?;
    for event in &events {
        event.validate().map_err(usage)?;
    }
    let epsilon = privacy::epsilon(&events, args.delta).map_err(usage)?;
    let Bounds { lower, interval, .. } = privacy::bounds(&events, args.delta).map_err(usage)?;
    let mut text = String::new();
    let mut json = json!({ "delta": args.delta, "mechanisms": events, "epsilon": told(epsilon) });
    json["epsilon"]["pld_lower"] = json!(lower);
    json["epsilon"]["pld_interval"] = json!(interval);
    if let (Some(noise_multiplier), Some(target)) = (calibrated, args.target_epsilon) {
        text += &format!("noise multiplier {noise_multiplier} keeps ε to {target} at δ = {:e}\n", args.delta);
        json["noise_multiplier"] = json!(noise_multiplier);
        json["target_epsilon"] = json!(target);
    }
    for event in &events {
        text += &format!("{}\n", mechanism(event));
    }
    text += &format!("ε = {} by PLD, {} by RDP, at δ = {:e}", up(epsilon.pld), up(epsilon.rdp), args.delta);
    text += &format!("\nby PLD from below: at least {:.4}, {}", (lower * 1e4).floor() / 1e4, grid(interval));
    if let Some(file) = &args.curve {
        let curve = Curve::of(&events)?;
        if let Some(file) = file {
            curve.plot(file)?;
        }
        text += &format!("\n\n{}", curve.text());
        json["curve"] = curve.json();
    }
    Ok(Summary { text, json })
}

/// How finely losses were told apart.
fn grid(interval: f64) -> String {
    if interval == 0.0 { "in closed form".to_owned() } else { format!("with losses {interval:.1e} apart") }
}

fn usage(error: privacy::AccountingError) -> Failure {
    Failure::Usage(error.to_string())
}

fn told(epsilon: Epsilon) -> Value {
    json!({ "pld": epsilon.pld, "rdp": epsilon.rdp })
}

/// A `--mechanism`.
#[derive(Clone, Debug, PartialEq)]
struct Spec {
    noise_multiplier: Option<f64>,
    sampling_probability: Option<f64>,
    steps: Option<u64>,
    discrete: bool,
}

impl Spec {
    fn parse(text: &str) -> Result<Self, Failure> {
        let mut spec = Self { noise_multiplier: None, sampling_probability: None, steps: None, discrete: false };
        let mut given = Vec::new();
        for part in text.split(',') {
            let wrong = |why: String| Failure::Usage(format!("--mechanism {text}: {why}"));
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| wrong(format!("`{part}`: expected KEY=VALUE, such as noise_multiplier=1.1")))?;
            let key = key.trim();
            if given.contains(&key) {
                return Err(wrong(format!("`{key}` is given twice; it has one value")));
            }
            given.push(key);
            let number = || value.trim().parse::<f64>().map_err(|_| wrong(format!("`{value}` is no number")));
            match key {
                "noise_multiplier" => spec.noise_multiplier = Some(number()?),
                "sampling_probability" => spec.sampling_probability = Some(number()?),
                "steps" => {
                    let steps = value.trim().parse();
                    spec.steps = Some(steps.map_err(|_| wrong(format!("steps `{value}`: expected a whole number")))?);
                }
                "kind" => match value.trim() {
                    "gaussian" => spec.discrete = false,
                    "discrete_gaussian" => spec.discrete = true,
                    other => {
                        return Err(wrong(format!("kind `{other}`: expected gaussian or discrete_gaussian")));
                    }
                },
                other => {
                    let known = ["noise_multiplier", "sampling_probability", "steps", "kind"];
                    let hint = workflow::finding::nearest(other, known).map(|near| format!("; did you mean `{near}`?"));
                    return Err(wrong(format!("`{other}`: expected {}{}", known.join(", "), hint.unwrap_or_default())));
                }
            }
        }
        if spec.discrete && (spec.sampling_probability.is_some() || spec.steps.is_some()) {
            return Err(Failure::Usage(format!(
                "--mechanism {text}: a discrete Gaussian has neither steps nor sampling"
            )));
        }
        Ok(spec)
    }

    fn event(&self) -> Result<Event, Failure> {
        let missing = || Failure::Usage("a mechanism without noise_multiplier needs --target-epsilon".to_owned());
        self.noise_multiplier.map(|noise| self.with(noise)).ok_or_else(missing)
    }

    fn with(&self, noise_multiplier: f64) -> Event {
        match (self.discrete, self.sampling_probability, self.steps) {
            (true, ..) => Event::DiscreteGaussian { noise_multiplier },
            (false, None, None | Some(1)) => Event::Gaussian { noise_multiplier },
            (false, probability, steps) => Event::PoissonSampledGaussian {
                sampling_probability: probability.unwrap_or(1.0),
                noise_multiplier,
                steps: steps.unwrap_or(1),
            },
        }
    }
}

/// Finds the noise multiplier that is left out.
fn calibrate(specs: &mut [Spec], target: f64, delta: f64) -> Result<f64, Failure> {
    let open: Vec<usize> = (0..specs.len()).filter(|i| specs[*i].noise_multiplier.is_none()).collect();
    let index = match open.as_slice() {
        [one] => *one,
        [] => {
            return Err(Failure::Usage(
                "--target-epsilon finds a noise_multiplier that is left out, and no --mechanism leaves it out\n\
                 help: leave it out of one; without --target-epsilon, the ε of those given is told"
                    .to_owned(),
            ));
        }
        _ => {
            return Err(Failure::Usage(
                "more than one --mechanism leaves noise_multiplier out; --target-epsilon finds one".to_owned(),
            ));
        }
    };
    let events = |noise| {
        let event = |(i, spec): (usize, &Spec)| {
            if i == index { Some(spec.with(noise)) } else { spec.noise_multiplier.map(|noise| spec.with(noise)) }
        };
        specs.iter().enumerate().filter_map(event).collect()
    };
    let found = privacy::calibrate(events, target, delta).map_err(usage)?;
    specs[index].noise_multiplier = Some(found);
    Ok(found)
}

/// ε over a range of δ.
struct Curve(Vec<(f64, Epsilon)>);

impl Curve {
    fn of(events: &[Event]) -> Result<Self, Failure> {
        let deltas = (2..=24).map(|half| 10f64.powf(-f64::from(half) / 2.0));
        let point = |delta| privacy::epsilon(events, delta).map(|epsilon| (delta, epsilon));
        deltas.map(point).collect::<Result<_, _>>().map(Self).map_err(usage)
    }

    fn text(&self) -> String {
        let rows = self.0.iter().map(|(delta, epsilon)| vec![format!("{delta:.2e}"), up(epsilon.pld), up(epsilon.rdp)]);
        table(&["δ", "ε (PLD)", "ε (RDP)"], &rows.collect::<Vec<_>>(), &[0, 1, 2])
    }

    fn json(&self) -> Value {
        self.0.iter().map(|(delta, epsilon)| json!({ "delta": delta, "epsilon": told(*epsilon) })).collect()
    }

    fn plot(&self, file: &std::path::Path) -> Result<(), Failure> {
        let line = |value: fn(&Epsilon) -> f64| -> Vec<(f64, f64)> {
            self.0.iter().map(|(delta, epsilon)| (delta.log10(), value(epsilon))).collect()
        };
        plot::write(
            file,
            &Chart {
                title: "privacy: ε against δ".to_owned(),
                x: "log₁₀ δ".to_owned(),
                y: "ε".to_owned(),
                lines: vec![("PLD".to_owned(), line(|e| e.pld)), ("RDP".to_owned(), line(|e| e.rdp))],
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn accounted(flags: &[&str]) -> Summary {
        let words = ["doppel", "account", "--delta", "5e-7"];
        let cli = Cli::try_parse_from(words.iter().chain(flags)).unwrap();
        let Command::Account(args) = cli.command else { panic!("{flags:?}") };
        account(&args).unwrap()
    }

    #[test]
    fn epsilon_is_told_from_both_sides_with_the_discretisation() {
        let told = accounted(&["--mechanism", "noise_multiplier=1.122,sampling_probability=0.022756,steps=439"]);
        let number = |name: &str| told.json["epsilon"][name].as_f64().unwrap();
        let (lower, upper) = (number("pld_lower"), number("pld"));
        assert!(lower <= upper && upper - lower < 0.01 && number("pld_interval") > 0.0, "{}", told.json);
        assert!(
            told.text.contains("by PLD from below: at least 2.85") && told.text.contains(" apart"),
            "{}",
            told.text
        );
        let closed = accounted(&["--mechanism", "noise_multiplier=10"]);
        assert_eq!(closed.json["epsilon"]["pld_interval"], 0.0);
        assert!(closed.text.ends_with("at least 0.4125, in closed form"), "{}", closed.text);
    }

    #[test]
    fn mechanisms_are_read() {
        let event = |text: &str| Spec::parse(text).unwrap().event().unwrap();
        assert_eq!(event("noise_multiplier=10"), Event::Gaussian { noise_multiplier: 10.0 });
        let steps = Event::PoissonSampledGaussian { sampling_probability: 1.0, noise_multiplier: 2.0, steps: 5 };
        assert_eq!(event("steps=5,noise_multiplier=2"), steps);
        assert_eq!(
            event("noise_multiplier=10,kind=discrete_gaussian"),
            Event::DiscreteGaussian { noise_multiplier: 10.0 }
        );
    }

    #[test]
    fn what_is_no_mechanism_is_refused_with_a_hint() {
        for (text, expected) in [
            ("noise=1", "expected noise_multiplier"),
            ("noise_multiplyer=1", "did you mean `noise_multiplier`?"),
            ("noise_multiplier", "expected KEY=VALUE"),
            ("noise_multiplier=x", "`x` is no number"),
            ("noise_multiplier=1,noise_multiplier=2", "`noise_multiplier` is given twice"),
            ("noise_multiplier=1,steps=1e3", "steps `1e3`: expected a whole number"),
            ("noise_multiplier=1,kind=laplace", "kind `laplace`"),
            ("noise_multiplier=1,kind=discrete_gaussian,steps=2", "neither steps nor sampling"),
        ] {
            let told = Spec::parse(text).unwrap_err().to_string();
            assert!(told.contains(expected), "{told}");
        }
    }
}
