//! Randomness keyed by a secret and a context: the same context gives the same stream, any other a fresh one.
//!
//! A stage that is killed and run again must add the *same* noise: a second, independent draw over the same data would
//! be a second release that nobody accounted for. And whenever anything differs, the data above all, the noise must be
//! fresh: the same noise on two corpora cancels out in their difference. Both follow from deriving every stream from
//! the secret and a [`Context`] that names all that the noise is for.
//!
//! Construction: `BLAKE3-keyed(key, tag ‖ context)` seeds ChaCha20. The tag separates streams from hashes, so that no
//! hash ever equals bytes that seed a stream.

use std::fmt;

use blake3::Hasher;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use zeroize::Zeroize;

const STREAM_TAG: &[u8; 16] = b"doppel.stream.v1";
const HASH_TAG: &[u8; 16] = b"doppel.hashes.v1";

/// 256-bit secret of a private root. `Debug` prints `<private>`; there is no way to print it. Wiped when dropped.
#[derive(Clone)]
pub struct NoiseKey([u8; 32]);

/// What a stream is for: ordered, length-prefixed (name, value) fields.
///
/// The encoding is injective: two contexts are equal if and only if they were built from the same purpose and the same
/// fields in the same order. A field's value may be a digest of private data; `Debug` therefore prints only the length.
#[derive(Clone, PartialEq, Eq)]
pub struct Context(Vec<u8>);

impl Context {
    /// Starts a context for `purpose`, such as `train/noise`.
    pub fn new(purpose: &str) -> Self {
        let mut context = Self(Vec::with_capacity(64));
        context.push(purpose.as_bytes());
        context
    }

    /// Adds a field; the encoding is injective.
    #[must_use]
    pub fn field(mut self, name: &str, value: &[u8]) -> Self {
        self.push(name.as_bytes());
        self.push(value);
        self
    }

    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.0.extend_from_slice(bytes);
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context(<{} bytes>)", self.0.len())
    }
}

impl NoiseKey {
    /// Wraps 32 secret bytes, which must come from the operating system's generator.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for the ledger to store.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// ChaCha20 stream for `context`.
    pub fn stream(&self, context: &Context) -> ChaCha20Rng {
        ChaCha20Rng::from_seed(self.derive(STREAM_TAG, context))
    }

    /// Keyed 64-bit hash of `value` in `context`: for splits and for sampling, independent of other values.
    pub fn hash(&self, context: &Context, value: &[u8]) -> u64 {
        self.hasher(context).hash(value)
    }

    /// [`NoiseKey::hash`] with the work that depends on the context alone done once, for loops over many values.
    pub fn hasher(&self, context: &Context) -> KeyedHasher {
        KeyedHasher(self.derive(HASH_TAG, context))
    }

    fn derive(&self, tag: &[u8; 16], context: &Context) -> [u8; 32] {
        let mut hasher = Hasher::new_keyed(&self.0);
        hasher.update(tag).update(&context.0);
        *hasher.finalize().as_bytes()
    }
}

impl fmt::Debug for NoiseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<private>")
    }
}

impl Drop for NoiseKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Hashes values in one context; made by [`NoiseKey::hasher`]. Wiped when dropped.
pub struct KeyedHasher([u8; 32]);

impl KeyedHasher {
    /// Keyed 64-bit hash of `value`, equal to [`NoiseKey::hash`] in the same context.
    pub fn hash(&self, value: &[u8]) -> u64 {
        let digest = blake3::keyed_hash(&self.0, value);
        let mut first = [0; 8];
        first.copy_from_slice(&digest.as_bytes()[..8]);
        u64::from_le_bytes(first)
    }
}

impl fmt::Debug for KeyedHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<private>")
    }
}

impl Drop for KeyedHasher {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use rand_core::RngCore;

    use super::*;

    fn key() -> NoiseKey {
        NoiseKey::new([7; 32])
    }

    #[test]
    fn debug_never_prints_the_secret() {
        assert_eq!(format!("{:?}", key()), "<private>");
        let context = Context::new("train").field("digest", b"private-digest");
        assert!(!format!("{context:?}").contains("private-digest"));
        assert_eq!(format!("{:?}", key().hasher(&context)), "<private>");
    }

    #[test]
    fn same_context_same_stream() {
        let context = || Context::new("train/noise").field("run", b"r1").field("step", &3u64.to_le_bytes());
        assert_eq!(key().stream(&context()).next_u64(), key().stream(&context()).next_u64());
        assert_eq!(key().hash(&context(), b"u"), key().hasher(&context()).hash(b"u"));
    }

    #[test]
    fn no_noise_value_is_reused_across_differing_contexts() {
        let mut seen = HashSet::new();
        let mut streams = 0;
        for (purpose, run, version) in
            [("a", "r", "1"), ("a", "r", "2"), ("a", "q", "1"), ("b", "r", "1"), ("ar", "", "1")]
        {
            for step in 0u64..50 {
                let context = Context::new(purpose)
                    .field("run", run.as_bytes())
                    .field("version", version.as_bytes())
                    .field("step", &step.to_le_bytes());
                let mut stream = key().stream(&context);
                seen.extend((0..64).map(|_| stream.next_u64()));
                seen.insert(key().hash(&context, b""));
                streams += 1;
            }
        }
        // 64-bit values: a collision among 16,250 of them by chance has probability 7e-12.
        assert_eq!(seen.len(), streams * 65);
        let context = Context::new("a");
        let other_key = NoiseKey::new([8; 32]);
        assert_ne!(key().stream(&context).next_u64(), other_key.stream(&context).next_u64());
    }

    #[test]
    fn a_boundary_between_fields_cannot_be_moved() {
        let one = Context::new("p").field("ab", b"c");
        let two = Context::new("p").field("a", b"bc");
        let three = Context::new("pa").field("b", b"c");
        assert_ne!(one, two);
        assert_ne!(one, three);
        assert_ne!(Context::new("p").field("a", b""), Context::new("p").field("", b"a"));
    }

    type Fields = Vec<(String, Vec<u8>)>;

    fn build(purpose: &str, fields: &Fields) -> Context {
        fields.iter().fold(Context::new(purpose), |context, (name, value)| context.field(name, value))
    }

    proptest! {
        #[test]
        fn encoding_is_injective(
            purposes in (".{0,3}", ".{0,3}"),
            one in prop::collection::vec((".{0,2}", prop::collection::vec(any::<u8>(), 0..9)), 0..3),
            two in prop::collection::vec((".{0,2}", prop::collection::vec(any::<u8>(), 0..9)), 0..3),
        ) {
            let same = purposes.0 == purposes.1 && one == two;
            prop_assert_eq!(build(&purposes.0, &one) == build(&purposes.1, &two), same);
        }
    }
}
