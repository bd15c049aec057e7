//! Medians and ratios, as Markdown.

use std::fs;
use std::time::Duration;

use anyhow::Result;

use super::limit::Limit;
use super::measure::{Round, Timed};
use super::rows::Row;

/// A line of the table: medians.
pub struct Line {
    row: &'static Row,
    mine: Round,
    theirs: Option<Round>,
    /// Why there are no figures of the other.
    why: Option<String>,
    limit: Option<Limit>,
}

impl Line {
    pub fn new(row: &'static Row, mine: &[Round], theirs: Result<Vec<Round>>, limits: &[Limit]) -> Line {
        let limit = (!limits.is_empty()).then(|| Limit {
            write: median(limits.iter().map(|l| l.write)),
            read: median(limits.iter().map(|l| l.read)),
        });
        let why = theirs.as_ref().err().map(reason);
        let theirs = theirs.ok().filter(|t| !t.is_empty()).map(|t| medians(&t));
        Line { row, mine: medians(mine), theirs, why, limit }
    }

    /// The line as Markdown.
    pub fn text(&self) -> String {
        let pick: [fn(&Round) -> Duration; 3] = [|r| r.dump.wall, |r| r.restore.wall, |r| r.frozen];
        let mut cells = vec![self.row.name.to_owned()];
        let mut why = self.why.as_deref();
        for pick in pick {
            let mine = pick(&self.mine);
            cells.push(milliseconds(mine));
            match &self.theirs {
                Some(theirs) => cells.extend([milliseconds(pick(theirs)), ratio(mine, pick(theirs))]),
                None => cells.extend([why.take().unwrap_or("-").to_owned(), "-".into()]),
            }
        }
        cells.push(mebibytes(self.mine.bytes));
        cells.push(self.theirs.map_or("-".into(), |t| mebibytes(t.bytes)));
        cells.push(
            self.limit
                .map_or(String::new(), |l| format!("{} / {}", milliseconds(l.write), milliseconds(l.read))),
        );
        format!("| {} |", cells.join(" | "))
    }
}

/// The machine, what the columns are, and the head of the table.
pub fn head(rounds: usize) -> String {
    format!(
        "{}; medians of {rounds} rounds; times in milliseconds, ratio: ours by the other's; limit: one copy of \
         as many bytes from memory to a file / from the file to fresh memory\n\n\
         | program | dump | peer | ratio | restore | peer | ratio | frozen | peer | ratio | MiB | peer | limit |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        machine()
    )
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("");
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let memory = read("/proc/meminfo")
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    format!(
        "{}, {cores} cores, {} GiB, Linux {}",
        model.trim_start_matches(['\t', ':', ' ']),
        memory.div_ceil(1 << 20),
        read("/proc/sys/kernel/osrelease").trim()
    )
}

/// How times grow between lines that differ only in their number.
pub fn growth(lines: &[Line]) -> String {
    let split = |line: &Line| {
        let (number, what) = line.row.name.split_once(' ')?;
        Some((number.replace(',', "").parse::<f64>().ok()?, what.to_owned()))
    };
    let mut out = String::new();
    for pair in lines.windows(2) {
        if let (Some((a, of)), Some((b, what))) = (split(&pair[0]), split(&pair[1]))
            && of == what
        {
            let times = |pick: fn(&Round) -> Duration| ratio(pick(&pair[1].mine), pick(&pair[0].mine));
            let (dump, restore) = (times(|r| r.dump.wall), times(|r| r.restore.wall));
            out += &format!("\n{what}: {:.1} times as many take {dump} (dump), {restore} (restore)", b / a);
        }
    }
    out
}

/// What a failure says, for a cell of the table: the last line with words in it is the cause.
pub fn reason(e: &anyhow::Error) -> String {
    let text = format!("{e:#}");
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let error = lines.iter().find(|line| line.contains("Error")).or(lines.first());
    let words: String = error.copied().unwrap_or("").chars().filter(|c| *c != '|').take(120).collect();
    format!("no figure: {words}")
}

/// One round, for the eyes of who waits.
pub fn each(round: &Result<Round>) -> String {
    match round {
        Ok(r) => {
            let timed = |t: Timed| format!("{} (cpu {})", milliseconds(t.wall), milliseconds(t.cpu));
            format!("dump {}, restore {}, frozen {}", timed(r.dump), timed(r.restore), milliseconds(r.frozen))
        }
        Err(e) => format!("{e:#}"),
    }
}

fn median<T: Ord + Copy + Default>(values: impl Iterator<Item = T>) -> T {
    let mut values: Vec<T> = values.collect();
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn medians(rounds: &[Round]) -> Round {
    let time = |pick: fn(&Round) -> Duration| median(rounds.iter().map(pick));
    Round {
        dump: Timed { wall: time(|r| r.dump.wall), cpu: time(|r| r.dump.cpu) },
        restore: Timed { wall: time(|r| r.restore.wall), cpu: time(|r| r.restore.cpu) },
        frozen: time(|r| r.frozen),
        bytes: median(rounds.iter().map(|r| r.bytes)),
    }
}

fn milliseconds(d: Duration) -> String {
    format!("{:.1}", d.as_secs_f64() * 1000.0)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

fn ratio(ours: Duration, theirs: Duration) -> String {
    if theirs.is_zero() { "-".into() } else { format!("{:.2}", ours.as_secs_f64() / theirs.as_secs_f64()) }
}
