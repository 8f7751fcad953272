//! A rank's state file: slices as 1-D fp32 tensors in the safetensors format, written and read as a
//! stream. Knows one open file; which one, and what belongs in it, is for others.

use super::slice::{Slice, SliceSpec};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// Bytes converted at a time: enough to make calls cheap, little beside a model.
const BLOCK_BYTES: usize = 1 << 20;

/// The safetensors library refuses longer headers.
const MAX_HEADER_BYTES: u64 = 100_000_000;

const VALUE_BYTES: usize = size_of::<f32>();

/// Writes slices as one safetensors file. Returns its length in bytes and its blake3 in hex, computed
/// on the way: no second copy of the values is made, and no second pass over the file.
pub(crate) fn write(slices: &[Slice], file: &mut impl Write) -> io::Result<(u64, String)> {
    let mut out = Hashing { file, hash: blake3::Hasher::new(), size_bytes: 0 };
    let header = encode_header(slices)?;
    out.put(&(header.len() as u64).to_le_bytes())?;
    out.put(&header)?;
    let mut block = vec![0; BLOCK_BYTES];
    for slice in slices {
        for values in slice.values.chunks(BLOCK_BYTES / VALUE_BYTES) {
            let bytes = &mut block[..size_of_val(values)];
            for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = value.to_le_bytes();
            }
            out.put(bytes)?;
        }
    }
    Ok((out.size_bytes, out.hash.finalize().to_hex().to_string()))
}

/// Reads the header of a file of `size_bytes` and returns where the values of each of `slices` start.
/// The file must hold these slices and nothing else.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn read_header(
    file: &mut File,
    size_bytes: u64,
    slices: &[SliceSpec],
) -> Result<Vec<u64>, String> {
    let io = |error: io::Error| error.to_string();
    let mut length = [0; 8];
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size_bytes.saturating_sub(8) {
        return Err(format!("its header claims {length} of the file's {size_bytes} bytes"));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| error.to_string())?;

    let values_at = 8 + length;
    if values_at.checked_add(header.data_len() as u64) != Some(size_bytes) {
        let claimed = header.data_len();
        return Err(format!("its header claims {claimed} bytes of values in a file of {size_bytes}"));
    }
    let tensors = header.tensors();
    if tensors.len() != slices.len() {
        return Err(format!("it has {} tensors, expected {}", tensors.len(), slices.len()));
    }
    let place = |slice: &SliceSpec| {
        let name = slice.tensor_name();
        let tensor = tensors.get(&name).ok_or_else(|| format!("it has no tensor {name}"))?;
        if tensor.dtype != Dtype::F32 || tensor.shape != [slice.len] {
            let (dtype, shape, len) = (tensor.dtype, &tensor.shape, slice.len);
            return Err(format!("tensor {name} is {dtype} {shape:?}, expected F32 [{len}]"));
        }
        Ok(values_at + tensor.data_offsets.0 as u64)
    };
    slices.iter().map(place).collect()
}

/// Reads values that start at byte `at`.
pub(crate) fn read_values(file: &mut File, at: u64, into: &mut [f32]) -> io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    let mut block = vec![0; BLOCK_BYTES.min(size_of_val(into))];
    for values in into.chunks_mut(BLOCK_BYTES / VALUE_BYTES) {
        let bytes = &mut block[..size_of_val(values)];
        file.read_exact(bytes)?;
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
    Ok(())
}

/// blake3 of what is left of a file, in hex.
pub(crate) fn hash(file: &mut File) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(bytes) => hasher.update(&block[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
    }
}

/// Names, shapes and places, padded to a multiple of 8 bytes as the format asks.
fn encode_header(slices: &[Slice]) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let tensors = slices.iter().map(|slice| {
        let start = end;
        end += size_of_val(slice.values.as_slice());
        let info =
            TensorInfo { dtype: Dtype::F32, shape: vec![slice.values.len()], data_offsets: (start, end) };
        (slice.spec().tensor_name(), info)
    });
    let metadata = Metadata::new(None, tensors.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// Passes bytes on, hashing and counting them.
struct Hashing<'a, W> {
    file: &'a mut W,
    hash: blake3::Hasher,
    size_bytes: u64,
}

impl<W: Write> Hashing<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.size_bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::slice::StateKind;
    use safetensors::SafeTensors;

    fn slices() -> Vec<Slice> {
        // More than a block, with every kind of float.
        let odd = [f32::NAN, -0.0, f32::INFINITY, f32::MIN_POSITIVE / 2.0];
        let values: Vec<f32> = (0..300_000).map(|i| i as f32 * 0.1).chain(odd).collect();
        let slice = |kind, start, values| Slice { segment: "h.0".into(), kind, start, values };
        vec![slice(StateKind::Param, 4096, values), slice(StateKind::ExpAvg, 0, vec![1.0, 2.0])]
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn any_safetensors_reader_reads_a_state_file() {
        let mut bytes = Vec::new();
        let (size_bytes, hash) = write(&slices(), &mut bytes).unwrap();
        assert_eq!(size_bytes, bytes.len() as u64);
        assert_eq!(hash, blake3::hash(&bytes).to_hex().as_str());
        let read = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = read.tensor("h.0:exp_avg:0").unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, [2].as_slice()));
        assert_eq!(tensor.data(), [1.0_f32.to_le_bytes(), 2.0_f32.to_le_bytes()].concat());
    }

    #[test]
    fn values_come_back_bit_for_bit() {
        let mut file = tempfile::tempfile().unwrap();
        let (size_bytes, expected) = write(&slices(), &mut file).unwrap();
        let specs: Vec<SliceSpec> = slices().iter().map(Slice::spec).collect();
        let places = read_header(&mut file, size_bytes, &specs).unwrap();
        for (slice, place) in slices().iter().zip(places) {
            let mut values = vec![0.0; slice.values.len()];
            read_values(&mut file, place, &mut values).unwrap();
            assert_eq!(bits(&values), bits(&slice.values));
        }
        file.seek(SeekFrom::Start(0)).unwrap();
        assert_eq!(hash(&mut file).unwrap(), expected);
    }

    #[test]
    fn a_rank_that_owns_nothing_writes_a_valid_file() {
        let mut bytes = Vec::new();
        write(&[], &mut bytes).unwrap();
        assert!(SafeTensors::deserialize(&bytes).unwrap().is_empty());
    }

    #[test]
    fn a_header_that_lies_is_refused_before_memory_is_taken() {
        let read = |bytes: &[u8], specs: &[SliceSpec]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            read_header(&mut file, bytes.len() as u64, specs).unwrap_err()
        };
        assert!(read(&[], &[]).contains("fill whole buffer"));
        assert!(read(&[0xff; 64], &[]).contains("header claims"));
        let mut bytes = Vec::new();
        write(&slices()[1..], &mut bytes).unwrap();
        let spec = slices()[1].spec();
        assert!(read(&bytes[..bytes.len() - 1], std::slice::from_ref(&spec)).contains("bytes of values"));
        assert!(read(&bytes, &[]).contains("1 tensors, expected 0"));
        assert!(read(&bytes, &[SliceSpec { start: 5, ..spec.clone() }]).contains("no tensor h.0:exp_avg:5"));
        assert!(read(&bytes, &[SliceSpec { len: 3, ..spec }]).contains("expected F32 [3]"));
    }

    #[test]
    fn a_full_disk_is_an_error_and_not_a_short_file() {
        let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = write(&slices(), &mut full).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
