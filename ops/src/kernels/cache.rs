//! Compiled kernels on disk, so that a machine compiles them once: a file for each source, compiler and
//! device. What is damaged is not there; what cannot be written is compiled again. Knows no compiler.

use std::path::PathBuf;

/// Bytes of the digest in front of the code.
const DIGEST: usize = 32;

/// A folder of compiled kernels; none where the user has no folder for what can be made again.
#[derive(Debug)]
pub(super) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The user's: `phalanx/kernels` where XDG says, else in `~/.cache`.
    pub(super) fn of_user(env: impl Fn(&str) -> Option<String>) -> Cache {
        let named = |name: &str| env(name).filter(|path| path.starts_with('/')).map(PathBuf::from);
        let base = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
        Cache { folder: base.map(|base| base.join("phalanx/kernels")) }
    }

    /// What was made of these parts, or what `make` makes of them, which is then kept.
    ///
    /// # Errors
    /// What `make` says.
    pub(super) fn get_or(
        &self,
        parts: &[&str],
        make: impl FnOnce() -> Result<Vec<u8>, String>,
    ) -> Result<Vec<u8>, String> {
        let mut hash = blake3::Hasher::new();
        for part in parts {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        let path = self.folder.as_ref().map(|folder| folder.join(hash.finalize().to_hex().as_str()));
        let kept = path.as_ref().and_then(|path| std::fs::read(path).ok()).and_then(whole);
        if let Some(code) = kept {
            return Ok(code);
        }
        let code = make()?;
        if let Some(path) = path
            && let Err(error) = keep(&path, &code)
        {
            tracing::debug!("a compiled kernel is not kept in {}: {error}", path.display());
        }
        Ok(code)
    }
}

/// The code of a file, if the file is what was written.
fn whole(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let digest: [u8; DIGEST] = file.get(..DIGEST)?.try_into().ok()?;
    let code = file.split_off(DIGEST);
    (blake3::hash(&code) == digest).then_some(code)
}

/// Under another name first: ranks of a machine may be at it at the same time.
fn keep(path: &std::path::Path, code: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(path))?;
    let making = path.with_extension(std::process::id().to_string());
    std::fs::write(&making, [blake3::hash(code).as_bytes(), code].concat())?;
    std::fs::rename(&making, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_compiled_is_not_compiled_again_unless_a_part_is_another_or_the_file_is_damaged() {
        let scratch = tempfile::tempdir().unwrap();
        let home = scratch.path().to_str().unwrap().to_owned();
        let cache = Cache::of_user(|name| (name == "HOME").then(|| home.clone()));
        let never = || -> Result<Vec<u8>, String> { panic!("compiled again") };
        let make = |code: &[u8]| Ok(code.to_vec());
        assert_eq!(cache.get_or(&["source", "sm_90"], || make(b"one")).unwrap(), b"one");
        assert_eq!(cache.get_or(&["source", "sm_90"], never).unwrap(), b"one");
        assert_eq!(cache.get_or(&["sources", "m_90"], || make(b"two")).unwrap(), b"two");

        let folder = scratch.path().join(".cache/phalanx/kernels");
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 2);
        for file in &files {
            let bytes = std::fs::read(file).unwrap();
            std::fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
        }
        assert_eq!(cache.get_or(&["source", "sm_90"], || make(b"anew")).unwrap(), b"anew");
        assert_eq!(cache.get_or(&["source", "sm_90"], never).unwrap(), b"anew");
    }

    #[test]
    fn without_a_folder_kernels_are_compiled_each_time_and_errors_are_passed_on() {
        for env in [None, Some("relative".to_owned()), Some("/proc/nowhere".to_owned())] {
            let cache = Cache::of_user(|_| env.clone());
            for code in [b"one", b"two"] {
                assert_eq!(cache.get_or(&["source"], || Ok(code.to_vec())).unwrap(), code);
            }
            assert_eq!(cache.get_or(&["source"], || Err("no".into())), Err("no".into()));
        }
    }
}
