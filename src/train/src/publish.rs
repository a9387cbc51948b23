//! The only file of this crate that writes adapters, and what each zone accepts: the release zone one made by noised
//! gradients, the private zone a baseline's. What else goes to the release zone are claims and manifests, by `run.rs`.

use lake::{Output, PrivateRoot, ReleaseRoot, Zone, layout};
use lm::adapter::Lora;
use stage::Failure;

use crate::adapter::{BaselineAdapter, PrivateAdapter};

/// Writes `adapter` as a PEFT folder into the release zone.
pub async fn publish(
    release: &ReleaseRoot,
    run: &str,
    base_model: &str,
    adapter: &PrivateAdapter,
) -> Result<Output, Failure> {
    write(release, run, base_model, &adapter.training().lora).await
}

/// Writes `adapter` as a PEFT folder into the private zone.
pub async fn publish_baseline(
    private: &PrivateRoot,
    run: &str,
    base_model: &str,
    adapter: &BaselineAdapter,
) -> Result<Output, Failure> {
    write(private, run, base_model, &adapter.training().lora).await
}

/// Writes a PEFT folder to `runs/<run>/adapter` of `zone`; the configuration comes last, so that its presence means
/// that the weights are there.
///
/// What is there already stays. PRIVACY: two adapters under equal noise, such as those of two machines that round
/// differently, would differ by something private, so the first is the only one.
async fn write<Z: Zone>(zone: &Z, run: &str, base_model: &str, lora: &Lora) -> Result<Output, Failure> {
    let folder = layout::adapter(run);
    let mut files = lora.to_peft(base_model).map_err(crate::failure)?;
    files.sort_by_key(|(name, _)| name.ends_with(".json"));
    for (name, body) in files {
        let path = format!("{folder}/{name}");
        if !zone.put_if_absent(&path, body.clone().into()).await? && zone.get(&path).await? != body {
            return Err(Failure::Input(format!(
                "{}/{path}: another adapter of this run is there, and it stays\n\
                 help: it is the run's result, made by a copy of this stage; train under another --run for a new one",
                zone.url()
            )));
        }
    }
    Ok(Output { name: "adapter".into(), path: folder, version: None })
}
