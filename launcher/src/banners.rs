//! What mpirun itself says, between its lines of dashes: drops what only repeats that a rank ended,
//! and keeps from it who ended and how. Everything else of mpirun's passes. Where mpirun does not get to it, as
//! when it is ended itself, a rank's own last words say who it was.
//! Texts are those of Open MPI 4.1.

/// Reads mpirun's untagged error lines.
#[derive(Debug, Default)]
pub struct Banners {
    /// Lines of the block that is being read, its opening dashes first.
    block: Option<Vec<String>>,
    cause: Option<Cause>,
    /// What the first rank to end the job said of itself.
    last_words: Option<Cause>,
}

/// Who ended, and how.
#[derive(Debug)]
struct Cause {
    what: String,
    rank: Option<usize>,
    host: Option<String>,
}

impl Banners {
    /// Takes one line and returns those that the user should see now.
    pub fn take(&mut self, line: String) -> Vec<String> {
        let dashes = line.len() >= 40 && line.bytes().all(|byte| byte == b'-');
        match (&mut self.block, dashes) {
            (None, true) => {
                self.block = Some(vec![line]);
                Vec::new()
            }
            (None, false) if is_chatter(&line) => Vec::new(),
            (None, false) => vec![line],
            (Some(block), false) => {
                block.push(line);
                Vec::new()
            }
            (Some(_), true) => {
                let mut block = self.block.take().unwrap_or_default();
                block.push(line);
                self.close(block)
            }
        }
    }

    /// Takes a rank's last words; returns whether the line is that.
    pub fn take_last_words(&mut self, line: &str) -> bool {
        let Some((rank, code)) = configs::read_last_words(line) else { return false };
        let what = format!("rank {rank} ended the job with code {code}");
        self.last_words.get_or_insert(Cause { what, rank: Some(rank), host: None });
        true
    }

    /// What is left of a block that was never closed.
    pub fn finish(&mut self) -> Vec<String> {
        self.block.take().unwrap_or_default()
    }

    /// Which rank ended the job and how, if mpirun or the rank said so.
    pub fn cause(&self) -> Option<&str> {
        self.first_cause().map(|cause| cause.what.as_str())
    }

    /// The rank that ended the job, if mpirun named one, or it did itself.
    pub fn rank(&self) -> Option<usize> {
        self.first_cause()?.rank
    }

    /// The machine that was lost, if mpirun named one.
    pub fn host(&self) -> Option<&str> {
        self.cause.as_ref()?.host.as_deref()
    }

    fn first_cause(&self) -> Option<&Cause> {
        self.cause.as_ref().or(self.last_words.as_ref())
    }

    fn close(&mut self, block: Vec<String>) -> Vec<String> {
        let text = block[1..block.len() - 1].join(" ");
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.starts_with("Primary job terminated normally") {
            return Vec::new();
        }
        match cause(&text) {
            // The first rank to end is the one that matters; the others were ended by mpirun.
            Some(cause) => {
                self.cause.get_or_insert(cause);
                Vec::new()
            }
            None => block,
        }
    }
}

/// Lines outside of blocks that tell nothing about the run.
fn is_chatter(line: &str) -> bool {
    line.starts_with("mpirun: Forwarding signal")
        || line.contains("sent help message help-")
        || line.contains("\"orte_base_help_aggregate\"")
}

/// The rank that ended and how, from the text of a block.
fn cause(text: &str) -> Option<Cause> {
    let of_rank = |rank: &str, what: String| Cause { what, rank: rank.parse().ok(), host: None };
    if text.starts_with("mpirun detected that one or more processes exited with non-zero status") {
        // "[[19086,1],0]": the job, then the rank.
        let process = text.split_once("Process name: [[")?.1;
        let rank = between(process, "],", "]")?;
        let code = text.split_once("Exit code:")?.1.split_whitespace().next()?;
        return Some(of_rank(rank, format!("rank {rank} exited with code {code}")));
    }
    if text.starts_with("mpirun noticed that process rank") {
        let rank = between(text, "process rank ", " ")?;
        let node = between(text, "on node ", " ")?;
        let signal = text.split_once("exited on ")?.1.trim_end_matches('.');
        return Some(of_rank(rank, format!("rank {rank} on {node} was ended by {signal}")));
    }
    if text.starts_with("ORTE has lost communication with a remote daemon") {
        let host = between(text.split_once("Remote daemon")?.1, "on node ", " ")?.to_string();
        let what = format!("host {host} was lost: mpirun's connection to its daemon there has broken");
        return Some(Cause { what, rank: None, host: Some(host) });
    }
    if text.starts_with("MPI_ABORT was invoked on rank") {
        let rank = between(text, "on rank ", " ")?;
        let code = between(text, "with errorcode ", ".")?;
        return Some(of_rank(rank, format!("rank {rank} ended the job with code {code}")));
    }
    None
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    text.split_once(before)?.1.split(after).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DASHES: &str = "--------------------------------------------------------------------------";

    fn read(text: &str) -> (Vec<String>, Option<String>) {
        let mut banners = Banners::default();
        let mut shown: Vec<String> =
            text.lines().flat_map(|line| banners.take(line.replace("----", DASHES))).collect();
        shown.extend(banners.finish());
        (shown, banners.cause.map(|cause| cause.what))
    }

    #[test]
    fn the_exit_of_a_rank_leaves_only_who_and_how() {
        let (shown, cause) = read(
            "----\nPrimary job  terminated normally, but 1 process returned\n\
             a non-zero exit code. Per user-direction, the job has been aborted.\n----\n----\n\
             mpirun detected that one or more processes exited with non-zero status, thus causing\n\
             the job to be terminated. The first process to do so was:\n\n  \
             Process name: [[19086,1],3]\n  Exit code:    7\n----\n",
        );
        assert_eq!(shown, Vec::<String>::new());
        assert_eq!(cause.unwrap(), "rank 3 exited with code 7");
    }

    #[test]
    fn a_killed_rank_is_named_with_its_node() {
        let (shown, cause) = read(
            "----\nmpirun noticed that process rank 1 with PID 0 on node b exited on signal 9 (Killed).\n----\n",
        );
        assert_eq!(shown, Vec::<String>::new());
        assert_eq!(cause.unwrap(), "rank 1 on b was ended by signal 9 (Killed)");
    }

    #[test]
    fn a_lost_machine_is_named() {
        let mut banners = Banners::default();
        let text = "----\nORTE has lost communication with a remote daemon.\n\n  \
                    HNP daemon   : [[2473,0],0] on node a\n  Remote daemon: [[2473,0],1] on node b\n\n\
                    This is usually due to either a failure of the TCP network\n----\n";
        let shown: Vec<String> =
            text.lines().flat_map(|line| banners.take(line.replace("----", DASHES))).collect();
        assert_eq!(shown, Vec::<String>::new());
        assert_eq!((banners.host(), banners.rank()), (Some("b"), None));
        assert!(banners.cause().unwrap().starts_with("host b was lost: "), "{:?}", banners.cause());
    }

    #[test]
    fn the_first_cause_is_kept() {
        let (_, cause) = read(
            "----\nMPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 2.\n\n\
             NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n----\n----\n\
             mpirun noticed that process rank 0 with PID 1 on node a exited on signal 15 (Terminated).\n----\n",
        );
        assert_eq!(cause.unwrap(), "rank 1 ended the job with code 2");
    }

    #[test]
    fn a_rank_is_known_by_its_last_words_where_mpirun_says_nothing() {
        let mut banners = Banners::default();
        assert!(!banners.take_last_words("[rank 2] thread 'main': panicked"));
        assert!(banners.take_last_words("[rank 2] ends the job with code 1"));
        assert!(banners.take_last_words("[rank 0] ends the job with code 2"));
        assert_eq!((banners.rank(), banners.cause()), (Some(2), Some("rank 2 ended the job with code 1")));
        let killed = "----\nmpirun noticed that process rank 3 with PID 1 on node a exited on signal 9 (Killed).\n----";
        killed.lines().for_each(|line| assert!(banners.take(line.replace("----", DASHES)).is_empty()));
        assert_eq!(banners.rank(), Some(3));
    }

    #[test]
    fn what_mpirun_says_about_anything_else_passes_whole() {
        let text = "ssh: Could not resolve hostname nohost\n----\nORTE was unable to reliably start one or more daemons.\n----\n";
        let (shown, cause) = read(text);
        assert_eq!(shown.len(), 4, "{shown:?}");
        assert_eq!(cause, None);
        let (shown, _) = read("----\nhalf a block");
        assert_eq!(shown.len(), 2);
    }

    #[test]
    fn chatter_is_dropped() {
        let (shown, _) = read(
            "mpirun: Forwarding signal 10 to job\n\
             [vm:1] 1 more process has sent help message help-mpi-api.txt / mpi-abort\n\
             [vm:1] Set MCA parameter \"orte_base_help_aggregate\" to 0 to see all help / error messages\n",
        );
        assert_eq!(shown, Vec::<String>::new());
    }
}
