//! One round of a row.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};
use rcriu_images::ImageKind;
use rcriu_images::frame::EntryReader;
use rcriu_images::pb::StatsEntry;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Engine, Images, Program};

use super::rows::Row;

/// One round's figures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    /// From the start of the command to its end.
    pub dump: Timed,
    pub restore: Timed,
    /// What the dump's own statistics say.
    pub frozen: Duration,
    /// Size of all images in bytes.
    pub bytes: u64,
}

/// How long a command took, and the processor time of it and what it waited for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timed {
    pub wall: Duration,
    pub cpu: Duration,
}

/// Processor time of all children waited for.
fn cpu() -> Result<Duration> {
    let used = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    let sum = |t: nix::sys::time::TimeVal| {
        Duration::new(t.tv_sec().unsigned_abs(), t.tv_usec().unsigned_abs() as u32 * 1000)
    };
    Ok(sum(used.user_time()) + sum(used.system_time()))
}

/// Runs a command to its end; it must succeed. `then` counts too.
pub fn timed(engine: &Engine, args: &[&str], then: impl FnOnce() -> Result<()>) -> Result<Timed> {
    let before = cpu()?;
    let start = Instant::now();
    engine.run(args)?.ok()?;
    then()?;
    Ok(Timed { wall: start.elapsed(), cpu: cpu()?.saturating_sub(before) })
}

/// Microseconds that the tree was frozen, as the dump's own statistics say.
pub fn frozen(images: &Images) -> Result<Duration> {
    frozen_in(images.path())
}

fn frozen_in(dir: &Path) -> Result<Duration> {
    let file = File::open(dir.join("stats-dump")).context("stats-dump")?;
    let mut reader = EntryReader::new(file, "stats-dump", None);
    reader.header(ImageKind::StatsDump)?;
    let stats: StatsEntry = reader.one()?;
    Ok(Duration::from_micros(stats.dump.map_or(0, |d| u64::from(d.frozen_time))))
}

/// Size of all files in bytes.
fn bytes(images: &Images) -> Result<u64> {
    bytes_in(images.path())
}

fn bytes_in(dir: &Path) -> Result<u64> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}

/// Brings all files to the disk.
pub fn sync(images: &Images) -> Result<()> {
    for entry in fs::read_dir(images.path())? {
        File::open(entry?.path())?.sync_all()?;
    }
    Ok(())
}

/// Takes all files out of the page cache; they must be on the disk.
pub fn forget(images: &Images) -> Result<()> {
    for entry in fs::read_dir(images.path())? {
        let file = File::open(entry?.path())?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).context("posix_fadvise")?;
    }
    Ok(())
}

/// Dump and restore.
pub fn cycle(engine: &Engine, row: &Row, peer: bool) -> Result<Round> {
    let program = Program::start(row.program, row.args)?;
    let images = if row.mib > 0 { Images::new()? } else { Images::in_memory()? };
    let (dir, pid) = (images.as_str()?, program.pid().to_string());
    let tree = program.tree()?;
    let own = if peer { &[] } else { row.dump };
    let dump = ["dump", "-t", &pid, "-D", dir, "-o", "dump.log"];
    let dump = timed(engine, &[&dump[..], own].concat(), || if row.cold { sync(&images) } else { Ok(()) })?;
    wait_gone(&tree)?;
    let bytes = bytes(&images)?;
    if row.cold {
        forget(&images)?;
    }
    let restore = ["restore", "-d", "-D", dir, "-o", "restore.log"];
    let restore = timed(engine, &restore, || Ok(()))?;
    let frozen = frozen(&images)?;
    program.verify()?;
    Ok(Round { dump, restore, frozen, bytes })
}

/// The same of a tree that goes on, until it is ended for the restore.
pub fn background(engine: &Engine, row: &Row, _: bool) -> Result<Round> {
    let program = Program::start(row.program, row.args)?;
    let images = Images::new()?;
    let (dir, pid) = (images.as_str()?, program.pid().to_string());
    let tree = program.tree()?;
    let dump = ["dump", "-t", &pid, "-D", dir, "-o", "dump.log"];
    let dump = timed(engine, &[&dump[..], row.dump].concat(), || Ok(()))?;
    tree.iter().for_each(|t| t.kill(nix::sys::signal::Signal::SIGKILL));
    wait_gone(&tree)?;
    let bytes = bytes(&images)?;
    let restore = ["restore", "-d", "-D", dir, "-o", "restore.log"];
    let restore = timed(engine, &restore, || Ok(()))?;
    let frozen = frozen(&images)?;
    program.verify()?;
    Ok(Round { dump, restore, frozen, bytes })
}

/// Three pre-dumps of a program that goes on, then the dump, whose time counts alone; and restore.
pub fn after_pre_dumps(engine: &Engine, row: &Row, _: bool) -> Result<Round> {
    const PRE_DUMPS: usize = 3;
    let program = Program::start(row.program, row.args)?;
    let images = Images::new()?;
    let (base, pid) = (images.as_str()?, program.pid().to_string());
    let tree = program.tree()?;
    let mut dump = Timed::default();
    for number in 0..=PRE_DUMPS {
        let dir = format!("{base}/{number}");
        fs::create_dir(&dir).context("a folder for images")?;
        let verb = if number < PRE_DUMPS { "pre-dump" } else { "dump" };
        let mut args = vec![verb, "-t", &pid, "-D", &dir, "-o", "dump.log", "--track-mem"];
        let parent = format!("../{}", number.saturating_sub(1));
        if number > 0 {
            args.extend(["--prev-images-dir", &parent]);
        }
        dump = timed(engine, &args, || Ok(()))?;
    }
    wait_gone(&tree)?;
    let last = format!("{base}/{PRE_DUMPS}");
    let restore = timed(engine, &["restore", "-d", "-D", &last, "-o", "restore.log"], || Ok(()))?;
    let (frozen, bytes) = (frozen_in(Path::new(&last))?, bytes_in(Path::new(&last))?);
    program.verify()?;
    Ok(Round { dump, restore, frozen, bytes })
}
