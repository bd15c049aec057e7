//! Sums of images (`--checksum`): whatever changes after the dump is found and named, by `show --check` and by a
//! restore, which then makes nothing.

use std::fs;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use rcriu_images::pagemap::{Pagemap, Place};
use rcriu_images::{ImageDir, ImageKind};
use rcriu_tests::{Case, Cycle, Engine, Finished, Images, Program};

use crate::chain::{Chain, step};
use crate::failures::nothing_left;

const SUMS: &[&str] = &["--checksum"];

fn check(dir: &str) -> Result<Finished> {
    Engine::rcriu()?.run(&["show", "--check", dir])
}

/// `show --check` fails, and says what is wrong.
fn seen(images: &Images, words: &[&str]) -> Result<()> {
    let checked = check(images.as_str()?)?.refused()?;
    let missing: Vec<_> = words.iter().filter(|w| !checked.stdout.contains(**w)).collect();
    ensure!(missing.is_empty(), "show --check does not say {missing:?}: {}", checked.stdout);
    Ok(())
}

/// So does a restore, which leaves nothing behind.
fn found(images: &Images, words: &[&str]) -> Result<()> {
    seen(images, words)?;
    Cycle::new()?.try_restore(images, &[])?.refused()?.says(&words[..1])?;
    nothing_left("the refused restore")
}

/// The bits that are turned in a file: some at its ends, some in the middle.
fn places(len: usize) -> Vec<(usize, u8)> {
    let mut places = vec![(0, 0), (len / 3, 3), (len / 2, 7), (len - 1, 5)];
    places.extend([4, 8, 9, 12].into_iter().filter(|at| *at < len).map(|at| (at, (at % 8) as u8)));
    places.sort_unstable();
    places.dedup_by_key(|(at, _)| *at);
    places
}

/// A bit anywhere in the set.
fn any_bit(kind: &str, args: &[&str]) -> Result<()> {
    let program = Program::start(kind, args)?;
    let images = Images::new()?;
    Cycle::new()?.with_dump(SUMS).dump(&program, &images)?;
    check(images.as_str()?)?.ok()?;
    let names = images.names()?;
    ensure!(names.iter().any(|n| n == "rcriu-sums.img"), "there are no sums: {names:?}");
    for name in &names {
        let path = images.file(name);
        let whole = fs::read(&path)?;
        for (at, bit) in places(whole.len()) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            fs::write(&path, bytes)?;
            seen(&images, &[name]).with_context(|| format!("{name}: bit {bit} of byte {at}"))?;
        }
        found(&images, &[name])?;
        fs::write(&path, &whole[..whole.len() - 1])?;
        seen(&images, &[name]).with_context(|| format!("{name}: cut by a byte"))?;
        fs::remove_file(&path)?;
        found(&images, &[name]).with_context(|| format!("{name}: taken away"))?;
        fs::write(&path, whole)?;
    }
    let extra = images.file("ghost-file-77.img");
    fs::write(&extra, "not of this set")?;
    found(&images, &["ghost-file-77.img", "came after the dump"])?;
    fs::remove_file(extra)?;
    check(images.as_str()?)?.ok()?;
    Cycle::new()?.restore(&images)?;
    program.verify()
}

/// Ranges of addresses of a task whose pages are stored, with the byte of the pages file each begins at.
fn stored(images: &Images, pid: i32) -> Result<Vec<(Range<u64>, u64)>> {
    let dir = ImageDir::open(images.path())?;
    let map = Pagemap::read(&dir, ImageKind::Pagemap, pid as u64)?.context("no pagemap")?;
    ensure!(map.pages_id == 1, "pages are in pages-{}.img", map.pages_id);
    let stored = |r: &rcriu_images::pagemap::Region| match r.place {
        Place::Present { first } => Some((r.vaddr..r.end(), first * 4096)),
        _ => None,
    };
    Ok(map.regions.iter().filter_map(stored).collect())
}

/// A bit of a page is named by task and address.
fn task_and_address() -> Result<()> {
    let program = Program::start("random-memory", &["32"])?;
    let images = Images::new()?;
    Cycle::new()?.with_dump(SUMS).dump(&program, &images)?;
    let regions = stored(&images, program.pid())?;
    let (addresses, start) = regions.iter().max_by_key(|(r, _)| r.end - r.start).context("no pages")?;
    let path = images.file("pages-1.img");
    let whole = fs::read(&path)?;
    for page in [0, 1, (addresses.end - addresses.start) / 4096 - 1] {
        let at = addresses.start + page * 4096;
        let mut bytes = whole.clone();
        bytes[(start + page * 4096 + 1234) as usize] ^= 2;
        fs::write(&path, bytes)?;
        found(&images, &["pages-1.img", &format!("task {}, {at:x}-{:x}", program.pid(), at + 4095)])?;
    }
    fs::write(&path, whole)?;
    Cycle::new()?.restore(&images)?;
    program.verify()
}

/// A chain with sums: a change in any of its folders is found, and what --auto-dedup frees is none.
fn chain(free: &[&str]) -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    let more = [SUMS, free].concat();
    for n in 1..=2 {
        chain.pre_dump(&program, n, &more)?;
        step(&program, n)?;
    }
    chain.dump(&program, 3, &more)?;
    let dir = chain.dir(3);
    let dir = dir.to_str().context("name")?;
    check(dir)?.ok()?;
    for n in 1..=2 {
        let path = chain.dir(n).join("pages-1.img");
        let whole = fs::read(&path)?;
        let Some(at) = whole.iter().position(|b| *b != 0) else { bail!("dump {n} has no content") };
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, bytes)?;
        let name = format!("{}pages-1.img", "parent/".repeat(3 - n));
        let checked = check(dir)?.refused()?;
        ensure!(checked.stdout.contains(&name), "{name} is not named: {}", checked.stdout);
        Engine::rcriu()?
            .run(&["restore", "-d", "-D", dir, "-o", "restore.log"])?
            .refused()?
            .says(&[&name])?;
        nothing_left("the refused restore")?;
        fs::write(&path, whole)?;
    }
    chain.restore(3, free)?;
    step(&program, 3)?;
    if !free.is_empty() {
        // Its pages are used up; that is no damage of files.
        let checked = check(dir)?;
        ensure!(!checked.stdout.contains("pages-1.img"), "{}", checked.stdout);
    }
    program.verify()
}

/// A server writes pages elsewhere, without sums.
fn no_server() -> Result<()> {
    let (program, images) = (Program::start("sleeper", &[])?, Images::new()?);
    let args = ["--checksum", "--page-server", "--address", "127.0.0.1", "--port", "1"];
    let refused = Cycle::new()?.try_dump(program.pid(), &images, &args)?.refused()?;
    refused.says(&["--checksum", "--page-server"])?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let plain: &[(&str, &[&str])] = &[("threads", &["3"]), ("shared-memory", &[]), ("unlinked", &[])];
    let bits = plain.iter().map(|(kind, args)| {
        Case::new(format!("sums: any bit turned in images of {kind} is found"), move || any_bit(kind, args))
            .within(std::time::Duration::from_secs(300))
    });
    bits.chain([
        Case::new("sums: a page that changed is named by task and address", task_and_address),
        Case::new("sums: a change anywhere in a chain of dumps is found", || chain(&[])),
        Case::new("sums: pages that --auto-dedup frees are no damage", || chain(&["--auto-dedup"])),
        Case::new("sums: --checksum and --page-server exclude each other", no_server),
        Case::new("sums: memory dumped in the background has sums", || {
            let (program, images) = (Program::start("writer", &["64"])?, Images::new()?);
            let more = ["--checksum", "--leave-running", "--background"];
            Cycle::new()?.try_dump(program.pid(), &images, &more)?.ok()?;
            check(images.as_str()?)?.ok()?;
            program.verify()
        }),
    ])
    .collect()
}
