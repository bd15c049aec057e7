//! Compressed memory (`--compress`): what comes back is what was there; a change is noticed or does no harm; other
//! readers refuse.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

use crate::chain::{Chain, step};
use crate::failures::nothing_left;
use crate::pages::Server;

const PACKED: &[&str] = &["--compress"];

/// Bytes of the files in a folder whose names begin so.
fn bytes(dir: &Path, start: &str) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(start) {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}

/// A turn of dump and restore, with all memory compressed.
fn turn(kind: &str, args: &[&str], level: &'static str) -> Result<()> {
    let program = Program::start(kind, args)?;
    let only_packed = |images: &Images| {
        ensure!(bytes(images.path(), "pages-")? == 0, "there are plain pages too");
        ensure!(bytes(images.path(), "rcriu-blocks-")? > 0, "there are no compressed pages");
        let args = ["show", "--check", images.as_str()?];
        Engine::rcriu()?.run(&args)?.ok().map(drop)
    };
    Cycle::new()?.with_dump(&[level]).checking(only_packed).turn(&program)?;
    program.verify()
}

/// Memory that can be compressed takes less room, other memory hardly more.
fn room() -> Result<()> {
    for (kind, most) in [("compressible-memory", 40), ("random-memory", 101)] {
        let program = Program::start(kind, &["64"])?;
        let (plain, packed) = (Images::new()?, Images::new()?);
        Cycle::new()?.try_dump(program.pid(), &plain, &["--leave-running"])?.ok()?;
        Cycle::new()?.try_dump(program.pid(), &packed, &["--leave-running", "--compress=zstd:1"])?.ok()?;
        let (plain, packed) = (bytes(plain.path(), "pages-")?, bytes(packed.path(), "rcriu-pages-")?);
        ensure!(plain > 64 << 20, "{kind}: only {plain} bytes of pages");
        ensure!(packed <= plain / 100 * most, "{kind}: {packed} bytes in place of {plain}");
        program.verify()?;
    }
    Ok(())
}

/// Each dump of a chain may be compressed or not.
fn chain(packed: [bool; 3]) -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    let more = |n: usize| if packed[n - 1] { PACKED } else { &[] };
    for n in 1..=2 {
        chain.pre_dump(&program, n, more(n))?;
        step(&program, n)?;
    }
    chain.dump(&program, 3, more(3))?;
    for n in 1..=3 {
        let has = bytes(&chain.dir(n), "rcriu-blocks-")? > 0;
        ensure!(has == packed[n - 1], "dump {n} is compressed: {has}");
    }
    let dir = chain.dir(3);
    let dir = dir.to_str().context("name")?;
    Engine::rcriu()?.run(&["show", "--check", dir])?.ok()?;
    if let Ok(criu) = Engine::criu() {
        criu.run(&["restore", "-d", "-D", dir, "-o", "criu.log"])?.refused()?;
        nothing_left("what CRIU refused")?;
    }
    let refused = Engine::rcriu()?.run(&["dedup", "-D", dir])?.refused()?;
    refused.says(&["compressed"])?;
    chain.restore(3, &[])?;
    step(&program, 3)?;
    program.verify()
}

/// A bit in a block: with sums it is found and named, without them it is found or does no more harm than one in a
/// plain page.
fn damaged(sums: bool) -> Result<()> {
    let program = Program::start("compressible-memory", &["8"])?;
    let images = Images::new()?;
    let args: &[&str] = if sums { &["--compress", "--checksum"] } else { PACKED };
    Cycle::new()?.with_dump(args).dump(&program, &images)?;
    let checked = |words: &[&str]| -> Result<bool> {
        let checked = Engine::rcriu()?.run(&["show", "--check", images.as_str()?])?;
        let missing: Vec<_> = words.iter().filter(|w| !checked.stdout.contains(**w)).collect();
        ensure!(checked.code == Some(0) || missing.is_empty(), "{missing:?} not in {}", checked.stdout);
        Ok(checked.code == Some(0))
    };
    let task = format!("task {}, ", program.pid());
    let path = images.file("rcriu-pages-1.img");
    let whole = fs::read(&path)?;
    for at in (0..whole.len()).step_by(whole.len() / 25) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        fs::write(&path, bytes)?;
        let sound = checked(&["rcriu-pages-1.img: ", &task])?;
        ensure!(!sums || !sound, "byte {at} was turned, and nobody noticed");
        if !sound {
            Cycle::new()?.try_restore(&images, &[])?.refused()?.says(&["rcriu-pages-1.img"])?;
            nothing_left("the refused restore")?;
        }
    }
    for len in [0, 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len])?;
        ensure!(!checked(&["rcriu-pages-1.img: truncated"])?, "cut to {len} bytes, and nobody noticed");
        Cycle::new()?.try_restore(&images, &[])?.refused()?.says(&["rcriu-pages-1.img"])?;
        nothing_left("the refused restore")?;
    }
    fs::write(&path, &whole)?;
    let index = images.file("rcriu-blocks-1.img");
    let blocks = fs::read(&index)?;
    for at in 0..blocks.len().min(60) {
        let mut bytes = blocks.clone();
        bytes[at] ^= 0x11;
        fs::write(&index, bytes)?;
        ensure!(!checked(&[])?, "byte {at} of the index was turned, and nobody noticed");
    }
    Cycle::new()?.try_restore(&images, &[])?.refused()?;
    nothing_left("the refused restore")?;
    fs::write(&index, blocks)?;
    Cycle::new()?.restore(&images)?;
    program.verify()
}

/// Other readers refuse such a set.
fn foreign() -> Result<()> {
    let criu = Engine::criu()?;
    let program = Program::start("compressible-memory", &["4"])?;
    let images = Images::new()?;
    Cycle::new()?.with_dump(PACKED).dump(&program, &images)?;
    let refused = Cycle::between(criu.clone(), criu).try_restore(&images, &[])?.refused()?;
    ensure!(refused.log.contains("Not supported images version"), "it says {}", refused.log);
    nothing_left("what CRIU refused")?;
    Cycle::new()?.restore(&images)?;
    program.verify()
}

fn in_the_background() -> Result<()> {
    let (program, images) = (Program::start("writer", &["64"])?, Images::new()?);
    let both = ["--compress", "--checksum"];
    let more = [&both[..], &["--leave-running", "--background"]].concat();
    let cycle = Cycle::new()?.with_dump(&both);
    cycle.try_dump(program.pid(), &images, &more)?.ok()?;
    Engine::rcriu()?.run(&["show", "--check", images.as_str()?])?.ok()?;
    let images = Images::new()?;
    program.verify()?;
    let program = Program::start("writer", &["64"])?;
    cycle.dump(&program, &images)?;
    let done = cycle.try_restore(&images, &["--background"])?.ok()?;
    ensure!(done.stdout.contains("All memory is in place"), "it says {:?}", done.stdout);
    program.verify()
}

/// Memory that comes late from compressed pages, with or without sums.
fn lazily(dump: &[&str]) -> Result<()> {
    let program = Program::start("late-memory", &["64"])?;
    let images = Images::new()?;
    let cycle = Cycle::new()?.with_dump(dump);
    cycle.dump(&program, &images)?;
    let serving = Server::start(&Engine::rcriu()?, "lazy-pages", &images, &[])?;
    cycle.try_restore(&images, &["--lazy-pages"])?.ok()?;
    let verified = program.verify();
    serving.ended_well()?;
    verified
}

/// What cannot be done with compressed pages is refused by name before anything is touched.
fn refusals() -> Result<()> {
    let (program, images) = (Program::start("sleeper", &[])?, Images::new()?);
    let cycle = Cycle::new()?;
    let server = ["--compress", "--page-server", "--address", "127.0.0.1", "--port", "1"];
    cycle.try_dump(program.pid(), &images, &server)?.refused()?.says(&["--compress", "--page-server"])?;
    let free = ["--compress", "--auto-dedup"];
    cycle.try_dump(program.pid(), &images, &free)?.refused()?.says(&["--compress", "--auto-dedup"])?;
    cycle.try_dump(program.pid(), &images, &["--compress=lz4"])?.refused()?.says(&["lz4", "zstd"])?;
    Cycle::new()?.with_dump(PACKED).dump(&program, &images)?;
    cycle.try_restore(&images, &["--auto-dedup"])?.refused()?.says(&["compressed"])?;
    nothing_left("the refused restore")?;
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let kinds: &[(&str, &[&str], &str)] = &[
        ("compressible-memory", &["64"], "--compress"),
        ("random-memory", &["32"], "--compress=zstd"),
        ("private-memory", &[], "--compress=zstd:-5"),
        ("shared-memory", &[], "--compress=zstd:3"),
        ("file-memory", &[], "--compress"),
        ("cow", &[], "--compress"),
        ("sysv", &[], "--compress"),
        ("huge-memory", &[], "--compress"),
        ("tree", &["2", "2"], "--compress=zstd:19"),
        ("threads", &["3"], "--compress"),
    ];
    let turns = kinds.iter().map(|(kind, args, level)| {
        Case::new(format!("compressed: {kind} comes back ({level})"), move || turn(kind, args, level))
    });
    turns
        .chain([
            Case::new("compressed: memory takes less room where it can", room),
            Case::new("compressed: a chain of compressed dumps", || chain([true; 3])),
            Case::new("compressed: a plain dump on compressed ones", || chain([true, true, false])),
            Case::new("compressed: a compressed dump on plain ones", || chain([false, false, true])),
            Case::new("compressed: damage is found", || damaged(false)),
            Case::new("compressed: damage is found by sums", || damaged(true)),
            Case::new("compressed: dumped and restored behind the tree", in_the_background),
            Case::new("compressed: restored lazily", || lazily(PACKED)),
            Case::new("compressed: restored lazily, with sums", || lazily(&["--compress", "--checksum"])),
            Case::new("compressed: what cannot be is refused by name", refusals),
            Case::new("interop: compressed images are refused by CRIU", foreign),
        ])
        .collect()
}
