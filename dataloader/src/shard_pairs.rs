//! The shards of a preparation: train and val side by side, ended together, so that whatever is finished
//! is finished up to one document. Owns when they end and what is remembered of them; refuses to know
//! text.

use crate::{DataError, MAX_SHARD_DOCUMENTS, Manifest, ShardEntry, ShardWriter, Tokenizer};
use std::path::{Path, PathBuf};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    Train = 0,
    Val = 1,
}

/// Both splits being written.
#[derive(Debug)]
pub(crate) struct ShardPairs {
    folders: [PathBuf; 2],
    tokenizer: Tokenizer,
    max_shard_tokens: u64,
    open: [Option<ShardWriter>; 2],
    finished: Finished,
}

/// Shards that are complete.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Finished {
    /// Pairs so far: the number of the next shard.
    pairs: u64,
    shards: [Vec<ShardEntry>; 2],
}

impl Finished {
    pub(crate) fn is_empty(&self) -> bool {
        self.pairs == 0
    }
}

impl ShardPairs {
    /// Goes on after what is finished, in `folder/train` and `folder/val`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn create(
        folder: &Path,
        splits: &[Split],
        tokenizer: &Tokenizer,
        max_shard_tokens: u64,
        finished: Finished,
    ) -> Result<ShardPairs, DataError> {
        let folders = ["train", "val"].map(|split| folder.join(split));
        for &split in splits {
            let folder = &folders[split as usize];
            std::fs::create_dir_all(folder).map_err(DataError::io(folder, "created"))?;
        }
        let tokenizer = tokenizer.clone();
        Ok(ShardPairs { folders, tokenizer, max_shard_tokens, open: [None, None], finished })
    }

    /// Ends both shards if one has no room for so many more tokens (`[train, val]`). Returns what is
    /// finished if so. A shard without tokens has room for any document: none is ever cut.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn make_room(&mut self, tokens: [u64; 2]) -> Result<Option<&Finished>, DataError> {
        let is_full = |(shard, tokens): (&Option<ShardWriter>, u64)| {
            shard.as_ref().is_some_and(|shard| {
                tokens > 0
                    && (self.max_shard_tokens.saturating_sub(shard.tokens()) < tokens
                        || shard.documents() >= MAX_SHARD_DOCUMENTS)
            })
        };
        if !self.open.iter().zip(tokens).any(is_full) {
            return Ok(None);
        }
        self.end_pair()?;
        Ok(Some(&self.finished))
    }

    /// The open shard of a split.
    pub(crate) fn shard(&mut self, split: Split) -> Result<&mut ShardWriter, DataError> {
        match &mut self.open[split as usize] {
            Some(shard) => Ok(shard),
            none => {
                let name = format!("shard-{:05}.tokens", self.finished.pairs);
                let file = self.folders[split as usize].join(name);
                Ok(none.insert(ShardWriter::create(&file, &self.tokenizer)?))
            }
        }
    }

    fn end_pair(&mut self) -> Result<(), DataError> {
        for (open, finished) in self.open.iter_mut().zip(&mut self.finished.shards) {
            if let Some(shard) = open.take() {
                finished.push(shard.finish()?);
            }
        }
        self.finished.pairs += 1;
        Ok(())
    }

    /// Ends the last shards and writes the manifest of each split.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn finish(mut self, splits: &[Split], sources: &[String]) -> Result<Vec<Manifest>, DataError> {
        self.end_pair()?;
        let write = |split: &Split| {
            let (folder, shards) = (&self.folders[*split as usize], &self.finished.shards[*split as usize]);
            self.tokenizer.write_into(folder)?;
            let manifest = Manifest::new(&self.tokenizer, shards.clone(), sources.to_vec());
            manifest.write(folder)?;
            Ok(manifest)
        };
        splits.iter().map(write).collect()
    }
}
