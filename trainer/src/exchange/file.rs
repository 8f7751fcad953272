//! Tensors by name in safetensors files, written as a stream and read one at a time, whatever their precision. Knows
//! the format, and no names.

use super::ExchangeError;
use crate::run_folder::{FileError, write_atomically_with};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// The safetensors library refuses longer headers.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Writes tensors in fp32 or bf16, each when its turn comes.
///
/// # Errors
/// What the file system refuses.
pub(super) fn write(
    path: &Path,
    about: HashMap<String, String>,
    shapes: &[(String, Vec<i64>)],
    kind: Kind,
    mut tensor: impl FnMut(usize) -> Tensor,
) -> Result<(), FileError> {
    let mut end = 0;
    let dtype = if kind == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
    let infos = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        let shape = shape.iter().map(|&n| n as usize).collect();
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let infos = infos.collect();
    write_atomically_with(path, |file| {
        let metadata = Metadata::new(Some(about), infos).map_err(io::Error::other)?;
        let mut header = serde_json::to_vec(&metadata)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        (0..shapes.len()).try_for_each(|i| file.write_all(&bytes_of(&tensor(i), kind)))
    })
}

/// A tensor's values in this kind, as they lie in memory: little-endian wherever libtorch runs.
pub(super) fn bytes_of(tensor: &Tensor, kind: Kind) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
    tensor.to_kind(kind).contiguous().copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// The tensors of one file or several.
#[derive(Debug)]
pub(super) struct Tensors {
    files: Vec<(PathBuf, Metadata, u64)>,
}

impl Tensors {
    /// Those of a file.
    ///
    /// # Errors
    /// A file that is none.
    pub(super) fn open(path: &Path) -> Result<Tensors, ExchangeError> {
        Ok(Tensors { files: vec![read_header(path)?] })
    }

    /// Those of a folder as `transformers` writes it: one file, or several with an index.
    ///
    /// # Errors
    /// There are none, or a file is none.
    pub(super) fn in_folder(folder: &Path) -> Result<Tensors, ExchangeError> {
        let (one, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        if one.is_file() || !index.is_file() {
            if folder.join("pytorch_model.bin").is_file() && !one.is_file() {
                let what = "it has a pytorch_model.bin, a pickle, which is not read; \
                            save_pretrained(folder, safe_serialization=True) writes model.safetensors";
                return Err(ExchangeError::NotOurs { path: folder.into(), what: what.into() });
            }
            return Tensors::open(&one);
        }
        let text = std::fs::read(&index).map_err(FileError::of("read", &index))?;
        let malformed = |what: String| ExchangeError::Malformed { path: index.clone(), what };
        let json: Value = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        let map = json["weight_map"].as_object().ok_or_else(|| malformed("it has no weight_map".into()))?;
        let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
        names.sort_unstable();
        names.dedup();
        // A name that led out of the folder would read what nobody named.
        if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
            return Err(malformed(format!("{name:?} is no file of this folder")));
        }
        let files = names.into_iter().map(|name| read_header(&folder.join(name)));
        Ok(Tensors { files: files.collect::<Result<_, _>>()? })
    }

    /// What the first file says about itself.
    pub(super) fn about(&self) -> HashMap<String, String> {
        self.files.first().and_then(|(_, header, _)| header.metadata().clone()).unwrap_or_default()
    }

    /// The names of all tensors.
    pub(super) fn names(&self) -> Vec<String> {
        self.files.iter().flat_map(|(_, header, _)| header.tensors().into_keys()).collect()
    }

    /// The tensor of that name in fp32; none where there is none.
    ///
    /// # Errors
    /// Another shape or precision, and a file that cannot be read.
    pub(super) fn get(&self, name: &str, shape: &[i64]) -> Result<Option<Tensor>, ExchangeError> {
        for (path, header, values_at) in &self.files {
            let tensors = header.tensors();
            let Some(info) = tensors.get(name) else { continue };
            let malformed = |what: String| ExchangeError::Malformed { path: path.clone(), what };
            let got: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
            if got != shape {
                return Err(malformed(format!("{name} is {got:?}, expected {shape:?}")));
            }
            let kind = match info.dtype {
                Dtype::F32 => Kind::Float,
                Dtype::F16 => Kind::Half,
                Dtype::BF16 => Kind::BFloat16,
                other => return Err(malformed(format!("{name} is {other}, expected F32, F16 or BF16"))),
            };
            let (start, end) = info.data_offsets;
            let mut bytes = vec![0; end - start];
            File::open(path)
                .and_then(|mut file| {
                    file.seek(SeekFrom::Start(values_at + start as u64))?;
                    file.read_exact(&mut bytes)
                })
                .map_err(FileError::of("read", path))?;
            return Ok(Some(Tensor::from_data_size(&bytes, shape, kind).to_kind(Kind::Float)));
        }
        Ok(None)
    }
}

/// The header of a file, and where its values begin.
fn read_header(path: &Path) -> Result<(PathBuf, Metadata, u64), ExchangeError> {
    let malformed = |what: String| ExchangeError::Malformed { path: path.into(), what };
    let mut file = File::open(path).map_err(FileError::of("open", path))?;
    let size = file.metadata().map_err(FileError::of("look at", path))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| malformed(error.to_string()))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size.saturating_sub(8) {
        return Err(malformed(format!("its header claims {length} of the file's {size} bytes")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|error| malformed(error.to_string()))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
    let values_at = 8 + length;
    let claimed = header.data_len() as u64;
    if values_at.checked_add(claimed) != Some(size) {
        return Err(malformed(format!("its header claims {claimed} bytes of values in a file of {size}")));
    }
    Ok((path.into(), header, values_at))
}
