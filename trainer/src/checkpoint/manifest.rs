//! `manifest.json`: what a checkpoint holds, in files of which size and hash, and the state of the run
//! around the weights. Written last, it carries a digest of itself.
//!
//! The file is one JSON object whose last two lines are `  "digest": "<64 hex digits>"` and `}`. The
//! digest is the blake3 of every byte before these lines, so `head -n -2 manifest.json | b3sum` checks
//! it, and no byte of the file can change unseen.

use super::error::Damage;
use super::slice::{SliceSpec, check_cover};
use configs::{RunConfig, SegmentSpec};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ops::Range;

/// The name of the file.
pub const MANIFEST: &str = "manifest.json";

/// The version written, and the only one read.
pub const VERSION: u64 = 1;

const FORMAT: &str = "phalanx checkpoint";
const DIGEST_KEY: &str = "  \"digest\": \"";
const AFTER_DIGEST: &str = "\"\n}\n";
const HEX_DIGITS: usize = 2 * blake3::OUT_LEN;

/// The state of a run at a step, beside the values of its segments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer updates done.
    pub step: u64,
    /// Samples trained on: the next step starts at this position of the run's order, skips left out.
    pub samples: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The resolved configuration, as TOML text.
    pub config: String,
    /// Digest of the training data, in hex.
    pub train_digest: String,
    /// Digest of the validation data, in hex, where there is any.
    pub val_digest: Option<String>,
    /// The tokenizer's id.
    pub tokenizer: String,
    /// The model's layout.
    pub segments: Vec<SegmentSpec>,
    /// The batches that are left out of the run's order, before and after this step.
    #[serde(default)]
    pub skips: Vec<Skip>,
    /// The last losses, by which the next one is judged.
    #[serde(default)]
    pub recent_losses: Vec<f64>,
}

impl TrainState {
    /// Before the first update of a run that learns from no data yet.
    pub fn start(config: &RunConfig, tokenizer: &str, segments: Vec<SegmentSpec>) -> TrainState {
        TrainState {
            step: 0,
            samples: 0,
            tokens: 0,
            config: config.to_toml(),
            train_digest: String::new(),
            val_digest: None,
            tokenizer: tokenizer.to_string(),
            segments,
            skips: Vec::new(),
            recent_losses: Vec::new(),
        }
    }
}

/// A batch that is left out of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skip {
    /// The update that was not made of it, from 1.
    pub step: u64,
    /// Its first sample.
    pub first_sample: u64,
    /// One past its last sample.
    pub end_sample: u64,
}

impl Skip {
    /// The numbers of its samples.
    pub fn samples(&self) -> Range<u64> {
        self.first_sample..self.end_sample
    }
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the folder.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// blake3 of all its bytes, in lower-case hex.
    pub blake3: String,
    /// What it holds, in the order of the file.
    pub slices: Vec<SliceSpec>,
}

/// All that is known of a checkpoint without reading its state files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Marks the file as ours.
    format: String,
    /// Of the format.
    version: u64,
    /// When it was published, in seconds since 1970.
    pub created_unix_s: u64,
    /// The start of the run that wrote it, counted from 1.
    pub generation: u64,
    /// Ranks that wrote it. Any number may read it.
    pub world_size: usize,
    /// Step, samples, configuration, data and layout.
    pub state: TrainState,
    /// One per rank, in their order.
    pub files: Vec<FileEntry>,
}

/// The name of a rank's file.
pub fn rank_file(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

impl Manifest {
    pub(crate) fn new(state: TrainState, generation: u64, files: Vec<FileEntry>) -> Manifest {
        Manifest {
            format: FORMAT.to_string(),
            version: VERSION,
            created_unix_s: crate::run_folder::unix_seconds(),
            generation,
            world_size: files.len(),
            state,
            files,
        }
    }

    /// The bytes of the file, digest included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        signed(&serde_json::to_string_pretty(self).expect("strings, numbers and lists are JSON"))
    }

    /// Reads what `encode` wrote, trusting no byte of it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Manifest, Damage> {
        let unparsable = |what: String| Damage::ManifestUnparsable { what };
        if let Some((covered, expected)) = split_digest(bytes) {
            let got = blake3::hash(covered).to_hex();
            if got.as_str() != expected {
                return Err(Damage::ManifestDigest { expected, got: got.to_string() });
            }
        } else {
            // A later format may end otherwise: say so, rather than call it damaged.
            check_version(bytes)?;
            return Err(unparsable("it does not end in its digest; it may be cut short".into()));
        }
        check_version(bytes)?;
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|error| unparsable(error.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Whether it makes sense as a whole: names, numbers, and slices that make up the model.
    fn check(&self) -> Result<(), Damage> {
        let inconsistent = |what: String| Err(Damage::Inconsistent { what });
        if self.files.len() != self.world_size {
            return inconsistent(format!("{} files of {} ranks", self.files.len(), self.world_size));
        }
        for (rank, file) in self.files.iter().enumerate() {
            let expected = rank_file(rank);
            if file.name != expected {
                return Err(Damage::ForeignName { got: file.name.clone(), expected });
            }
        }
        if let Some(Skip { first_sample, end_sample, .. }) =
            self.state.skips.iter().find(|skip| skip.first_sample > skip.end_sample)
        {
            return inconsistent(format!("samples {first_sample}..{end_sample} are said to be skipped"));
        }
        let mut names = HashSet::new();
        if let Some(twice) = self.state.segments.iter().find(|segment| !names.insert(&segment.name)) {
            return inconsistent(format!("segment {} is listed twice", twice.name));
        }
        Ok(check_cover(&self.state.segments, self.files.iter().flat_map(|file| &file.slices))?)
    }
}

/// A pretty JSON object with its digest added as the last key.
fn signed(object: &str) -> Vec<u8> {
    let fields = object.strip_suffix("\n}").expect("a pretty object ends in a line of its own");
    let covered = format!("{fields},\n");
    let digest = blake3::hash(covered.as_bytes()).to_hex();
    format!("{covered}{DIGEST_KEY}{digest}{AFTER_DIGEST}").into_bytes()
}

/// The first difference between two layouts that keeps one from being read as the other. How a tensor
/// started and whether it decays do not.
pub(crate) fn layout_difference(saved: &[SegmentSpec], wanted: &[SegmentSpec]) -> Option<String> {
    for (saved, wanted) in saved.iter().zip(wanted) {
        if saved.name != wanted.name {
            return Some(format!("it has segment {} where {} is expected", saved.name, wanted.name));
        }
        for (old, new) in saved.tensors.iter().zip(&wanted.tensors) {
            if (&old.name, &old.shape, old.offset) != (&new.name, &new.shape, new.offset) {
                return Some(format!(
                    "it has {} {:?} at {} where {} {:?} at {} is expected",
                    old.name, old.shape, old.offset, new.name, new.shape, new.offset
                ));
            }
        }
        let sizes = |segment: &SegmentSpec| (segment.tensors.len(), segment.numel);
        if sizes(saved) != sizes(wanted) {
            let ((tensors, numel), (expected_tensors, expected_numel)) = (sizes(saved), sizes(wanted));
            return Some(format!(
                "segment {} has {tensors} tensors in {numel} elements, expected {expected_tensors} in \
                 {expected_numel}",
                saved.name
            ));
        }
    }
    (saved.len() != wanted.len())
        .then(|| format!("it has {} segments, expected {}", saved.len(), wanted.len()))
}

/// The bytes that the digest covers, and the digest; nothing when the end has another form.
fn split_digest(bytes: &[u8]) -> Option<(&[u8], String)> {
    let body = bytes.strip_suffix(AFTER_DIGEST.as_bytes())?;
    let (body, digest) = body.split_at_checked(body.len().checked_sub(HEX_DIGITS)?)?;
    let covered = body.strip_suffix(DIGEST_KEY.as_bytes())?;
    Some((covered, std::str::from_utf8(digest).ok()?.to_string()))
}

fn check_version(bytes: &[u8]) -> Result<(), Damage> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u64,
    }
    let head: Head = serde_json::from_slice(bytes)
        .map_err(|error| Damage::ManifestUnparsable { what: error.to_string() })?;
    if head.format != FORMAT {
        let what = format!("its format is {:?}, expected {FORMAT:?}", head.format);
        return Err(Damage::ManifestUnparsable { what });
    }
    if head.version != VERSION {
        return Err(Damage::UnsupportedVersion { got: head.version, supported: VERSION });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::slice::StateKind;

    fn manifest() -> Manifest {
        let segments = vec![SegmentSpec { name: "ln_f".into(), tensors: Vec::new(), numel: 64 }];
        let slices =
            StateKind::ALL.map(|kind| SliceSpec { segment: "ln_f".into(), kind, start: 0, len: 64 }).to_vec();
        let state = TrainState {
            step: 20,
            samples: 1280,
            tokens: u64::MAX,
            config: "[run]\nname = \"tiny\"\n".into(),
            train_digest: "00ff".into(),
            val_digest: None,
            tokenizer: "bytes".into(),
            segments,
            skips: vec![Skip { step: 3, first_sample: 64, end_sample: 128 }],
            recent_losses: vec![0.1 + 0.2],
        };
        let file = FileEntry { name: rank_file(0), size_bytes: 1, blake3: String::new(), slices };
        Manifest::new(state, 3, vec![file])
    }

    /// The manifest after an edit of its JSON, with a digest that is right again.
    fn forged(edit: impl FnOnce(&mut Manifest)) -> Result<Manifest, Damage> {
        let mut forged = manifest();
        edit(&mut forged);
        Manifest::decode(&forged.encode())
    }

    #[test]
    fn a_manifest_reads_back_and_is_plain_json() {
        let bytes = manifest().encode();
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest());
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["state"]["step"], 20);
        assert_eq!(json["digest"].as_str().unwrap().len(), 64);
    }

    #[test]
    fn a_manifest_from_before_there_were_skips_has_none() {
        let mut json = serde_json::to_value(manifest()).unwrap();
        let state = json["state"].as_object_mut().unwrap();
        assert!(state.remove("skips").is_some() && state.remove("recent_losses").is_some());
        let read = Manifest::decode(&signed(&serde_json::to_string_pretty(&json).unwrap())).unwrap();
        assert_eq!((read.state.skips, read.state.recent_losses), (Vec::new(), Vec::new()));
    }

    #[test]
    fn the_digest_is_of_all_lines_but_the_last_two() {
        let bytes = String::from_utf8(manifest().encode()).unwrap();
        let lines: Vec<&str> = bytes.lines().collect();
        let head: String = lines[..lines.len() - 2].iter().map(|line| format!("{line}\n")).collect();
        assert!(lines[lines.len() - 2].contains(blake3::hash(head.as_bytes()).to_hex().as_str()));
    }

    #[test]
    fn every_bit_of_a_manifest_counts() {
        let bytes = manifest().encode();
        for place in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[place] ^= 1 << bit;
                assert!(Manifest::decode(&flipped).is_err(), "bit {bit} of byte {place}");
            }
        }
    }

    #[test]
    fn every_cut_of_a_manifest_is_unparsable() {
        let bytes = manifest().encode();
        for length in 0..bytes.len() {
            let damage = Manifest::decode(&bytes[..length]).unwrap_err();
            assert!(matches!(damage, Damage::ManifestUnparsable { .. }), "{length}: {damage}");
        }
    }

    #[test]
    fn a_changed_byte_is_told_from_a_later_version() {
        let text = String::from_utf8(manifest().encode()).unwrap();
        let changed = text.replace("\"step\": 20", "\"step\": 21");
        assert!(matches!(Manifest::decode(changed.as_bytes()), Err(Damage::ManifestDigest { .. })));
        let later = forged(|manifest| manifest.version = 2).unwrap_err();
        assert!(matches!(later, Damage::UnsupportedVersion { got: 2, supported: 1 }));
        let unsigned = br#"{"format": "phalanx checkpoint", "version": 7, "seal": []}"#;
        assert!(matches!(Manifest::decode(unsigned), Err(Damage::UnsupportedVersion { got: 7, .. })));
    }

    #[test]
    fn names_cannot_lead_out_of_the_folder() {
        for name in ["../rank-00000.safetensors", "/etc/passwd", "rank-00001.safetensors", ""] {
            let damage = forged(|manifest| manifest.files[0].name = name.into()).unwrap_err();
            assert!(matches!(damage, Damage::ForeignName { .. }), "{name}: {damage}");
        }
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        let backwards = Skip { step: 3, first_sample: 9, end_sample: 8 };
        let damage = forged(|manifest| manifest.state.skips.push(backwards)).unwrap_err();
        assert!(matches!(damage, Damage::Inconsistent { .. }), "{damage}");
        let damage = forged(|manifest| manifest.world_size = usize::MAX).unwrap_err();
        assert!(matches!(damage, Damage::Inconsistent { .. }), "{damage}");
        let damage = forged(|manifest| {
            let twice = manifest.state.segments[0].clone();
            manifest.state.segments.push(twice);
        });
        assert!(matches!(damage, Err(Damage::Inconsistent { .. })));
        let damage = forged(|manifest| drop(manifest.files[0].slices.pop())).unwrap_err();
        assert!(matches!(damage, Damage::Slices(_)), "{damage}");
    }

    #[test]
    fn layouts_differ_by_names_shapes_and_offsets_only() {
        let model = |n_embd| configs::ModelConfig {
            n_layer: 1,
            n_head: 1,
            n_embd,
            seq_len: 8,
            vocab_size: 256,
            ..configs::ModelConfig::default()
        };
        let layout = configs::segments(&model(32));
        assert_eq!(layout_difference(&layout, &layout), None);
        let wider = layout_difference(&layout, &configs::segments(&model(64))).unwrap();
        assert!(wider.contains("wte.weight [256, 32]") && wider.contains("[256, 64]"), "{wider}");
        let mut other = layout.clone();
        other[0].tensors[0].init = configs::Init::Zeros;
        other[0].tensors[0].decay = false;
        assert_eq!(layout_difference(&layout, &other), None);
        other.pop();
        assert_eq!(layout_difference(&layout, &other).unwrap(), "it has 4 segments, expected 3");
    }
}
