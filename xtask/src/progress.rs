//! What people see while they wait: a spinner with the time on a terminal, plain lines elsewhere.

use std::{
    cell::Cell,
    fmt::Display,
    io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _},
    process::{Command, Stdio},
    sync::{
        LazyLock,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bpf_tests::wait::Stopwatch;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// How often a long step says on a plain output that it is still at it.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Of a failed command's output, so many last lines are shown at most.
const TAIL: usize = 400;

/// What cargo and nextest say of what goes well: hundreds of lines, with the one that tells at their end.
const PROGRESS: [&str; 7] = [
    "Adding",
    "Checking",
    "Compiling",
    "Downloaded",
    "Downloading",
    "Fresh",
    "PASS",
];

/// All spinners, so that a step within a step gets a line of its own.
static SPINNERS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Writes a line to standard output.
pub(crate) fn say(line: impl Display) {
    SPINNERS.suspend(|| {
        // Whoever closed our output does not want to read.
        let _written = writeln!(io::stdout().lock(), "{line}");
    });
}

/// A step that takes time. It ends with [`Step::done`], or dropped: without a trace.
pub(crate) struct Step {
    what: String,
    clock: Stopwatch,
    /// When it last said something on a plain output.
    spoke: Cell<Stopwatch>,
    bar: Option<ProgressBar>,
}

impl Step {
    /// Begins the step, which is called `what`: "building the agent".
    pub(crate) fn begin(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = io::stderr().is_terminal().then(|| {
            let bar = SPINNERS.add(ProgressBar::new_spinner().with_message(what.clone()));
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            say(format_args!("  ... {what}"));
        }
        Self {
            what,
            clock: Stopwatch::start(),
            spoke: Cell::new(Stopwatch::start()),
            bar,
        }
    }

    /// Says what it is at. On a plain output now and then only: enough to see that it lives.
    pub(crate) fn note(&self, detail: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {}", self.what, detail.trim()));
        } else if self.spoke.get().elapsed() > HEARTBEAT {
            self.spoke.set(Stopwatch::start());
            let seconds = self.clock.elapsed().as_secs();
            say(format_args!("      {seconds} s: {}", detail.trim()));
        }
    }

    /// Time since it began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Ends it with a line.
    pub(crate) fn done(self) {
        self.clear();
        let seconds = self.elapsed().as_secs_f64();
        say(format_args!("  ok  {} ({seconds:.1} s)", self.what));
    }

    /// Runs `command` to its end, showing its last line. Returns what it said, both outputs together.
    ///
    /// # Errors
    /// If its exit code is not 0; with the end of what it said.
    pub(crate) fn run(&self, command: &mut Command) -> Result<Vec<String>> {
        let line = command_line(command);
        let (reader, writer) = io::pipe().context("making a pipe")?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone().context("making a pipe")?)
            .stderr(writer);
        let child = command.spawn().with_context(|| format!("starting {line}"));
        // The command holds the pipe's other end as well: reading would not end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = child?;
        let said = self.follow(reader);
        let status = child
            .wait()
            .with_context(|| format!("waiting for {line}"))?;
        if !status.success() {
            bail!("{line}: {status}\n{}", telling(&said));
        }
        Ok(said)
    }

    /// Reads to the end, showing lines as they come.
    fn follow(&self, output: io::PipeReader) -> Vec<String> {
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut said: Vec<String> = vec![];
        loop {
            match lines.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => said.push(line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return said,
            }
            if let Some(last) = said.last().filter(|last| !last.is_empty()) {
                self.note(last);
            }
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The end of what a failed command said, without the progress before it.
fn telling(said: &[String]) -> String {
    let progress = |line: &str| {
        let first = line.split_whitespace().next();
        line.starts_with(' ') && first.is_some_and(|word| PROGRESS.contains(&word))
    };
    let telling: Vec<&str> = said
        .iter()
        .map(String::as_str)
        .filter(|line| !progress(line))
        .collect();
    let start = telling.len().saturating_sub(TAIL);
    telling.get(start..).unwrap_or_default().join("\n")
}

/// The command line, for people.
fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

/// A table with aligned columns. The last column may be as long as it likes.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::telling;

    #[test]
    fn a_failure_is_told_without_the_progress_before_it() {
        let said = [
            "   Compiling serde v1.0.229",
            "        PASS [   0.016s] (1/2) sidestep one",
            "error: linking failed",
            "Compiling is what this line of an error speaks of",
            "  ...",
        ]
        .map(str::to_owned);
        let expected =
            "error: linking failed\nCompiling is what this line of an error speaks of\n  ...";
        assert_eq!(telling(&said), expected);
    }
}
