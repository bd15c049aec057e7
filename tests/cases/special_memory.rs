//! Memory that needs something of the system: huge pages, asynchronous I/O, System V segments.

use std::fs;

use anyhow::{Context, Result};
use rcriu_tests::{Case, Cycle, Images, Program, runner::skip};

use crate::kinds::{Kind, all, kind};
use crate::refusals::refused;

pub const KINDS: &[Kind] = &[
    kind("rings of asynchronous I/O keep their events and go on", "aio", &[]),
    kind("System V shared memory keeps content, key and users", "sysv", &[]).beyond_criu(),
    kind("guard pages inside mappings stay", "guard-pages", &[]),
    kind("droppable memory stays, with or without its content", "droppable-memory", &[]).beyond_criu(),
    kind("shared anonymous memory open as a file stays one", "shared-memory-as-file", &[]),
];

/// A setting of the system, put back at the end.
struct Setting {
    file: String,
    before: String,
}

impl Setting {
    /// Sets `file` to `value`; skips where that is not possible.
    fn new(file: String, value: u64) -> Result<Setting> {
        let before = fs::read_to_string(&file).map_err(|e| skip(format!("{file}: {e}")))?;
        let setting = Setting { file, before };
        fs::write(&setting.file, value.to_string()).map_err(|e| skip(format!("{}: {e}", setting.file)))?;
        let got: u64 = fs::read_to_string(&setting.file)?.trim().parse().context("not a number")?;
        if got == value { Ok(setting) } else { Err(skip(format!("{} stays at {got}", setting.file))) }
    }

    /// Enough huge pages of `kib` KiB for the program.
    fn pool(kib: u64) -> Result<Setting> {
        // Pages above 2 MiB cannot be taken from ordinary memory when they are wanted.
        let name = if kib > 2048 { "nr_hugepages" } else { "nr_overcommit_hugepages" };
        Setting::new(pool(kib, name), 12)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(&self.file, self.before.trim());
    }
}

fn pool(kib: u64, name: &str) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/{name}")
}

/// A turn of the program in huge pages of 2 to the power of `shift` bytes.
fn huge(shift: u32, left_running: bool, turns: u32) -> Result<()> {
    let _pool = Setting::pool(1 << (shift - 10))?;
    let program = Program::start("huge-memory", &[&shift.to_string()])?;
    if left_running {
        Cycle::new()?.leave_running(&program)?;
    }
    for turn in 1..=turns {
        Cycle::new()?.turn(&program).with_context(|| format!("turn {turn}"))?;
    }
    program.verify()
}

/// Where the system forbids io_uring a restore says so before anything is made.
fn forbidden_io_uring() -> Result<()> {
    if !std::path::Path::new("/proc/sys/kernel/io_uring_disabled").exists() {
        return Err(skip("kernel.io_uring_disabled (Linux 6.6)"));
    }
    let program = Program::start("io-uring", &[])?;
    let (cycle, images) = (Cycle::new()?, Images::new()?);
    cycle.dump(&program, &images)?;
    let forbidden = Setting::new("/proc/sys/kernel/io_uring_disabled".into(), 2)?;
    cycle.try_restore(&images, &[])?.refused()?.says(&["io_uring_disabled"])?;
    drop(forbidden);
    cycle.restore(&images)?;
    program.verify()
}

/// A restore that finds the pool too small says so before anything is made.
fn too_few_huge_pages() -> Result<()> {
    let enough = Setting::pool(2048)?;
    let program = Program::start("huge-memory", &[])?;
    let (cycle, images) = (Cycle::new()?, Images::new()?);
    cycle.dump(&program, &images)?;
    let none = [
        Setting::new(pool(2048, "nr_overcommit_hugepages"), 0)?,
        Setting::new(pool(2048, "nr_hugepages"), 1)?,
    ];
    cycle.try_restore(&images, &[])?.refused()?.says(&["huge pages of 2 MiB", "nr_hugepages"])?;
    drop(none);
    fs::write(&enough.file, "12")?;
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let named = |name: &str, body: fn() -> Result<()>| Case::new(format!("memory: {name}"), body).alone();
    let mut cases = vec![
        named("huge pages keep content, size and sharing (without dump)", || huge(21, false, 0)),
        named("huge pages keep content, size and sharing", || huge(21, false, 1)),
        named("huge pages keep content, size and sharing (left running)", || huge(21, true, 0)),
        named("huge pages keep content, size and sharing (three turns)", || huge(21, false, 3)),
        named("huge pages of 1 GiB keep content, size and sharing", || huge(30, false, 1)),
        named("a pool of huge pages that is too small is named", too_few_huge_pages),
    ];
    cases.extend([
        named("an io_uring where the system forbids it is refused by name", forbidden_io_uring),
        named("secret memory is refused by name", || {
            refused(&Program::start("secret-memory", &[])?, &[], &["memfd_secret"])
        }),
        named("System V memory attached outside of the tree is refused by name", || {
            let key = (0x5244_0000 | std::process::id() & 0xffff).to_string();
            let (program, outside) =
                (Program::start("sysv-holder", &[&key])?, Program::start("sysv-holder", &[&key])?);
            refused(&program, &[], &["System V shared memory", "outside of the tree"])?;
            outside.verify()
        }),
        named("System V memory that somebody uses is named by a restore", || {
            let key = (0x5245_0000 | std::process::id() & 0xffff).to_string();
            let program = Program::start("sysv-holder", &[&key])?;
            let (cycle, images) = (Cycle::new()?, Images::new()?);
            cycle.dump(&program, &images)?;
            let other = Program::start("sysv-holder", &[&key])?;
            cycle.try_restore(&images, &[])?.refused()?.says(&["System V shared memory", "in use"])?;
            other.verify()?;
            // Its user has removed it: it is made again.
            cycle.restore(&images)?;
            program.verify()
        }),
    ]);
    cases.extend(all("memory", KINDS));
    cases
}
