//! The exit codes of both binaries, and the line in which a rank that ends its job says so.

/// How a run ended, as its process reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The run reached its end.
    Done,
    /// It failed; trying again may help.
    Failed,
    /// The user must change something, or a retry would repeat the failure.
    UserError,
    /// It was asked to stop, wrote a checkpoint and did.
    Stopped,
}

impl Exit {
    /// The process exit code.
    pub fn code(self) -> i32 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::UserError => 2,
            Exit::Stopped => 3,
        }
    }

    /// What a code returned by a rank or by mpirun means. Codes that are not ours (137 for a
    /// killed rank, 205 and 213 from mpirun) are failures that a retry may mend.
    pub fn from_code(code: i32) -> Exit {
        match code {
            0 => Exit::Done,
            2 => Exit::UserError,
            3 => Exit::Stopped,
            _ => Exit::Failed,
        }
    }
}

/// What a rank that ends the whole job says last, on a line of its own: mpirun does not always get to telling
/// who it was.
pub fn last_words(rank: usize, code: i32) -> String {
    format!("[rank {rank}] ends the job with code {code}")
}

/// The rank and the code of a line of [`last_words`].
pub fn read_last_words(line: &str) -> Option<(usize, i32)> {
    let (rank, code) = line.strip_prefix("[rank ")?.split_once("] ends the job with code ")?;
    Some((rank.parse().ok()?, code.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_read_as_they_are_written_and_nothing_else_is() {
        assert_eq!(read_last_words(&last_words(13, 2)), Some((13, 2)));
        for line in [
            "",
            "[rank 1] ends",
            "[rank x] ends the job with code 1",
            "[rank 1] [rank 1] ends the job with code 1",
        ] {
            assert_eq!(read_last_words(line), None, "{line}");
        }
    }
}
