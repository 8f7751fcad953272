//! Writing a data set: documents go into shards, one after the other, and the manifest comes last.
//! Refuses to know where documents come from.

use crate::{DataError, Manifest, ShardEntry, ShardWriter, Tokenizer};
use std::path::{Path, PathBuf};

/// A data set being written. Without [`DataSetWriter::finish`] it has no manifest and is none.
#[derive(Debug)]
pub struct DataSetWriter {
    folder: PathBuf,
    tokenizer: Tokenizer,
    max_shard_tokens: u64,
    shard: Option<ShardWriter>,
    finished: Vec<ShardEntry>,
    tokens: Vec<u32>,
}

impl DataSetWriter {
    /// Starts a data set in a folder, which is made if it is not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(
        folder: &Path,
        tokenizer: Tokenizer,
        max_shard_tokens: u64,
    ) -> Result<DataSetWriter, DataError> {
        std::fs::create_dir_all(folder).map_err(DataError::io(folder, "created"))?;
        let (folder, finished, tokens) = (folder.to_path_buf(), Vec::new(), Vec::new());
        Ok(DataSetWriter { folder, tokenizer, max_shard_tokens, shard: None, finished, tokens })
    }

    /// Appends a document, the text of record `record` of source `source`, with end-of-text after
    /// it; an empty one is left out. A shard ends before the document that would take it past its
    /// most tokens: documents are never cut, and one longer than that has a shard of its own.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn push(&mut self, source: u64, record: u64, text: &[u8]) -> Result<(), DataError> {
        if text.is_empty() {
            return Ok(());
        }
        let mut tokens = std::mem::take(&mut self.tokens);
        tokens.clear();
        self.tokenizer.encode(text, &mut tokens);
        let pushed = self.push_ended(source, record, text.len() as u64, &mut tokens);
        self.tokens = tokens;
        pushed
    }

    /// Appends a document that is tokens already, without end-of-text; its bytes are the tokens' own.
    ///
    /// # Errors
    /// A token outside the vocabulary, and those of the file system.
    pub fn push_tokens(&mut self, source: u64, record: u64, tokens: &[u32]) -> Result<(), DataError> {
        let bytes = tokens.iter().map(|&token| self.tokenizer.byte_len(token) as u64).sum();
        self.push_ended(source, record, bytes, &mut tokens.to_vec())
    }

    /// Appends end-of-text to the tokens, and these to a shard with room for them.
    fn push_ended(
        &mut self,
        source: u64,
        record: u64,
        bytes: u64,
        tokens: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        tokens.push(self.tokenizer.end_of_text());
        let room = |shard: &ShardWriter| self.max_shard_tokens.saturating_sub(shard.tokens());
        if let Some(full) = self.shard.take_if(|shard| room(shard) < tokens.len() as u64) {
            self.finished.push(full.finish()?);
        }
        let shard = match &mut self.shard {
            Some(shard) => shard,
            none => {
                let name = format!("shard-{:05}.tokens", self.finished.len());
                none.insert(ShardWriter::create(&self.folder.join(name), &self.tokenizer)?)
            }
        };
        shard.push(source, record, bytes, tokens)
    }

    /// Completes the last shard, then writes the manifest; `sources` names the source files that
    /// documents refer to.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn finish(mut self, sources: Vec<String>) -> Result<Manifest, DataError> {
        if let Some(shard) = self.shard.take() {
            self.finished.push(shard.finish()?);
        }
        self.tokenizer.write_into(&self.folder)?;
        let manifest = Manifest::new(&self.tokenizer, self.finished, sources);
        manifest.write(&self.folder)?;
        Ok(manifest)
    }
}
