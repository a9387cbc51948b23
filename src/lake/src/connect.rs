//! Clients for stores, configured by the ecosystem's own environment variables.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};

use crate::durable::Durable;
use crate::error::{LakeError, explain};
use crate::location::{Location, StoreKind};
use crate::profile;

/// How to reach storage; credentials come from the environment, never from here.
#[derive(Clone, Debug)]
pub struct StorageOptions {
    /// Deadline of one storage operation with its retries.
    pub timeout: Duration,
}

impl Default for StorageOptions {
    fn default() -> Self {
        // Below the five minutes for which S3 credentials and signatures are sure to stay valid.
        Self { timeout: Duration::from_secs(180) }
    }
}

/// Limit of one request: a stalled connection is given up early enough to try again within the deadline.
pub(crate) fn request_timeout(deadline: Duration) -> Duration {
    (deadline / 3).clamp(Duration::from_secs(1), Duration::from_secs(30))
}

/// A client for the store of `location`; without `retry`, each request is tried once, and may take all of the time.
pub(crate) fn connect(
    location: &Location,
    options: &StorageOptions,
    retry: bool,
) -> Result<Arc<dyn ObjectStore>, LakeError> {
    // A pause that began before the deadline must end soon after it, or the reason of the last failure is not told.
    let max_backoff = (request_timeout(options.timeout) / 2).min(Duration::from_secs(5));
    let retries = RetryConfig {
        backoff: BackoffConfig { max_backoff, ..BackoffConfig::default() },
        max_retries: if retry { usize::MAX } else { 0 },
        retry_timeout: options.timeout,
    };
    let request = if retry { request_timeout(options.timeout) } else { options.timeout };
    let request = format!("{} ms", request.as_millis());
    let connect = format!("{} ms", request_timeout(options.timeout).min(Duration::from_secs(5)).as_millis());
    let clock = [(ClientConfigKey::Timeout, request), (ClientConfigKey::ConnectTimeout, connect)];
    let store: Arc<dyn ObjectStore> = match &location.store {
        StoreKind::Local => Arc::new(Durable::default()),
        StoreKind::S3 { bucket } => {
            let mut builder = s3(location)?.with_bucket_name(bucket).with_retry(retries);
            for (key, value) in clock {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            Arc::new(builder.build().map_err(|error| explain(location.url.as_str(), &error))?)
        }
        StoreKind::Gcs { bucket } => {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retries);
            for (key, value) in clock {
                builder = builder.with_config(GoogleConfigKey::Client(key), value);
            }
            Arc::new(builder.build().map_err(|error| explain(location.url.as_str(), &error))?)
        }
        StoreKind::Azure { container } => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(container).with_retry(retries);
            for (key, value) in clock {
                builder = builder.with_config(AzureConfigKey::Client(key), value);
            }
            Arc::new(builder.build().map_err(|error| explain(location.url.as_str(), &error))?)
        }
    };
    Ok(store)
}

/// An S3 client from the environment, completed from the AWS profile.
fn s3(location: &Location) -> Result<AmazonS3Builder, LakeError> {
    use AmazonS3ConfigKey as Key;
    let mut builder = AmazonS3Builder::from_env();
    let profile = profile::load();
    let settings = [
        ("aws_secret_access_key", Key::SecretAccessKey),
        ("aws_session_token", Key::Token),
        ("aws_access_key_id", Key::AccessKeyId),
    ];
    // A key of the environment never goes with a secret of the profile.
    if builder.get_config_value(&Key::AccessKeyId).is_none() {
        for (name, key) in settings {
            if let Some(value) = profile.get(name) {
                builder = builder.with_config(key, value);
            }
        }
    }
    for (name, key) in [("region", Key::Region), ("endpoint_url", Key::Endpoint)] {
        if let (None, Some(value)) = (builder.get_config_value(&key), profile.get(name)) {
            builder = builder.with_config(key, value);
        }
    }
    let endpoint = builder.get_config_value(&Key::S3Endpoint).or_else(|| builder.get_config_value(&Key::Endpoint));
    if let Some(endpoint) = endpoint {
        let endpoint = endpoint.trim_end_matches('/').to_string();
        let allowed = builder.get_config_value(&Key::Client(ClientConfigKey::AllowHttp));
        if endpoint.starts_with("http://") && !allowed.is_some_and(|value| matches!(value.as_str(), "true" | "1")) {
            return Err(LakeError::Usage(format!(
                "{}: the endpoint is plain http://\n\
                 help: use https://, or set AWS_ALLOW_HTTP=true if the network between here and there can be trusted",
                location.url
            )));
        }
        builder = builder.with_config(Key::Endpoint, &endpoint).with_config(Key::S3Endpoint, endpoint);
        // Elsewhere than at Amazon there is no instance metadata to ask, and asking takes minutes to fail.
        let anywhere = ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"];
        let other = anywhere.iter().chain(&["AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE"]);
        if builder.get_config_value(&Key::AccessKeyId).is_none()
            && other.copied().all(|name| profile::variable(name).is_none())
        {
            return Err(LakeError::Usage(format!(
                "{}: no credentials\nhelp: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
                location.url
            )));
        }
    }
    Ok(builder)
}
