//! What the fuzz targets share: bytes as a file, and all that can be read of it. Owns the claim that is tried,
//! that any bytes are read, or refused by an error that names the file; refuses to know the formats.

use dataloader::{DataSet, Inputs, Samples, Tokenizer, tokenize};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// A folder of this process, in memory where there is such a place.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
    let folder = parent.join(format!("phalanx-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the file");
    folder
});

/// Puts bytes into a file of that name, and returns its path.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let file = FOLDER.join(name);
    fs::create_dir_all(file.parent().expect("it lies in a folder")).expect("a folder for the file");
    fs::write(&file, bytes).expect("the file is written");
    file
}

/// Reads all tokens and documents of a data set, and verifies it; no more of it than a file of a few
/// megabytes can hold.
///
/// # Panics
/// On an error that does not say where it was met.
pub fn read_data_set(path: &Path) {
    let read = || {
        let data = DataSet::open(path)?;
        let mut tokens = vec![0; data.tokens().min(1 << 20) as usize];
        data.read(0, &mut tokens)?;
        for n in 0..data.documents().min(200) {
            let document = data.document(n)?;
            if document.tokens.start < document.tokens.end {
                data.document_at(document.tokens.start)?;
            }
        }
        data.verify()?;
        let samples = Samples::open(data, 8, 1)?;
        samples.batch(0..2)?;
        samples.documents(0..4).try_for_each(|passage| passage.map(drop))
    };
    require_place(read().map_err(|error: dataloader::DataError| error.into()));
}

/// Reads all documents of a text, or table.
///
/// # Panics
/// On an error that does not say where it was met.
pub fn read_text(file: &Path) {
    let read = tokenize(&Inputs::new(&[file.into()]), &Tokenizer::Bytes, 1, |_| Ok(()));
    require_place(read.map_err(Into::into));
}

/// Requires an error to name the folder of the file.
///
/// # Panics
/// On one that does not.
pub fn require_place(read: Result<(), Box<dyn Error>>) {
    let Err(error) = read else { return };
    let mut told = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        told += &format!(": {error}");
        cause = error.source();
    }
    assert!(told.contains(&*FOLDER.to_string_lossy()), "an error without a place: {told}");
}
