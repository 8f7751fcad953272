//! What the user sees: lines of ranks with one prefix, and on a terminal the newest step in place.
//! Knows how lines look, not where they come from.

use std::io::Write;

/// Tells the width of the terminal in columns, if there is one.
pub type Width = Box<dyn Fn() -> Option<usize>>;

/// Standard output and error of the launcher, which the ranks share.
///
/// A write that fails is let go: the run matters more than who watches it.
pub struct Console<O: Write, E: Write> {
    out: O,
    err: E,
    /// On a terminal, steps are shown in place.
    width: Option<Width>,
    /// Whether the cursor stands behind a step that the next one may replace.
    live: bool,
}

impl<O: Write, E: Write> Console<O, E> {
    /// Writes to `out` and `err`. With `width`, `err` is a terminal and steps update in place.
    pub fn new(out: O, err: E, width: Option<Width>) -> Self {
        Console { out, err, width, live: false }
    }

    /// A line for standard output.
    pub fn out(&mut self, line: &str) {
        self.end_live_line();
        let _ = writeln!(self.out, "{line}").and_then(|()| self.out.flush());
    }

    /// A line for standard error; a reported step replaces the one before on a terminal.
    pub fn err(&mut self, line: &str) {
        match &self.width {
            Some(width) if is_step(line) => {
                let columns = width().unwrap_or(usize::MAX);
                let cut: String = line.chars().take(columns).collect();
                let _ = write!(self.err, "\r{cut}\x1b[K");
                self.live = true;
            }
            _ => {
                self.end_live_line();
                let _ = writeln!(self.err, "{line}");
            }
        }
        let _ = self.err.flush();
    }

    /// Leaves the newest step where it is and starts a new line.
    pub fn end_live_line(&mut self) {
        if std::mem::take(&mut self.live) {
            let _ = writeln!(self.err).and_then(|()| self.err.flush());
        }
    }
}

/// A line of mpirun's `--tag-output` as the user sees it: `[1,3]<stderr>:text` becomes
/// `[rank 3] text`. None for a line that no rank wrote.
pub fn rank_line(line: &str) -> Option<String> {
    let (rank, text) = tagged(line)?;
    let prefix = format!("[rank {rank}]");
    Some(if text.starts_with(&prefix) { text.to_string() } else { format!("{prefix} {text}") })
}

fn tagged(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix('[')?.split_once("]<")?;
    let (stream, text) = rest.split_once(">:")?;
    let (job, rank) = name.split_once(',')?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (number(job) && number(rank) && stream.starts_with("std")).then_some((rank, text))
}

fn is_step(line: &str) -> bool {
    line.strip_prefix("[rank 0] ").is_some_and(|text| text.starts_with("step "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a console shows for these lines of standard error.
    fn shown(width: Option<usize>, lines: &[&str]) -> String {
        let mut err = Vec::new();
        let width = width.map(|columns| Box::new(move || Some(columns)) as Width);
        let mut console = Console::new(Vec::new(), &mut err, width);
        lines.iter().for_each(|line| console.err(line));
        console.end_live_line();
        String::from_utf8(err).unwrap()
    }

    #[test]
    fn ranks_are_named_once() {
        assert_eq!(rank_line("[1,3]<stderr>:hello").unwrap(), "[rank 3] hello");
        assert_eq!(rank_line("[1,3]<stdout>:[rank 3] hello").unwrap(), "[rank 3] hello");
        assert_eq!(rank_line("[1,3]<stderr>:").unwrap(), "[rank 3] ");
        assert_eq!(rank_line("[1,13]<stderr>:[rank 1] odd").unwrap(), "[rank 13] [rank 1] odd");
    }

    #[test]
    fn lines_of_nobody_are_left_alone() {
        for line in ["hello", "[vm:100] text", "[1,x]<stderr>:text", "[a]<b>:c", "[1,2]<other>:c"] {
            assert_eq!(rank_line(line), None, "{line}");
        }
    }

    #[test]
    fn without_a_terminal_steps_are_plain_lines() {
        let told = shown(None, &["[rank 0] step 1/2 | loss 3", "[rank 0] step 2/2 | loss 2"]);
        assert_eq!(told, "[rank 0] step 1/2 | loss 3\n[rank 0] step 2/2 | loss 2\n");
    }

    #[test]
    fn on_a_terminal_a_step_replaces_the_one_before() {
        let told = shown(Some(80), &["[rank 0] step 1/2", "[rank 0] step 2/2"]);
        assert_eq!(told, "\r[rank 0] step 1/2\x1b[K\r[rank 0] step 2/2\x1b[K\n");
    }

    #[test]
    fn any_other_line_starts_below_the_live_one() {
        let told = shown(Some(80), &["[rank 0] step 1/2", "[rank 1] step 1/2", "[rank 0] saved"]);
        assert_eq!(told, "\r[rank 0] step 1/2\x1b[K\n[rank 1] step 1/2\n[rank 0] saved\n");
    }

    #[test]
    fn a_live_line_is_cut_to_the_terminal() {
        assert_eq!(shown(Some(15), &["[rank 0] step 1/2"]), "\r[rank 0] step 1\x1b[K\n");
    }

    #[test]
    fn output_of_a_rank_starts_below_the_live_line_too() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console::new(&mut out, &mut err, Some(Box::new(|| None)));
        console.err("[rank 0] step 1/2");
        console.out("[rank 0] text");
        drop(console);
        assert_eq!(String::from_utf8(err).unwrap(), "\r[rank 0] step 1/2\x1b[K\n");
        assert_eq!(out, b"[rank 0] text\n");
    }
}
