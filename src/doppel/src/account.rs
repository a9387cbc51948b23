//! `doppel account`: ε of mechanisms, a noise multiplier for a target ε, the trade-off between ε and δ.

use privacy::Epsilon;
use privacy::event::Event;
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::budget::{mechanism, up};
use crate::cli::AccountArgs;
use crate::plot::{self, Chart};
use crate::table::table;

/// Does what `args` ask.
pub fn account(args: &AccountArgs) -> Result<Summary, Failure> {
    if !(args.delta > 0.0 && args.delta < 1.0) {
        return Err(Failure::Usage(format!("--delta {}: expected a number between 0 and 1, such as 1e-6", args.delta)));
    }
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
    let mut text = String::new();
    let mut json = json!({ "delta": args.delta, "mechanisms": events, "epsilon": told(epsilon) });
    if let (Some(noise_multiplier), Some(target)) = (calibrated, args.target_epsilon) {
        text += &format!("noise multiplier {noise_multiplier} keeps ε to {target} at δ = {:e}\n", args.delta);
        json["noise_multiplier"] = json!(noise_multiplier);
        json["target_epsilon"] = json!(target);
    }
    for event in &events {
        text += &format!("{}\n", mechanism(event));
    }
    text += &format!("ε = {} by PLD, {} by RDP, at δ = {:e}", up(epsilon.pld), up(epsilon.rdp), args.delta);
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
        for part in text.split(',') {
            let wrong = |why: String| Failure::Usage(format!("--mechanism {text}: {why}"));
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| wrong(format!("`{part}`: expected KEY=VALUE, such as noise_multiplier=1.1")))?;
            let number = || value.trim().parse::<f64>().map_err(|_| wrong(format!("`{value}` is no number")));
            match key.trim() {
                "noise_multiplier" => spec.noise_multiplier = Some(number()?),
                "sampling_probability" => spec.sampling_probability = Some(number()?),
                "steps" => {
                    let steps = value.trim().parse().map_err(|_| wrong(format!("`{value}` is no number of steps")))?;
                    spec.steps = Some(steps);
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

/// Finds the noise multiplier that is left out, or the first where none is.
fn calibrate(specs: &mut [Spec], target: f64, delta: f64) -> Result<f64, Failure> {
    let open: Vec<usize> = (0..specs.len()).filter(|i| specs[*i].noise_multiplier.is_none()).collect();
    let index = match open.as_slice() {
        [] => 0,
        [one] => *one,
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
    use super::*;

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
            ("noise_multiplier=1,steps=1.5", "no number of steps"),
            ("noise_multiplier=1,kind=laplace", "kind `laplace`"),
            ("noise_multiplier=1,kind=discrete_gaussian,steps=2", "neither steps nor sampling"),
        ] {
            let told = Spec::parse(text).unwrap_err().to_string();
            assert!(told.contains(expected), "{told}");
        }
    }
}
