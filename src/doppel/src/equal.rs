//! Whether an output came out the same: tables row for row, objects byte for byte, tensors one by one.

use lake::compare::{Difference, first_difference};
use lake::{LakeError, Zone};
use safetensors::SafeTensors;
use stage::Failure;

/// Something to compare.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// What the stage calls it.
    pub name: String,
    /// Path below the root.
    pub path: String,
    /// Version of the original, for tables.
    pub version: Option<i64>,
}

/// Whether an item is equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// In every row or byte.
    Equal,
    /// With the place, where it may be told.
    NotEqual(Option<String>),
}

/// Most tensors that are named.
const NAMED: usize = 4;

/// Compares the original of `item` with what a rerun wrote; `None` where neither wrote it.
///
/// PRIVACY: where something private differs follows from private data, so it is told of the release zone alone.
pub async fn compare<Z: Zone>(original: &Z, again: &Z, item: &Item) -> Result<Option<Verdict>, Failure> {
    let version = match item.version {
        Some(version) => Some(version),
        None => original.table(&item.path).version().await?,
    };
    let difference = match version {
        Some(version) => rows(original, again, &item.path, version).await?,
        None => match objects(original, again, &item.path).await? {
            Some(difference) => difference,
            None => return Ok(None),
        },
    };
    let told = |place: String| Verdict::NotEqual((Z::NAME == "release").then_some(place));
    Ok(Some(difference.map_or(Verdict::Equal, told)))
}

/// Where the table at `path` differs.
async fn rows<Z: Zone>(original: &Z, again: &Z, path: &str, version: i64) -> Result<Option<String>, Failure> {
    let (original, again) = (original.table(path), again.table(path));
    let Some(latest) = again.version().await? else {
        return Ok(Some("it was not written again".to_owned()));
    };
    let difference = first_difference((&original, version), (&again, latest)).await?;
    Ok(difference.map(|difference| match difference {
        Difference::Columns => "its columns".to_owned(),
        Difference::Row(row) => format!("row {row}"),
    }))
}

/// Where the object at `path`, or those below it, differ; `None` where there are none.
async fn objects<Z: Zone>(original: &Z, again: &Z, path: &str) -> Result<Option<Option<String>>, Failure> {
    let (one, other) = (paths(original, path).await?, paths(again, path).await?);
    if one.is_empty() && other.is_empty() {
        return Ok(None);
    }
    let name = |path: &String| path.rsplit('/').next().unwrap_or(path).to_owned();
    let mut places = Vec::new();
    for path in one.iter().chain(other.iter().filter(|path| !one.contains(path))) {
        match (one.contains(path), other.contains(path)) {
            (true, true) => {
                let (one, other) = (original.get(path).await?, again.get(path).await?);
                if one != other {
                    places.push(format!("{}{}", name(path), tensors(&one, &other)));
                }
            }
            (true, false) => places.push(format!("{} was not written again", name(path))),
            _ => places.push(format!("{} was not there before", name(path))),
        }
    }
    Ok(Some((!places.is_empty()).then(|| places.join("; "))))
}

async fn paths<Z: Zone>(zone: &Z, path: &str) -> Result<Vec<String>, LakeError> {
    let below = zone.list(path).await?;
    if !below.is_empty() {
        return Ok(below);
    }
    match zone.get(path).await {
        Ok(_) => Ok(vec![path.to_owned()]),
        Err(LakeError::NotFound(_)) => Ok(below),
        Err(error) => Err(error),
    }
}

/// Which tensors of two safetensors files differ; nothing for other files.
fn tensors(one: &[u8], other: &[u8]) -> String {
    let (Ok(one), Ok(other)) = (SafeTensors::deserialize(one), SafeTensors::deserialize(other)) else {
        return String::new();
    };
    let mut names: Vec<&str> = one.names().into_iter().chain(other.names()).collect();
    names.sort_unstable();
    names.dedup();
    let same = |name: &&str| match (one.tensor(name), other.tensor(name)) {
        (Ok(one), Ok(other)) => (one.dtype(), one.shape(), one.data()) == (other.dtype(), other.shape(), other.data()),
        _ => false,
    };
    names.retain(|name| !same(name));
    let more = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    match (names.is_empty(), more) {
        (true, _) => ": its header".to_owned(),
        (false, 0) => format!(": {}", names.join(", ")),
        (false, more) => format!(": {} and {more} more tensors", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lake::{PrivateRoot, ReleaseRoot, StorageOptions};
    use safetensors::tensor::{Dtype, TensorView};

    fn file(tensors: &[(&str, [u8; 4])]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, data)| (*name, TensorView::new(Dtype::F32, vec![1], data).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    #[test]
    fn tensors_that_differ_are_named() {
        let before = file(&[("a", [0; 4]), ("b", [1; 4]), ("c", [2; 4])]);
        assert_eq!(tensors(&before, &file(&[("a", [0; 4]), ("b", [9; 4]), ("c", [2; 4])])), ": b");
        assert_eq!(tensors(&before, &file(&[("a", [0; 4]), ("b", [1; 4])])), ": c");
        assert_eq!(tensors(&before, b"no safetensors"), "");
        let many: Vec<(String, [u8; 4])> = (0..6).map(|n| (format!("t{n}"), [n; 4])).collect();
        let many: Vec<(&str, [u8; 4])> = many.iter().map(|(name, data)| (name.as_str(), *data)).collect();
        assert_eq!(tensors(&file(&many), &file(&[])), ": t0, t1, t2, t3 and 2 more tensors");
    }

    async fn verdict<Z: Zone>(original: &Z, again: &Z, path: &str) -> Option<Verdict> {
        compare(original, again, &Item { name: path.into(), path: path.into(), version: None }).await.unwrap()
    }

    #[tokio::test]
    async fn where_something_private_differs_is_not_told() {
        let folder = tempfile::tempdir().unwrap();
        let url = |name: &str| folder.path().join(name).display().to_string();
        let options = StorageOptions::default();
        let release = [url("r0"), url("r1")];
        let [before, after] = &release;
        let release =
            (ReleaseRoot::open(before, &options).await.unwrap(), ReleaseRoot::open(after, &options).await.unwrap());
        let private =
            (PrivateRoot::open(before, &options).await.unwrap(), PrivateRoot::open(after, &options).await.unwrap());
        for (path, one, other) in [("same/x", "1", "1"), ("other/x", "1", "2"), ("single", "1", "2")] {
            release.0.put(path, one.into()).await.unwrap();
            release.1.put(path, other.into()).await.unwrap();
        }
        release.0.put("gone/x", "1".into()).await.unwrap();
        let told = |text: &str| Some(Verdict::NotEqual(Some(text.into())));
        assert_eq!(verdict(&release.0, &release.1, "same").await, Some(Verdict::Equal));
        assert_eq!(verdict(&release.0, &release.1, "other").await, told("x"));
        assert_eq!(verdict(&release.0, &release.1, "single").await, told("single"));
        assert_eq!(verdict(&release.0, &release.1, "gone").await, told("x was not written again"));
        assert_eq!(verdict(&release.0, &release.1, "never").await, None);
        assert_eq!(verdict(&private.0, &private.1, "same").await, Some(Verdict::Equal));
        assert_eq!(verdict(&private.0, &private.1, "other").await, Some(Verdict::NotEqual(None)));
    }
}
