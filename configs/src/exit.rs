//! The exit codes of both binaries, and nothing else.

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
