//! Sets of CRIU after 4.2 whose pages are packed by LZ4: what comes back is what was there; what is damaged or not
//! known is refused by name.
//!
//! The sets are dumps of ours that are brought into that layout.

use std::fs;

use anyhow::{Context, Result, ensure};
use rcriu_images::frame::{append_entry, header_bytes};
use rcriu_images::testing::later::{Counts, Layout, put, rewrite};
use rcriu_images::{ImageDir, ImageKind, magic, pagemap::Pagemap, pb};
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

use crate::chain::{Chain, step};
use crate::failures::nothing_left;
use crate::pages::{Server, free_port};

/// Rewrites a set, looks whether it is sound, and whether there are blocks of all kinds in it.
fn into<const PER: u32>(images: &Images, layout: Layout) -> Result<Counts> {
    let counts = rewrite(images.path(), layout, PER);
    ensure!(counts.packed > 0, "no pages were packed: {counts:?}");
    let inventory: pb::InventoryEntry =
        ImageDir::open(images.path())?.read_one(ImageKind::Inventory, 0).context("inventory")?;
    ensure!(inventory.img_version == magic::IMAGES_V1_2, "version {}", inventory.img_version);
    sound(images.as_str()?)?;
    Ok(counts)
}

fn sound(dir: &str) -> Result<()> {
    let checked = Engine::rcriu()?.run(&["show", "--check", dir])?.ok()?;
    ensure!(checked.stdout.contains("sound"), "it says {}", checked.stdout);
    Engine::rcriu()?.run(&["show", dir])?.ok().map(drop)
}

fn pages(images: &Images) -> Result<()> {
    into::<1>(images, Layout::Blocks).map(drop)
}

fn blocks(images: &Images) -> Result<()> {
    into::<64>(images, Layout::Blocks).map(drop)
}

fn odd(images: &Images) -> Result<()> {
    into::<7>(images, Layout::Blocks).map(drop)
}

fn large(images: &Images) -> Result<()> {
    into::<1024>(images, Layout::Blocks).map(drop)
}

fn first_pages(images: &Images) -> Result<()> {
    into::<1>(images, Layout::Regions).map(drop)
}

fn first_unpacked(images: &Images) -> Result<()> {
    into::<1>(images, Layout::Unpacked).map(drop)
}

fn regions(images: &Images) -> Result<()> {
    into::<16>(images, Layout::Regions).map(drop)
}

/// How a set is rewritten, and what that is called.
type Way = (&'static str, fn(&Images) -> Result<()>);

const WAYS: &[Way] = &[
    ("single pages", pages),
    ("blocks of 64", blocks),
    ("blocks of 7", odd),
    ("blocks of 1024", large),
    ("the first form, pages", first_pages),
    ("the first form, a list that is not packed", first_unpacked),
    ("the first form, regions", regions),
];

/// A turn of dump and restore.
fn turn(kind: &str, args: &[&str], check: fn(&Images) -> Result<()>) -> Result<()> {
    let program = Program::start(kind, args)?;
    Cycle::new()?.checking(check).turn(&program)?;
    program.verify()
}

/// Blocks of all kinds, and entries without any, are among those that other cases restore.
fn all_kinds() -> Result<()> {
    let mut seen = Counts::default();
    for (kind, args) in
        [("private-memory", &[][..]), ("random-memory", &["8"]), ("shared-memory", &[]), ("file-memory", &[])]
    {
        let (program, images) = (Program::start(kind, args)?, Images::new()?);
        Cycle::new()?.dump(&program, &images)?;
        let counts = into::<7>(&images, Layout::Blocks)?;
        seen += counts;
        if kind == "shared-memory" {
            let dir = ImageDir::open(images.path())?;
            let mut shared = dir.images()?.into_iter().filter(|(kind, _)| *kind == ImageKind::ShmemPagemap);
            let packed = |(kind, id)| {
                Pagemap::read(&dir, kind, id).is_ok_and(|m| m.is_some_and(|m| m.blocks.is_some()))
            };
            ensure!(shared.any(packed), "no shared memory was packed");
        }
        Cycle::new()?.restore(&images)?;
        program.verify()?;
    }
    let Counts { zero, raw, packed, short, plain } = seen;
    ensure!(zero > 0 && raw > 0 && packed > 0 && short > 0 && plain > 0, "not all kinds: {seen:?}");
    Ok(())
}

/// Chains whose dumps are rewritten or not, before the next one is made on them.
fn chain(ways: [Option<(Layout, u32)>; 3]) -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    let later = |n: usize| -> Result<()> {
        if let Some((layout, per)) = ways[n - 1] {
            let counts = rewrite(&chain.dir(n), layout, per);
            ensure!(counts.packed > 0, "no pages of dump {n} were packed: {counts:?}");
        }
        let dir = ImageDir::open(chain.dir(n))?;
        let inventory: pb::InventoryEntry = dir.read_one(ImageKind::Inventory, 0)?;
        let on_packed = ways[..n].iter().any(Option::is_some);
        let want = if on_packed { magic::IMAGES_V1_2 } else { magic::IMAGES_V1_1 };
        ensure!(inventory.img_version == want, "dump {n} has version {}, not {want}", inventory.img_version);
        Ok(())
    };
    for n in 1..=2 {
        chain.pre_dump(&program, n, &[])?;
        later(n)?;
        step(&program, n)?;
    }
    chain.dump(&program, 3, &[])?;
    later(3)?;
    let dir = chain.dir(3);
    let dir = dir.to_str().context("name")?;
    sound(dir)?;
    let before = chain.pages(1)?;
    let refused = Engine::rcriu()?.run(&["dedup", "-D", dir])?.refused()?;
    refused.says(&["compressed"])?;
    ensure!(chain.pages(1)? == before, "the refused command freed pages");
    if let Ok(criu) = Engine::criu() {
        criu.run(&["restore", "-d", "-D", dir, "-o", "criu.log"])?.refused()?;
        nothing_left("what CRIU 4.2 refused")?;
    }
    chain.restore(3, &[])?;
    step(&program, 3)?;
    program.verify()
}

/// A dump of ours that is compressed, on one of the later layout.
fn compressed_on_later() -> Result<()> {
    let (program, chain) = (Program::start("changing-memory", &[])?, Chain::new()?);
    chain.pre_dump(&program, 1, &[])?;
    rewrite(&chain.dir(1), Layout::Blocks, 16);
    step(&program, 1)?;
    chain.dump(&program, 2, &["--compress", "--checksum"])?;
    let inventory: pb::InventoryEntry = ImageDir::open(chain.dir(2))?.read_one(ImageKind::Inventory, 0)?;
    ensure!(inventory.img_version == magic::IMAGES_PACKED, "version {:#x}", inventory.img_version);
    sound(chain.dir(2).to_str().context("name")?)?;
    chain.restore(2, &[])?;
    step(&program, 2)?;
    program.verify()
}

/// Memory that comes late, from the images or over a page server.
fn lazily(check: fn(&Images) -> Result<()>, from_server: bool) -> Result<()> {
    let program = Program::start("late-memory", &["64"])?;
    let (images, rcriu) = (Images::new()?, Engine::rcriu()?);
    let cycle = Cycle::new()?.checking(check);
    cycle.dump(&program, &images)?;
    let port = free_port()?;
    let from = ["--page-server", "--address", "127.0.0.1", "--port", &port];
    let (mut pages, mut args) = (None, &[][..]);
    if from_server {
        pages = Some(Server::start(&rcriu, "page-server", &images, &["--lazy-pages", "--port", &port])?);
        args = &from[..];
    }
    let serving = Server::start(&rcriu, "lazy-pages", &images, args)?;
    cycle.try_restore(&images, &["--lazy-pages"])?.ok()?;
    let verified = program.verify();
    serving.ended_well()?;
    pages.map_or(Ok(()), Server::ended_well)?;
    verified
}

fn in_the_background() -> Result<()> {
    let (program, images) = (Program::start("writer", &["64"])?, Images::new()?);
    Cycle::new()?.checking(odd).dump(&program, &images)?;
    let done = Cycle::new()?.try_restore(&images, &["--background"])?.ok()?;
    ensure!(done.stdout.contains("All memory is in place"), "it says {:?}", done.stdout);
    program.verify()
}

/// A set of the later layout, and what a restore of it must say when it is changed.
struct Broken {
    program: Program,
    images: Images,
    dir: ImageDir,
}

impl Broken {
    fn new() -> Result<Broken> {
        let (program, images) = (Program::start("compressible-memory", &["8"])?, Images::new()?);
        Cycle::new()?.checking(odd).dump(&program, &images)?;
        let dir = ImageDir::open(images.path())?;
        Ok(Broken { program, images, dir })
    }

    /// A restore is refused with these words, and leaves nothing behind; `show --check` says one of them too.
    fn refused(&self, words: &[&str]) -> Result<()> {
        let finished = Cycle::new()?.try_restore(&self.images, &[])?.refused()?;
        finished.says(words)?;
        let lines = finished.stderr.lines().count();
        ensure!(lines == 1, "a refusal is one line on stderr, not {lines}: {}", finished.stderr);
        nothing_left("the refused restore")?;
        let checked = Engine::rcriu()?.run(&["show", "--check", self.images.as_str()?])?;
        ensure!(checked.code != Some(0), "show --check finds nothing: {}", checked.stdout);
        let said = format!("{}{}", checked.stdout, checked.stderr);
        ensure!(words.iter().any(|word| said.contains(word)), "show --check says {said}");
        Ok(())
    }

    /// Puts something else in the place of a file while `what` runs.
    fn with(&self, name: &str, bytes: &[u8], what: impl FnOnce() -> Result<()>) -> Result<()> {
        let path = self.images.file(name);
        let whole = fs::read(&path)?;
        fs::write(&path, bytes)?;
        what().with_context(|| format!("with another {name}"))?;
        Ok(fs::write(&path, whole)?)
    }

    /// The pagemap of the task with its first entry with blocks changed.
    fn changed(&self, change: impl FnOnce(&mut pb::PagemapEntry)) -> Result<Vec<u8>> {
        let id = self.program.pid().cast_unsigned().into();
        let mut reader = self.dir.require(ImageKind::Pagemap, id)?;
        let head: pb::PagemapHead = reader.one()?;
        let mut entries: Vec<pb::PagemapEntry> = reader.all()?;
        change(entries.iter_mut().find(|e| e.blocks.is_some()).context("no entry has blocks")?);
        let mut image = header_bytes(ImageKind::Pagemap);
        append_entry(&head, &mut image);
        entries.iter().for_each(|e| append_entry(e, &mut image));
        Ok(image)
    }

    /// The same with a field 4 in the blocks of that entry.
    fn padded(&self) -> Result<Vec<u8>> {
        let encoded = |entry: &dyn Fn(&mut Vec<u8>)| -> Vec<u8> {
            let mut bytes = Vec::new();
            entry(&mut bytes);
            bytes.split_off(4)
        };
        let mut entry = None;
        let mut image = self.changed(|e| {
            let blocks = e.blocks.take();
            let mut blocks = encoded(&|to| append_entry(&blocks.clone().unwrap_or_default(), to));
            blocks.extend([0x20, 1]);
            // Field 6 with these bytes, their length in groups of seven bits.
            let mut bytes = encoded(&|to| append_entry(e, to));
            bytes.push(0x32);
            let mut len = blocks.len();
            while len >= 0x80 {
                bytes.push(len as u8 | 0x80);
                len >>= 7;
            }
            bytes.push(len as u8);
            bytes.extend(blocks);
            entry = Some(bytes);
        })?;
        let entry = entry.context("no entry has blocks")?;
        image.truncate(header_bytes(ImageKind::Pagemap).len());
        append_entry(&pb::PagemapHead { pages_id: 1 }, &mut image);
        image.extend((entry.len() as u32).to_le_bytes());
        image.extend(entry);
        Ok(image)
    }

    fn inventory(&self, change: impl FnOnce(&mut pb::InventoryEntry)) -> Result<Vec<u8>> {
        let mut inventory: pb::InventoryEntry = self.dir.read_one(ImageKind::Inventory, 0)?;
        change(&mut inventory);
        let scratch = Images::new()?;
        put(&ImageDir::open(scratch.path())?, ImageKind::Inventory, 0, &[inventory]);
        Ok(fs::read(scratch.file("inventory.img"))?)
    }
}

/// Bits that change anywhere, and files that are cut short.
fn damaged() -> Result<()> {
    let broken = Broken::new()?;
    let path = broken.images.file("pages-1.img");
    let whole = fs::read(&path)?;
    let task = format!("task {}, ", broken.program.pid());
    let mut noticed = 0;
    for at in (0..whole.len()).step_by(whole.len() / 25) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        let checked = |sound: &mut bool| -> Result<()> {
            let checked = Engine::rcriu()?.run(&["show", "--check", broken.images.as_str()?])?;
            *sound = checked.code == Some(0);
            ensure!(*sound || checked.stdout.contains(&task), "{task:?} not in {}", checked.stdout);
            Ok(())
        };
        let mut sound = true;
        broken.with("pages-1.img", &bytes, || {
            checked(&mut sound)?;
            if sound { Ok(()) } else { broken.refused(&["pages-1.img", "block "]) }
        })?;
        noticed += u32::from(!sound);
    }
    ensure!(noticed > 0, "no damage was noticed");
    for len in [0, 1, whole.len() / 2, whole.len() - 1] {
        broken.with("pages-1.img", &whole[..len], || broken.refused(&["pages-1.img: truncated"]))?;
    }
    fs::remove_file(&path)?;
    broken.refused(&["pages-1.img"])?;
    fs::write(&path, whole)?;
    Cycle::new()?.restore(&broken.images)?;
    broken.program.verify()
}

/// What makes no sense, or is of a layout that is not known, is refused before anything is made.
fn refusals() -> Result<()> {
    let broken = Broken::new()?;
    let pagemap = format!("pagemap-{}.img", broken.program.pid());
    let entry = |change: fn(&mut pb::PagemapEntry), words: &[&str]| {
        let bytes = broken.changed(change)?;
        broken.with(&pagemap, &bytes, || broken.refused(&[&[pagemap.as_str()], words].concat()))
    };
    type Change = fn(&mut pb::PagemapBlocks);
    let blocks = |e: &mut pb::PagemapEntry, c: Change| e.blocks.as_mut().map(c).unwrap_or_default();
    entry(|e| e.flags = Some(4 | 0x20), &["flags 0x20", "restore with the program that wrote it"])?;
    entry(|e| e.flags = Some(1), &["not stored here"])?;
    for (bytes, words) in [
        (broken.changed(|e| blocks(e, |b| b.pages_per_block = 4096))?, "compressed blocks of 4096 pages"),
        (broken.changed(|e| blocks(e, |b| b.total_payload_size += 1))?, "the entry says"),
        (broken.changed(|e| blocks(e, |b| b.block_sizes[0] = u32::MAX))?, "takes 4294967295"),
        (broken.changed(|e| blocks(e, |b| b.block_sizes.truncate(1)))?, "compressed blocks, there are"),
    ] {
        broken.with(&pagemap, &bytes, || broken.refused(&[words]))?;
    }
    // What a fork says of blocks that it pads.
    let bytes = broken.padded()?;
    broken.with(&pagemap, &bytes, || {
        broken.refused(&["field 4 of pagemap_blocks is not known", "restore with the program that wrote it"])
    })?;
    for (bytes, words) in [
        (broken.inventory(|i| i.compress = Some(3))?, "compression 3 is not known"),
        (broken.inventory(|i| i.img_version = 2)?, "compression 1 contradicts image version 2"),
        (broken.inventory(|i| i.img_version = 4)?, "image version 4 is not known"),
        (broken.inventory(|i| i.compress = None)?, "no pages are compressed"),
    ] {
        broken.with("inventory.img", &bytes, || broken.refused(&[words]))?;
    }
    Cycle::new()?.try_restore(&broken.images, &["--auto-dedup"])?.refused()?.says(&["compressed"])?;
    nothing_left("the refused restore")?;
    Cycle::new()?.restore(&broken.images).and_then(|()| broken.program.verify())
}

/// Programs whose memory is of other sorts.
const KINDS: &[(&str, &[&str], Way)] = &[
    ("random-memory", &["32"], WAYS[0]),
    ("shared-memory", &[], WAYS[1]),
    ("shared-memory", &[], WAYS[4]),
    ("file-memory", &[], WAYS[2]),
    ("cow", &[], WAYS[1]),
    ("cow", &[], WAYS[0]),
    ("sysv", &[], WAYS[2]),
    ("huge-memory", &[], WAYS[3]),
    ("page-path", &["plain"], WAYS[2]),
    ("stack", &[], WAYS[6]),
    ("tree", &["2", "2"], WAYS[0]),
    ("threads", &["3"], WAYS[3]),
];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, way) in WAYS {
        for (kind, args) in [("compressible-memory", &["32"][..]), ("private-memory", &[])] {
            cases.push(Case::new(format!("later: {kind} comes back ({name})"), move || {
                turn(kind, args, *way)
            }));
        }
    }
    cases.extend(KINDS.iter().map(|(kind, args, (name, way))| {
        Case::new(format!("later: {kind} comes back ({name})"), move || turn(kind, args, *way))
    }));
    let [blocks, pages] = [5, 1].map(|count| Some((Layout::Blocks, count)));
    let [regions, first] = [32, 1].map(|count| Some((Layout::Regions, count)));
    cases.extend([
        Case::new("later: blocks of all kinds", all_kinds),
        Case::new("later: a chain of such sets", move || chain([blocks, pages, blocks])),
        Case::new("later: a chain of both forms", move || chain([first, regions, blocks])),
        Case::new("later: plain dumps on such sets", move || chain([pages, None, None])),
        Case::new("later: such a set on plain dumps", move || chain([None, None, blocks])),
        Case::new("later: a compressed dump on such a set", compressed_on_later),
        Case::new("later: restored lazily", || lazily(odd, false)),
        Case::new("later: restored lazily, single pages", || lazily(first_pages, false)),
        Case::new("later: a page server serves such a set", || lazily(self::blocks, true)),
        Case::new("later: restored behind the tree", in_the_background),
        Case::new("later: damage is found", damaged),
        Case::new("later: what makes no sense or is not known is refused by name", refusals),
    ]);
    cases
}
