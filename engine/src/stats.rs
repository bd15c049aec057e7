//! What a dump or restore cost: counted while it runs, written to `stats-dump` or `stats-restore` in the work
//! folder, printed with `--display-stats`. Container managers read the files to decide about further rounds.
//!
//! Times in the images are microseconds, cut off at 2^32 - 1 (71 minutes).

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use rcriu_images::catalog::ImageKind;
use rcriu_images::dir::ImageDir;
use rcriu_images::pb::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};

use crate::error::Result;
use crate::options::Dir;

/// A duration that is measured in pieces.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stopwatch {
    total: Duration,
    since: Option<Instant>,
}

impl Stopwatch {
    /// Starts or goes on. Without effect while it runs.
    pub fn start(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Stops. Without effect if it does not run.
    pub fn stop(&mut self) {
        if let Some(since) = self.since.take() {
            self.total += since.elapsed();
        }
    }

    /// Adds what was measured elsewhere.
    pub fn add(&mut self, more: Duration) {
        self.total += more;
    }

    /// Everything measured until now.
    pub fn total(&self) -> Duration {
        self.total + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn micros(&self) -> u32 {
        u32::try_from(self.total().as_micros()).unwrap_or(u32::MAX)
    }
}

/// What a dump counts. Pages are of 4096 bytes.
#[derive(Debug, Clone, Default)]
pub struct DumpStats {
    /// From the first task seized until the last one stands still.
    pub freezing: Stopwatch,
    /// From there until the tasks run again or are killed.
    pub frozen: Stopwatch,
    /// Finding and collecting pages of private memory.
    pub memdump: Stopwatch,
    /// Writing them.
    pub memwrite: Stopwatch,
    /// Resolving inodes to paths by walking directories.
    pub irmap: Stopwatch,
    /// Private pages looked at.
    pub pages_scanned: u64,
    /// Those found unchanged since the parent dump.
    pub pages_skipped_parent: u64,
    /// Those written.
    pub pages_written: u64,
    /// Those left to be fetched on demand.
    pub pages_lazy: u64,
    /// Pipes used to carry pages.
    pub page_pipes: u64,
    /// Buffers in those pipes.
    pub page_pipe_bufs: u64,
    /// Shared pages looked at.
    pub shpages_scanned: u64,
    /// Those found unchanged since the parent dump.
    pub shpages_skipped_parent: u64,
    /// Those written.
    pub shpages_written: u64,
}

impl DumpStats {
    /// As the image stores it.
    pub fn entry(&self) -> StatsEntry {
        let dump = DumpStatsEntry {
            freezing_time: self.freezing.micros(),
            frozen_time: self.frozen.micros(),
            memdump_time: self.memdump.micros(),
            memwrite_time: self.memwrite.micros(),
            irmap_resolve: Some(self.irmap.micros()),
            pages_scanned: self.pages_scanned,
            pages_skipped_parent: self.pages_skipped_parent,
            pages_written: self.pages_written,
            pages_lazy: self.pages_lazy,
            page_pipes: Some(self.page_pipes),
            page_pipe_bufs: Some(self.page_pipe_bufs),
            shpages_scanned: Some(self.shpages_scanned),
            shpages_skipped_parent: Some(self.shpages_skipped_parent),
            shpages_written: Some(self.shpages_written),
        };
        StatsEntry { dump: Some(dump), restore: None }
    }

    /// Writes `stats-dump` into the work folder.
    pub fn write(&self, work_dir: &Dir) -> Result<()> {
        write(work_dir, ImageKind::StatsDump, &self.entry())
    }
}

/// What a restore counts.
#[derive(Debug, Clone, Default)]
pub struct RestoreStats {
    /// From the first fork until every task exists.
    pub forking: Stopwatch,
    /// From there until the tasks can run.
    pub restore: Stopwatch,
    /// Pages compared with those inherited from the parent.
    pub pages_compared: u64,
    /// Those found equal and left shared.
    pub pages_skipped_cow: u64,
    /// Pages filled from images.
    pub pages_restored: u64,
}

impl RestoreStats {
    /// As the image stores it.
    pub fn entry(&self) -> StatsEntry {
        let restore = RestoreStatsEntry {
            pages_compared: self.pages_compared,
            pages_skipped_cow: self.pages_skipped_cow,
            forking_time: self.forking.micros(),
            restore_time: self.restore.micros(),
            pages_restored: Some(self.pages_restored),
        };
        StatsEntry { dump: None, restore: Some(restore) }
    }

    /// Writes `stats-restore` into the work folder.
    pub fn write(&self, work_dir: &Dir) -> Result<()> {
        write(work_dir, ImageKind::StatsRestore, &self.entry())
    }
}

fn write(work_dir: &Dir, kind: ImageKind, entry: &StatsEntry) -> Result<()> {
    log::info!("Writing stats");
    let mut writer = work_dir.images()?.writer(kind, 0);
    writer.write(entry)?;
    Ok(writer.finish()?)
}

/// Reads `stats-dump` or `stats-restore` back; `None` if it was not written.
pub fn read(work_dir: &Dir, kind: ImageKind) -> Result<Option<StatsEntry>> {
    let dir: ImageDir = work_dir.images()?;
    Ok(dir.read_opt(kind, 0)?)
}

/// The lines of `--display-stats`, in CRIU's words, which scripts read.
pub fn display(entry: &StatsEntry) -> String {
    let mut out = String::new();
    let pages = |out: &mut String, what: &str, n: u64| {
        let _ = writeln!(out, "{what}: {n} ({n:#x})");
    };
    if let Some(dump) = &entry.dump {
        out.push_str("Displaying dump stats:\n");
        let times = [
            ("Freezing time", Some(dump.freezing_time)),
            ("Frozen time", Some(dump.frozen_time)),
            ("Memory dump time", Some(dump.memdump_time)),
            ("Memory write time", Some(dump.memwrite_time)),
            ("IRMAP resolve time", dump.irmap_resolve),
        ];
        for (what, micros) in times {
            if let Some(micros) = micros {
                let _ = writeln!(out, "{what}: {micros} us");
            }
        }
        pages(&mut out, "Memory pages scanned", dump.pages_scanned);
        pages(&mut out, "Memory pages skipped from parent", dump.pages_skipped_parent);
        pages(&mut out, "Memory pages written", dump.pages_written);
        pages(&mut out, "Lazy memory pages", dump.pages_lazy);
    }
    if let Some(restore) = &entry.restore {
        out.push_str("Displaying restore stats:\n");
        pages(&mut out, "Pages compared", restore.pages_compared);
        pages(&mut out, "Pages skipped COW", restore.pages_skipped_cow);
        if let Some(restored) = restore.pages_restored {
            pages(&mut out, "Pages restored", restored);
        }
        let _ = writeln!(out, "Restore time: {} us", restore.restore_time);
        let _ = writeln!(out, "Forking time: {} us", restore.forking_time);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopwatch_adds_up_and_forgives() {
        let mut w = Stopwatch::default();
        w.stop();
        assert_eq!(w.total(), Duration::ZERO);
        w.start();
        let first = w.total();
        w.start();
        w.stop();
        assert!(w.total() >= first);
        let before = w.total();
        w.start();
        w.stop();
        assert!(w.total() >= before);
        w.total = Duration::from_secs(1 << 40);
        assert_eq!(w.micros(), u32::MAX);
    }

    #[test]
    fn images_are_read_back_and_displayed() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        assert!(read(&dir, ImageKind::StatsDump).unwrap().is_none());
        let stats = DumpStats { pages_scanned: 300, pages_written: 17, ..DumpStats::default() };
        stats.write(&dir).unwrap();
        let entry = read(&dir, ImageKind::StatsDump).unwrap().unwrap();
        assert_eq!(entry, stats.entry());
        let text = display(&entry);
        assert!(text.starts_with("Displaying dump stats:\nFreezing time: 0 us\n"), "{text}");
        assert!(text.contains("Memory pages scanned: 300 (0x12c)\n"), "{text}");

        RestoreStats { pages_restored: 5, ..RestoreStats::default() }.write(&dir).unwrap();
        let text = display(&read(&dir, ImageKind::StatsRestore).unwrap().unwrap());
        assert!(
            text.contains("Pages restored: 5 (0x5)\n") && text.ends_with("Forking time: 0 us\n"),
            "{text}"
        );
    }
}
