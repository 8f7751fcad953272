//! What can be wrong with data, one variant per way to be wrong, told for people:
//! the file, what was got, what was expected, and a hint.

use std::io;
use std::path::{Path, PathBuf};

/// A data set that cannot be used, or a read that it cannot serve.
///
/// All of these repeat when tried again: the user must change something.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused.
    #[error("{}: cannot be {action}", file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// What was tried, as a participle: "read", "written".
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// An example of a task that cannot be used; without a field, the row as a whole.
    #[error(
        "{}:{line}: {}{what}\n\
         hint: the task says how the fields are named; mend the file or the names",
        file.display(), if field.is_empty() { String::new() } else { format!("field {field:?}: ") }
    )]
    Example {
        /// The file.
        file: PathBuf,
        /// Where the example begins, from 1.
        line: u64,
        /// The field.
        field: String,
        /// What is wrong.
        what: String,
    },
    /// A file that holds no examples by its name.
    #[error("{}: expected .jsonl, .csv or .tsv\nhint: JSON lines, or a table whose first row has the names", file.display())]
    ExamplesKind {
        /// The file.
        file: PathBuf,
    },
    /// A file of examples that has none.
    #[error("{}: there are no examples in it\nhint: it has one a line, a table beside its first row of names", file.display())]
    NoExamples {
        /// The file.
        file: PathBuf,
    },
    /// A data set whose tokens are not the model's.
    #[error(
        "{}: its tokens are {got}'s, the model reads {expected}'s\n\
         hint: give the text itself as JSON lines, or prepare it with the model's tokenizer", folder.display()
    )]
    ForeignTokens {
        /// The data set.
        folder: PathBuf,
        /// Its tokenizer.
        got: &'static str,
        /// The model's.
        expected: &'static str,
    },
    /// Too few examples to draw shots from.
    #[error(
        "{}: {got} examples to draw {shots} shots from\n\
         hint: take fewer shots; what is asked is never a shot of its own", file.display()
    )]
    FewShots {
        /// The file.
        file: PathBuf,
        /// Examples that may be drawn.
        got: u64,
        /// Wanted.
        shots: usize,
    },
    /// A model that cannot read two texts at once.
    #[error(
        "a context of {seq_len} tokens has no room for two texts and the three tokens around them\nhint: fine-tune a model with a longer one"
    )]
    ShortContext {
        /// The model's.
        seq_len: usize,
    },
    /// There is no manifest where a data set should be.
    #[error(
        "{}: no data set here (expected {})\n\
         hint: `phalanx data prepare FILES... --out DIR` makes DIR/train and DIR/val; give one of these",
        folder.display(), folder.join(crate::MANIFEST_NAME).display()
    )]
    NoDataSet {
        /// The folder that was asked for.
        folder: PathBuf,
    },
    /// A manifest that does not say what a manifest must say.
    #[error("{}: {what}\nhint: prepare the data set again", file.display())]
    ManifestInvalid {
        /// The manifest.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A manifest that names a shard outside its folder.
    #[error(
        "{}: shard name {name:?} is no plain file name\n\
         hint: a manifest names files of its own folder only; this one was not written by phalanx",
        file.display()
    )]
    ShardName {
        /// The manifest.
        file: PathBuf,
        /// The name.
        name: String,
    },
    /// The manifest names a shard that is not there.
    #[error(
        "{}: shard is missing, but the manifest names it\n\
         hint: copy the folder again, or prepare the data set again",
        file.display()
    )]
    MissingShard {
        /// The shard.
        file: PathBuf,
    },
    /// A shard other than the one that the manifest describes.
    #[error(
        "{}: {what} is {got}, expected {expected} by the manifest\n\
         hint: the shard belongs to another data set or preparation; copy the folder again as a whole",
        file.display()
    )]
    ShardDiffers {
        /// The shard.
        file: PathBuf,
        /// What differs.
        what: &'static str,
        /// The shard's value.
        got: String,
        /// The manifest's value.
        expected: String,
    },
    /// A file shorter than its header says, or than a header.
    #[error(
        "{}: truncated, got {got} bytes, expected {expected}\n\
         hint: the copy was interrupted or the disk filled up; copy it again, or prepare the data set again",
        file.display()
    )]
    Truncated {
        /// The shard.
        file: PathBuf,
        /// Bytes on disk.
        got: u64,
        /// Bytes that the header calls for.
        expected: u64,
    },
    /// A file longer than its header says.
    #[error(
        "{}: too long, got {got} bytes, expected {expected}\n\
         hint: something was appended; copy it again, or prepare the data set again",
        file.display()
    )]
    TooLong {
        /// The shard.
        file: PathBuf,
        /// Bytes on disk.
        got: u64,
        /// Bytes that the header calls for.
        expected: u64,
    },
    /// A file that is no shard at all.
    #[error(
        "{}: wrong magic, got {got:02x?}, expected {expected:02x?}\n\
         hint: this is no token shard of phalanx, or its line ends were converted by a transfer in text mode",
        file.display()
    )]
    WrongMagic {
        /// The file.
        file: PathBuf,
        /// Its first bytes.
        got: [u8; 8],
        /// A shard's first bytes.
        expected: [u8; 8],
    },
    /// A shard or manifest from another version of this program.
    #[error(
        "{}: format version {got}, expected {expected}\n\
         hint: prepare the data set again with this phalanx, or read it with the one that wrote it",
        file.display()
    )]
    UnknownVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        got: u32,
        /// The version that is read here.
        expected: u32,
    },
    /// A damaged header.
    #[error(
        "{}: header checksum {got:08x}, expected {expected:08x}\n\
         hint: the file is damaged; copy it again, or prepare the data set again",
        file.display()
    )]
    HeaderChecksum {
        /// The shard.
        file: PathBuf,
        /// Checksum of the header as it is.
        got: u32,
        /// Checksum that the header states.
        expected: u32,
    },
    /// A header whose counts, offsets and lengths do not agree with each other.
    #[error(
        "{}: {what} is {got}, expected {expected}\n\
         hint: the header contradicts itself; prepare the data set again",
        file.display()
    )]
    LengthMismatch {
        /// The shard.
        file: PathBuf,
        /// Which field.
        what: &'static str,
        /// Its value.
        got: u64,
        /// The value that the other fields call for.
        expected: u64,
    },
    /// Damaged tokens.
    #[error(
        "{}: block {block} at byte {offset} has checksum {got:08x}, expected {expected:08x}\n\
         hint: the file is damaged; copy it again, or prepare the data set again",
        file.display()
    )]
    BlockChecksum {
        /// The shard.
        file: PathBuf,
        /// Which block.
        block: u64,
        /// Byte of the file at which the block starts.
        offset: u64,
        /// Checksum of the block as it is.
        got: u32,
        /// Checksum that the index states.
        expected: u32,
    },
    /// A damaged index, seen when all of it is read.
    #[error(
        "{}: index checksum {got:08x}, expected {expected:08x}\n\
         hint: the file is damaged; copy it again, or prepare the data set again",
        file.display()
    )]
    IndexChecksum {
        /// The shard.
        file: PathBuf,
        /// Checksum of the index as it is.
        got: u32,
        /// Checksum that the header states.
        expected: u32,
    },
    /// An index that is no index, or that points where it must not.
    #[error(
        "{}: index invalid: {what}\n\
         hint: the file is damaged; `phalanx data verify` tells more; copy it again, or prepare it again",
        file.display()
    )]
    IndexInvalid {
        /// The shard.
        file: PathBuf,
        /// What is wrong, with got and expected.
        what: String,
    },
    /// Tokens that do not hash to the digest in the header.
    #[error(
        "{}: content digest {got}, expected {expected}\n\
         hint: tokens and block checksums were changed together; prepare the data set again",
        file.display()
    )]
    DigestMismatch {
        /// The shard.
        file: PathBuf,
        /// Digest of the tokens as they are, hexadecimal.
        got: String,
        /// Digest that the header states.
        expected: String,
    },
    /// A tokenizer that this program does not have.
    #[error(
        "{}: unknown tokenizer {id:?}, expected one of: {}\n\
         hint: prepare the data set again with one of these",
        file.display(), crate::Tokenizer::IDS.join(", ")
    )]
    UnknownTokenizer {
        /// The file that names it.
        file: PathBuf,
        /// Its name.
        id: String,
    },
    /// A Parquet file that cannot be read, or has no text.
    #[error(
        "{}: {what}\n\
         hint: expected a Parquet table with a column of text; --text-key names it",
        file.display()
    )]
    TableInvalid {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that is no classifier.
    #[error(
        "{}: is no classifier, or damaged\nhint: `phalanx data train-classifier` makes one",
        file.display()
    )]
    ClassifierInvalid {
        /// The file.
        file: PathBuf,
    },
    /// A tokenizer's file that cannot be used.
    #[error(
        "{}: {what}\n\
         hint: a tokenizer's file is a byte-pair table (.tiktoken, as `phalanx data train-tokenizer` writes it) \
         or a WordPiece vocabulary (.txt, one piece a line)",
        file.display()
    )]
    TokenizerInvalid {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Tokens made by another tokenizer than the data set's.
    #[error(
        "{}: made by tokenizer {got}, expected {expected}\n\
         hint: token ids mean different text there; prepare the data set again",
        file.display()
    )]
    TokenizerMismatch {
        /// The file.
        file: PathBuf,
        /// Id and digest there.
        got: String,
        /// Id and digest here.
        expected: String,
    },
    /// A token id that the tokenizer does not have.
    #[error(
        "{}: token {token} at position {position} is outside the vocabulary, expected less than {vocab_size}\n\
         hint: the tokens were made by another tokenizer; prepare the data set again",
        file.display()
    )]
    TokenOutsideVocabulary {
        /// The shard.
        file: PathBuf,
        /// Position in the shard, in tokens.
        position: u64,
        /// The token.
        token: u64,
        /// The tokenizer's size.
        vocab_size: usize,
    },
    /// A token of another program's file that GPT-2 does not have.
    #[error(
        "{}: token {token} at position {position} (byte {offset}) is outside the vocabulary, expected 0 to less \
         than {vocab_size}\n\
         hint: token files of other programs are taken for GPT-2's; these were made by another tokenizer, or this \
         is no token file",
        file.display()
    )]
    ForeignToken {
        /// The file.
        file: PathBuf,
        /// Position in tokens.
        position: u64,
        /// Position in bytes.
        offset: u64,
        /// The token.
        token: i64,
        /// The tokenizer's size.
        vocab_size: usize,
    },
    /// An index of Megatron's that is none, or that points where it must not.
    #[error(
        "{}: Megatron index: {what}\n\
         hint: the file is damaged or of another kind; copy it again, with its .bin",
        file.display()
    )]
    ForeignIndex {
        /// The index.
        file: PathBuf,
        /// What is wrong, with the byte.
        what: String,
    },
    /// A data set that another program's format cannot hold.
    #[error("{}: {what}\nhint: choose another format, or fewer documents", file.display())]
    NotConvertible {
        /// The file to be written.
        file: PathBuf,
        /// Why not.
        what: String,
    },
    /// A read past the end of the data set.
    #[error(
        "{}: tokens {start}..{end} were asked for, there are {tokens}\n\
         hint: the run and its data do not belong together",
        place.display()
    )]
    OutOfRange {
        /// The data set or shard.
        place: PathBuf,
        /// First token asked for.
        start: u64,
        /// One past the last token asked for.
        end: u64,
        /// Tokens there are.
        tokens: u64,
    },
    /// A document that is not there.
    #[error("{}: document {document} was asked for, there are {documents}\nhint: they are counted from 0", folder.display())]
    NoSuchDocument {
        /// The data set.
        folder: PathBuf,
        /// The number asked for.
        document: u64,
        /// Documents there are.
        documents: u64,
    },
    /// Fewer tokens than one sample takes.
    #[error(
        "{}: got {tokens} tokens, one sample takes {needed} (model.seq_len + 1)\n\
         hint: prepare more text, or lower model.seq_len",
        folder.display()
    )]
    TooFewTokens {
        /// The data set.
        folder: PathBuf,
        /// Tokens there are.
        tokens: u64,
        /// Tokens that are needed.
        needed: u64,
    },
}

impl DataError {
    /// Wraps an error of the operating system: `.map_err(DataError::io(path, "read"))`.
    pub(crate) fn io(file: &Path, action: &'static str) -> impl FnOnce(io::Error) -> DataError + use<> {
        let file = file.to_path_buf();
        move |source| DataError::Io { file, action, source }
    }
}

/// Text that cannot be made into a data set.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Reading or writing failed.
    #[error(transparent)]
    Data(#[from] DataError),
    /// No file was given.
    #[error("no input files\nhint: phalanx data prepare FILES... --out DIR")]
    NoFiles,
    /// A kind of file that is not read.
    #[error(
        "{}: {}, expected one of: {}\n\
         hint: .txt and .md are one document; .jsonl has one object with a \"text\" in each line, .parquet one \
         document in each row",
        file.display(), extension(file), crate::KNOWN_EXTENSIONS.join(", ")
    )]
    UnknownExtension {
        /// The file.
        file: PathBuf,
    },
    /// A line of a JSON Lines file that holds no document.
    #[error(
        "{}:{line}: {what}\n\
         hint: expected one object in the line, such as {{\"text\": \"Once upon a time\"}}",
        file.display()
    )]
    BadLine {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        what: String,
    },
    /// Too little to learn a classifier from.
    #[error(
        "{good} good documents and {raw} others to learn from, expected at least {needed} of each\n\
         hint: a few thousand of each make a useful classifier"
    )]
    TooFewToLearn {
        /// Good ones.
        good: usize,
        /// Others.
        raw: usize,
        /// Fewest of each.
        needed: usize,
    },
    /// A vocabulary without room for every byte.
    #[error("--vocab-size is {got}, expected at least 257: 256 bytes and end-of-text\nhint: GPT-2 has 50257")]
    VocabularyTooSmall {
        /// The size.
        got: usize,
    },
    /// A share that is no share.
    #[error(
        "--val-fraction is {got}, expected at least 0 and less than 1\nhint: 0.05 holds out one part in 20"
    )]
    ValFraction {
        /// The value.
        got: f64,
    },
    /// An output that has no name of its own.
    #[error("--out {}: has no folder name\nhint: name a new folder, such as data/books", out.display())]
    OutName {
        /// The folder.
        out: PathBuf,
    },
    /// The output is there already.
    #[error("{}: exists and is not empty\nhint: choose another --out, or replace it with --force", out.display())]
    OutExists {
        /// The folder.
        out: PathBuf,
    },
    /// The output holds what no preparation wrote, so that it is not replaced.
    #[error(
        "{}: is no part of a data set, so --force does not replace its folder\n\
         hint: choose another --out, or move it away",
        stranger.display()
    )]
    OutHoldsOtherThings {
        /// What is there.
        stranger: PathBuf,
    },
    /// Another preparation was killed.
    #[error(
        "{}: is left from a preparation of other files or with other options\n\
         hint: the same command goes on with it; else remove it, or replace it with --force",
        folder.display()
    )]
    Unfinished {
        /// The temporary folder.
        folder: PathBuf,
    },
    /// Another preparation runs.
    #[error(
        "{}: another preparation is writing there\n\
         hint: wait until it has ended, or choose another --out",
        folder.display()
    )]
    Running {
        /// The temporary folder.
        folder: PathBuf,
    },
    /// Files without any text.
    #[error("the {files} input files hold no text\nhint: every document in them is empty")]
    NoText {
        /// How many files.
        files: usize,
    },
    /// Too little text to hold any out.
    #[error(
        "nothing is left for {split} at --val-fraction {val_fraction}\n\
         hint: give more text, or --val-fraction 0 for no validation"
    )]
    EmptySplit {
        /// "train" or "val".
        split: &'static str,
        /// The share that was asked for.
        val_fraction: f64,
    },
}

fn extension(file: &Path) -> String {
    match file.extension() {
        Some(extension) => format!("unknown kind of file .{}", extension.to_string_lossy()),
        None => "has no extension".to_string(),
    }
}
