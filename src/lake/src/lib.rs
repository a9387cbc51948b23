//! Roots, datasets and run manifests on object storage.
//!
//! Knows zones and storage formats; knows no mechanism and no model. Start at [`root`]: a stage opens a
//! [`PrivateRoot`] or [`ReleaseRoot`], claims its run with [`manifest::begin`], reads pinned versions of [`Table`]s and
//! appends to others exactly once.

mod backoff;
mod compact;
pub mod compare;
mod connect;
pub mod corpus;
mod delta;
mod durable;
mod error;
mod fetch;
mod files;
pub mod gc;
pub mod layout;
mod location;
pub mod manifest;
pub mod overlay;
pub mod private;
mod profile;
#[doc(hidden)]
pub mod promises;
pub mod root;
mod rows;
pub mod schema;
mod steady;
mod store;
pub mod table;

pub use compact::Writers;
pub use connect::StorageOptions;
pub use corpus::CorpusTerms;
pub use error::explain;
pub use fetch::{ByteStream, LocalFolder, TemporaryFolder, delete_temporary_folders, fetch_folder, read_stream};
pub use manifest::{Begin, Claim, Input, Manifest, Output, RunHandle};
pub use overlay::Overlay;
pub use private::Private;
pub use root::{
    LakeError, Pins, PrivateRoot, ReleaseRoot, Zone, canonical_url, check_disjoint, check_disjoint_urls, open_url,
};
pub use table::{AppTransaction, Table, Uploaded};
