//! A data set's manifest: which shards it has, of which tokens, from which files. Owns its JSON and
//! that it is consistent; refuses to open shards.

use crate::files::{hex, unhex};
use crate::{DataError, Tokenizer, files};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Component, Path};

/// The manifest's name in a data set's folder.
pub const MANIFEST_NAME: &str = "manifest.json";

/// The manifest version that is written and read here.
pub const MANIFEST_VERSION: u32 = 1;

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// What made the tokens.
    pub tokenizer: TokenizerEntry,
    /// Tokens of all shards.
    pub tokens: u64,
    /// Documents of all shards.
    pub documents: u64,
    /// Bytes of text of all shards.
    pub source_bytes: u64,
    /// BLAKE3 of the shards' digests, one after the other.
    #[serde(with = "hexadecimal")]
    pub digest: [u8; 32],
    /// The shards, in the order of their tokens.
    pub shards: Vec<ShardEntry>,
    /// The source files, as they were named; documents refer to them by position.
    pub sources: Vec<String>,
}

/// A tokenizer, as manifests name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerEntry {
    /// [`Tokenizer::id`].
    pub id: String,
    /// [`Tokenizer::digest`].
    #[serde(with = "hexadecimal")]
    pub digest: [u8; 32],
}

/// A shard, as manifests name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name in the manifest's folder.
    pub name: String,
    /// Tokens.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// Bytes of text that the tokens stand for.
    pub source_bytes: u64,
    /// BLAKE3 of the tokens as they lie on disk.
    #[serde(with = "hexadecimal")]
    pub digest: [u8; 32],
}

impl Manifest {
    /// The manifest of these shards.
    pub fn new(tokenizer: &Tokenizer, shards: Vec<ShardEntry>, sources: Vec<String>) -> Manifest {
        Manifest {
            version: MANIFEST_VERSION,
            tokenizer: TokenizerEntry { id: tokenizer.id().to_string(), digest: tokenizer.digest() },
            tokens: shards.iter().map(|shard| shard.tokens).sum(),
            documents: shards.iter().map(|shard| shard.documents).sum(),
            source_bytes: shards.iter().map(|shard| shard.source_bytes).sum(),
            digest: digest_of(&shards),
            shards,
            sources,
        }
    }

    /// Reads and checks a data set's manifest.
    ///
    /// # Errors
    /// None there, another version, no JSON of this shape, an unknown tokenizer, a shard name that is
    /// no plain file name, totals or a digest that are not the shards'.
    pub fn read(folder: &Path) -> Result<Manifest, DataError> {
        let file = folder.join(MANIFEST_NAME);
        let text = std::fs::read(&file).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                DataError::NoDataSet { folder: folder.into() }
            }
            _ => DataError::Io { file: file.clone(), action: "read", source },
        })?;
        let invalid = |what: String| DataError::ManifestInvalid { file: file.clone(), what };

        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } =
            serde_json::from_slice(&text).map_err(|error| invalid(format!("no manifest: {error}")))?;
        if version != MANIFEST_VERSION {
            return Err(DataError::UnknownVersion { file, got: version, expected: MANIFEST_VERSION });
        }
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| invalid(format!("no manifest: {error}")))?;
        manifest.check(&file)?;
        Ok(manifest)
    }

    /// Writes the manifest into a folder, complete or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, folder: &Path) -> Result<(), DataError> {
        let mut text =
            serde_json::to_string_pretty(self).expect("strings and integers always have a JSON form");
        text.push('\n');
        files::write(&folder.join(MANIFEST_NAME), text.as_bytes())
    }

    /// The tokenizer that the manifest names; `file` is where it was read.
    pub(crate) fn tokenizer_in(&self, file: &Path) -> Result<Tokenizer, DataError> {
        let id = &self.tokenizer.id;
        let Some(tokenizer) = Tokenizer::in_folder(files::parent(file), id) else {
            return Err(DataError::UnknownTokenizer { file: file.into(), id: id.clone() });
        };
        let tokenizer = tokenizer?;
        check_tokenizer(&tokenizer, id, &self.tokenizer.digest, file)?;
        Ok(tokenizer)
    }

    fn check(&self, file: &Path) -> Result<(), DataError> {
        if let Some(shard) = self.shards.iter().find(|shard| !is_plain_name(&shard.name)) {
            return Err(DataError::ShardName { file: file.into(), name: shard.name.clone() });
        }
        let sum =
            |of: fn(&ShardEntry) -> u64| self.shards.iter().try_fold(0u64, |sum, s| sum.checked_add(of(s)));
        for (what, got, expected) in [
            ("tokens", self.tokens, sum(|shard| shard.tokens)),
            ("documents", self.documents, sum(|shard| shard.documents)),
            ("source_bytes", self.source_bytes, sum(|shard| shard.source_bytes)),
        ] {
            if Some(got) != expected {
                let expected = expected.map_or("a sum that fits 64 bits".to_string(), |sum| sum.to_string());
                let what = format!("{what} is {got}, expected {expected}, the sum over the shards");
                return Err(DataError::ManifestInvalid { file: file.into(), what });
            }
        }
        let expected = digest_of(&self.shards);
        if self.digest != expected {
            let (got, expected) = (hex(&self.digest), hex(&expected));
            let what = format!("digest is {got}, expected {expected}, that of the shards' digests");
            return Err(DataError::ManifestInvalid { file: file.into(), what });
        }
        Ok(())
    }
}

/// Whether an id and digest found in `file` are those of `tokenizer`.
pub(crate) fn check_tokenizer(
    tokenizer: &Tokenizer,
    id: &str,
    digest: &[u8; 32],
    file: &Path,
) -> Result<(), DataError> {
    if id == tokenizer.id() && *digest == tokenizer.digest() {
        return Ok(());
    }
    let describe = |id: &str, digest: &[u8; 32]| format!("{id:?} ({}...)", &hex(digest)[..16]);
    let (got, expected) = (describe(id, digest), describe(tokenizer.id(), &tokenizer.digest()));
    Err(DataError::TokenizerMismatch { file: file.into(), got, expected })
}

/// The digest of a data set: what its order and a run's identity are made from.
fn digest_of(shards: &[ShardEntry]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for shard in shards {
        hasher.update(&shard.digest);
    }
    *hasher.finalize().as_bytes()
}

/// A name that stays in its folder: one component, neither `.` nor `..`.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(first)) if first == name);
    plain && components.next().is_none() && !name.contains(['\\', '\0'])
}

mod hexadecimal {
    //! Digests as 64 hexadecimal digits.
    use super::{hex, unhex};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(digest: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(digest))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        unhex(&text)
            .ok_or_else(|| D::Error::custom(format!("{text:?} is no digest of 64 hexadecimal digits")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_stay_in_the_folder_are_plain() {
        assert!(is_plain_name("shard-00000.tokens"));
        for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a/", "./a", "a\\b", "a\0b"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
    }
}
