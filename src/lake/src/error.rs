//! Storage errors by what the caller can do about them.
//!
//! Messages are built here, from status codes and kinds, never from what a server or a log sent back: an S3 error body
//! repeats the access key id, and a Delta log repeats the smallest and largest private values of a file.

use std::error::Error;
use std::io::ErrorKind;

use crate::durable::Unsure;

/// What can go wrong with storage, by what the caller can do about it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LakeError {
    /// The URL or option is wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// An object or table is not there: exit code 3.
    #[error("{0}")]
    NotFound(String),
    /// The bucket is not there, so that nothing follows for what would be in it: exit code 3.
    #[error("{0}")]
    NoBucket(String),
    /// An object is there but not as expected: exit code 3.
    #[error("{0}")]
    Malformed(String),
    /// The run id exists with other settings or inputs: exit code 2.
    #[error("{0}")]
    Conflict(String),
    /// Access was refused by the store: exit code 3.
    #[error("{0}")]
    Forbidden(String),
    /// Storage or network failed within the deadline: exit code 5, safe to retry.
    #[error("{0}")]
    Transient(String),
}

impl LakeError {
    /// The exit code of the stage contract, for `stage::Failure::coded`: this crate does not know stages.
    pub fn exit_code(&self) -> u8 {
        match self {
            LakeError::Usage(_) | LakeError::Conflict(_) => 2,
            LakeError::NotFound(_) | LakeError::NoBucket(_) | LakeError::Malformed(_) | LakeError::Forbidden(_) => 3,
            LakeError::Transient(_) => 5,
        }
    }

    /// The same error in other words.
    pub(crate) fn map(self, words: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Usage(text) => Self::Usage(words(text)),
            Self::NotFound(text) => Self::NotFound(words(text)),
            Self::NoBucket(text) => Self::NoBucket(words(text)),
            Self::Malformed(text) => Self::Malformed(words(text)),
            Self::Conflict(text) => Self::Conflict(words(text)),
            Self::Forbidden(text) => Self::Forbidden(words(text)),
            Self::Transient(text) => Self::Transient(words(text)),
        }
    }
}

/// The error of one operation on the object at `url`.
pub fn explain(url: &str, error: &object_store::Error) -> LakeError {
    use object_store::Error as E;
    match error {
        E::NotFound { .. } => match s3_code(&text(error)) {
            Some("NoSuchBucket") => {
                LakeError::NoBucket(format!("{url}: there is no such bucket\nhelp: create it, or correct the URL"))
            }
            Some("NoSuchUpload") => LakeError::Transient(format!(
                "{url}: the store no longer knows this upload: it was completed but the answer was lost, or it was \
                 aborted\nhelp: run again"
            )),
            _ => LakeError::NotFound(format!("{url}: not found")),
        },
        E::AlreadyExists { .. } => LakeError::Conflict(format!("{url}: exists already")),
        E::Precondition { .. } | E::NotModified { .. } => {
            LakeError::Transient(format!("{url}: the object changed while it was being read\nhelp: run again"))
        }
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => forbidden(url, error),
        E::NotImplemented { .. } | E::NotSupported { .. } => {
            LakeError::Usage(format!("{url}: this store cannot do what doppel needs of it"))
        }
        E::InvalidPath { .. } => LakeError::Usage(format!("{url}: not a valid object path")),
        E::Generic { source, .. } if source.is::<Unsure>() => LakeError::Forbidden(format!(
            "{url}: written, but the disk did not confirm it, so a loss of power may take it back\n\
             help: check the disk and its file system, then run again"
        )),
        _ => by_cause(url, error),
    }
}

/// The error of a file operation on `path`.
pub(crate) fn explain_io(path: &str, error: &std::io::Error) -> LakeError {
    by_io_kind(path, error.kind())
        .unwrap_or_else(|| LakeError::Transient(format!("{path}: {}", describe_kind(error.kind()))))
}

/// Whether trying again, by itself, may help.
pub(crate) fn is_transient(error: &object_store::Error) -> bool {
    matches!(explain("", error), LakeError::Transient(_))
}

fn forbidden(url: &str, error: &object_store::Error) -> LakeError {
    let text = text(error);
    let code = s3_code(&text);
    // Clocks that are being set are right a moment later, so this is tried again like a failure of the network.
    if let Some(code @ ("RequestTimeTooSkewed" | "RequestExpired")) = code {
        return LakeError::Transient(format!(
            "{url}: the store refused the request for its time ({code})\n\
             help: set the clock of this machine, or of the store, then run again"
        ));
    }
    let code = code.map(|code| format!(" ({code})")).unwrap_or_default();
    LakeError::Forbidden(format!(
        "{url}: the store refused access{code}\n\
         help: check the credentials in the environment (AWS_ACCESS_KEY_ID or AWS_PROFILE, GOOGLE_*, AZURE_*) \
         and what they may read and write; for a folder, its permissions"
    ))
}

fn by_cause(url: &str, error: &object_store::Error) -> LakeError {
    if let Some(found) = io_kind(error).and_then(|kind| by_io_kind(url, kind)) {
        return found;
    }
    let text = text(error);
    let code = s3_code(&text);
    let told = code.map(|code| format!(" ({code})")).unwrap_or_default();
    let passing = |status: u16| {
        LakeError::Transient(format!("{url}: the store answered {status}{told} until the deadline\nhelp: run again"))
    };
    match status(&text) {
        Some(401 | 403) => forbidden(url, error),
        Some(301 | 307) => elsewhere(url),
        Some(416) => cut_short(url),
        Some(status @ (..=399 | 408 | 409 | 429 | 500..)) => passing(status),
        Some(status) if code.is_some_and(passes) => passing(status),
        Some(status) => LakeError::Usage(format!("{url}: the store refused the request with {status}{told}")),
        None => without_answer(url, error, &without_names(&text)),
    }
}

/// Whether the S3 error `code` tells of a bad moment, with whatever status: S3 sends some with 400.
fn passes(code: &str) -> bool {
    matches!(code, "RequestTimeout" | "IncompleteBody" | "SlowDown" | "InternalError" | "ServiceUnavailable")
}

fn elsewhere(url: &str) -> LakeError {
    LakeError::Usage(format!("{url}: the bucket is in another region\nhelp: set AWS_REGION, or region in the profile"))
}

/// The error of a range that goes beyond the end: ranges are asked for by the size that is on record.
fn cut_short(url: &str) -> LakeError {
    LakeError::Malformed(format!(
        "{url}: shorter than the log says; it is damaged or cut short\n\
         help: restore the file, or write the table again"
    ))
}

/// The error of a request that got no answer, by the words of `text`.
fn without_answer(url: &str, error: &object_store::Error, text: &str) -> LakeError {
    if text.contains("Wanted range starting at") || text.contains("Out of range of file") {
        return cut_short(url);
    }
    if text.contains("Received redirect without LOCATION") {
        return elsewhere(url);
    }
    if text.contains("scheme is not allowed") {
        return LakeError::Usage(format!(
            "{url}: the endpoint is plain http://\n\
             help: use https://, or set AWS_ALLOW_HTTP=true if the network between here and there can be trusted"
        ));
    }
    if text.contains("InvalidContentType") || text.contains("corrupt message") || text.contains("wrong version number")
    {
        return LakeError::Usage(format!(
            "{url}: the endpoint does not speak TLS\n\
             help: correct AWS_ENDPOINT_URL; for plain HTTP write http:// and set AWS_ALLOW_HTTP=true"
        ));
    }
    if text.contains("certificate") {
        return LakeError::Usage(format!(
            "{url}: the endpoint's TLS certificate was not accepted\n\
             help: add its authority to the system's certificates, or correct AWS_ENDPOINT_URL"
        ));
    }
    if text.contains("Missing bucket") || text.contains("configuration") || text.contains("Account must be specified") {
        return LakeError::Usage(format!(
            "{url}: the store is not configured\nhelp: set the variables of the store (AWS_*, GOOGLE_*, AZURE_*)"
        ));
    }
    LakeError::Transient(format!(
        "{url}: {}\nhelp: check the endpoint and the network, then run again",
        network_reason(error, text)
    ))
}

/// `text` without URLs and paths: what users call their buckets and objects must not be taken for a reason.
fn without_names(text: &str) -> String {
    text.split(' ').filter(|word| !word.contains('/')).collect::<Vec<_>>().join(" ")
}

fn by_io_kind(url: &str, kind: ErrorKind) -> Option<LakeError> {
    Some(match kind {
        ErrorKind::NotFound => LakeError::NotFound(format!("{url}: not found")),
        ErrorKind::PermissionDenied => LakeError::Forbidden(format!(
            "{url}: permission denied\nhelp: check who owns the folder, and its permissions"
        )),
        ErrorKind::ReadOnlyFilesystem => LakeError::Forbidden(format!(
            "{url}: the file system is read-only\nhelp: choose a root that can be written"
        )),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            LakeError::Transient(format!("{url}: the disk is full\nhelp: make room, then run again"))
        }
        ErrorKind::NotADirectory | ErrorKind::IsADirectory => LakeError::Usage(format!(
            "{url}: a file stands where a folder is needed, or the other way round\nhelp: choose another root"
        )),
        ErrorKind::InvalidFilename => LakeError::Usage(format!(
            "{url}: the name is longer than the file system takes\nhelp: choose a shorter --run, or another root"
        )),
        _ => return None,
    })
}

fn network_reason(error: &object_store::Error, text: &str) -> String {
    if text.contains("timed out") || text.contains("Timeout") || text.contains("deadline") {
        return "no answer in time".into();
    }
    if text.contains("dns error") || text.contains("failed to lookup address") {
        return "the host name of the endpoint is not known".into();
    }
    match io_kind(error) {
        Some(kind) => describe_kind(kind).into(),
        None if text.contains("connect") || text.contains("Connect") => "the endpoint cannot be reached".into(),
        None => "the store or the network failed".into(),
    }
}

fn describe_kind(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::ConnectionRefused => "connection refused",
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => "connection lost",
        ErrorKind::TimedOut => "no answer in time",
        ErrorKind::UnexpectedEof => "the answer was cut short",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "the endpoint cannot be reached",
        ErrorKind::Interrupted => "interrupted",
        _ => "input or output failed",
    }
}

/// The kind of the first I/O error among the causes of `error`.
pub(crate) fn io_kind(error: &(dyn Error + 'static)) -> Option<ErrorKind> {
    chain(error).find_map(|cause| cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind))
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| {
        // `io::Error::source` skips the error it wraps.
        match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        }
    })
}

/// All causes as one text, to look for codes in; never to be shown.
pub(crate) fn text(error: &(dyn Error + 'static)) -> String {
    chain(error).map(|cause| cause.to_string()).collect::<Vec<_>>().join(" | ")
}

/// The status of an answer, in the text of its error.
pub(crate) fn status(text: &str) -> Option<u16> {
    let at = text.find("status code: ")? + "status code: ".len();
    text.get(at..at + 3)?.parse().ok()
}

/// The `<Code>` of an S3 error body, if it is a plain word.
fn s3_code(text: &str) -> Option<&str> {
    let from = text.find("<Code>")? + "<Code>".len();
    let code = &text[from..from + text[from..].find("</Code>")?];
    (code.len() <= 40 && code.chars().all(|c| c.is_ascii_alphanumeric())).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(message: &str) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: message.to_string().into() }
    }

    #[track_caller]
    fn check(message: &str, expected: &str) {
        let found = explain("s3://lake/a", &generic(message));
        assert!(format!("{found:?}").starts_with(expected), "{found:?}");
        assert!(!found.to_string().contains("AKIA"), "{found}");
    }

    #[test]
    fn the_body_of_an_answer_is_never_repeated() {
        let body = "Server returned non-2xx status code: 403: <Error><Code>InvalidAccessKeyId</Code>\
                    <AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId></Error>";
        check(body, "Forbidden(\"s3://lake/a: the store refused access (InvalidAccessKeyId)");
    }

    #[test]
    fn a_wrong_clock_may_be_right_later() {
        let body = "status code: 403: <Error><Code>RequestTimeTooSkewed</Code></Error>";
        check(body, "Transient(\"s3://lake/a: the store refused the request for its time (RequestTimeTooSkewed)");
    }

    #[test]
    fn an_upload_that_is_gone_is_no_missing_object() {
        let gone = |code: &str| {
            let source = format!("status code: 404: <Error><Code>{code}</Code></Error>").into();
            explain("s3://lake/a", &object_store::Error::NotFound { path: "a".into(), source })
        };
        assert!(matches!(gone("NoSuchUpload"), LakeError::Transient(_)));
        assert!(matches!(gone("NoSuchKey"), LakeError::NotFound(_)));
    }

    #[test]
    fn errors_are_sorted_by_remedy() {
        check("Server returned non-2xx status code: 503: <Code>SlowDown</Code>", "Transient");
        check("Server returned non-2xx status code: 400: AKIA", "Usage");
        for code in ["RequestTimeout", "IncompleteBody", "SlowDown", "InternalError", "ServiceUnavailable"] {
            let body =
                format!("Server returned non-2xx status code: 400 Bad Request: <Error><Code>{code}</Code></Error>");
            check(&body, &format!("Transient(\"s3://lake/a: the store answered 400 ({code})"));
        }
        check("Server returned non-2xx status code: 400: <Code>InvalidDigest</Code>", "Usage");
        check("Server returned non-2xx status code: 416: <Code>InvalidRange</Code>", "Malformed");
        check("Wanted range starting at 9, but object was only 4 bytes long", "Malformed");
        check("URL scheme is not allowed", "Usage");
        check("received corrupt message of type InvalidContentType", "Usage");
        check("operation timed out", "Transient(\"s3://lake/a: no answer in time");
        check("invalid peer certificate: UnknownIssuer", "Usage");
    }

    #[test]
    fn another_region_is_told_by_the_way_out() {
        let bare = "Error performing GET http://host/lake/a in 3ms - Received redirect without LOCATION, this normally \
                    indicates an incorrectly configured region";
        for answer in [bare, "Server returned non-2xx status code: 301 Moved Permanently: ", "status code: 307: "] {
            check(answer, "Usage(\"s3://lake/a: the bucket is in another region\\nhelp: set AWS_REGION");
        }
    }

    #[test]
    fn names_are_no_reasons() {
        let url = "http://host/certificate-1/configuration/Timeout";
        check(&format!("GET {url} failed: status code: 503: <Code>SlowDown</Code>"), "Transient");
        let lost = format!("error sending request for url ({url}): connection closed");
        check(&lost, "Transient(\"s3://lake/a: the endpoint cannot be reached");
    }

    #[test]
    fn a_full_disk_and_a_read_only_one_are_told_apart() {
        let error = |kind: ErrorKind| object_store::Error::Generic {
            store: "LocalFileSystem",
            source: Box::new(std::io::Error::from(kind)),
        };
        assert!(explain("a", &error(ErrorKind::StorageFull)).to_string().contains("full"));
        assert!(matches!(explain("a", &error(ErrorKind::ReadOnlyFilesystem)), LakeError::Forbidden(_)));
        assert!(matches!(explain("a", &error(ErrorKind::InvalidFilename)), LakeError::Usage(_)));
    }
}
