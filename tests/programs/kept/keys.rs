//! Memory protection keys, and memory that can only be executed.
//!
//! # Safety
//!
//! Raw calls with ranges this program mapped and keeps to its end; instructions that read and write the register of
//! access rights, which the processor has once a key was given out.

use std::arch::asm;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;

use crate::kit::mem::{self, Mapping, PAGE};
use crate::kit::{Check, same, skip, sys, team};

/// What the process has.
struct Keyed {
    /// Memory with a pattern, and its key.
    secret: (Mapping, i32),
    /// The same, shared.
    shared: (Mapping, i32),
    /// The key of this one is free again.
    freed: (Mapping, i32),
    /// Can only be executed: code that gives 42. Its key is the kernel's own.
    code: Mapping,
    /// The same with a key of ours.
    other_code: (Mapping, i32),
    /// The next key that would be given out.
    next: i32,
}

static KEYED: OnceLock<Keyed> = OnceLock::new();

fn keyed() -> Result<&'static Keyed> {
    KEYED.get().context("the keys")
}

fn alloc() -> Result<i32> {
    // SAFETY: integers.
    match sys("pkey_alloc", unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) }) {
        Err(e) if matches!(e.downcast_ref(), Some(Errno::ENOSPC | Errno::ENOSYS | Errno::EINVAL)) => {
            Err(skip("the processor has no memory protection keys"))
        }
        other => Ok(other? as i32),
    }
}

fn free(key: i32) -> Check {
    // SAFETY: integers.
    sys("pkey_free", unsafe { libc::syscall(libc::SYS_pkey_free, key) }).map(drop)
}

fn protect(memory: Mapping, prot: i32, key: i32) -> Result<Mapping> {
    // SAFETY: a range of ours that stays.
    sys("pkey_mprotect", unsafe {
        libc::syscall(libc::SYS_pkey_mprotect, memory.at, memory.len, prot, key)
    })?;
    Ok(memory)
}

/// The calling thread's rights: two bits for each key.
fn rights() -> u32 {
    let rights: u32;
    // SAFETY: there are keys.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _) };
    rights
}

fn set_rights(rights: u32) {
    // SAFETY: there are keys; of memory with other keys than the first only this program's own is touched.
    unsafe { asm!("wrpkru", in("eax") rights, in("ecx") 0, in("edx") 0) };
}

/// `mov eax, 42; ret`.
fn code() -> Result<Mapping> {
    let code = mem::anon(PAGE)?;
    // SAFETY: writable memory of ours.
    unsafe { std::ptr::copy_nonoverlapping([0xb8, 42, 0, 0, 0, 0xc3].as_ptr(), code.at as *mut u8, 6) };
    Ok(code)
}

fn run(code: Mapping) -> i32 {
    // SAFETY: that code is there, which touches no memory.
    unsafe { std::mem::transmute::<usize, extern "C" fn() -> i32>(code.at)() }
}

/// Protection and key of the mapping that begins at `at`, as smaps tells.
fn told(at: usize) -> Result<(String, i32)> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&format!("{at:x}-")));
    let prot = lines.next().and_then(|l| l.split(' ').nth(1)).context("the mapping")?.to_owned();
    let key = lines.find_map(|l| l.strip_prefix("ProtectionKey:")).context("its key")?;
    Ok((prot, key.trim().parse()?))
}

fn set_up() -> Result<Keyed> {
    let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    let (freed, secret) = (alloc()?, alloc()?);
    // The kernel's own key comes third.
    let code_only = code()?;
    // SAFETY: a range of ours that stays.
    sys("mprotect", unsafe { libc::mprotect(code_only.at as *mut _, PAGE, exec) })?;
    let (shared, execute) = (alloc()?, alloc()?);
    same("keys", [freed, secret, shared, execute], [1, 2, 4, 5])?;
    let memory = [mem::anon(8 * PAGE)?, mem::shared(4 * PAGE)?, mem::anon(3 * PAGE)?];
    for (seed, memory) in (1..).zip(&memory) {
        memory.fill(seed);
    }
    let keyed = Keyed {
        secret: (protect(memory[0], read | write, secret)?, secret),
        shared: (protect(memory[1], read | write, shared)?, shared),
        freed: (protect(memory[2], read, freed)?, freed),
        code: code_only,
        other_code: (protect(code()?, exec, execute)?, execute),
        next: freed,
    };
    free(freed)?;
    Ok(keyed)
}

/// Threads have different rights to the same memory. None of them may read all.
pub fn keys(_: &[String]) -> Check {
    let _ = KEYED.set(set_up()?);
    let set = |thread: usize| -> Result<u32> {
        let keyed = keyed()?;
        let (secret, shared) = (keyed.secret.1 * 2, keyed.shared.1 * 2);
        set_rights(match thread {
            0 => 0x5555_5554,
            1 => 1 << secret | 2 << shared,
            _ => 1 << shared | 2 << secret | 0x4000_0000,
        });
        Ok(rights())
    };
    let check = |thread: usize, before: u32| -> Check {
        same("rights", rights(), before)?;
        if thread > 0 { Ok(()) } else { look(keyed()?) }
    };
    team::run(2, set, check)
}

fn look(keyed: &Keyed) -> Check {
    for (what, mapping, prot, key) in [
        ("private memory", keyed.secret.0, "rw-p", keyed.secret.1),
        ("shared memory", keyed.shared.0, "rw-s", keyed.shared.1),
        ("memory whose key is free", keyed.freed.0, "r--p", keyed.freed.1),
        ("code", keyed.code, "--xp", 3),
        ("code with a key", keyed.other_code.0, "--xp", keyed.other_code.1),
    ] {
        same(what, told(mapping.at)?, (prot.to_owned(), key))?;
    }
    same("what code gives", (run(keyed.code), run(keyed.other_code.0)), (42, 42))?;
    // The kernel's own is nobody's to use.
    match protect(keyed.freed.0, libc::PROT_READ, 3) {
        Err(e) if e.downcast_ref() == Some(&Errno::EINVAL) => {}
        other => bail!("the key of code that can only be executed gave {other:?}"),
    }
    set_rights(0);
    keyed.secret.0.check("private memory", 1)?;
    keyed.shared.0.check("shared memory", 2)?;
    keyed.freed.0.check("memory whose key is free", 3)?;
    let next = [alloc()?, alloc()?];
    ensure!(next == [keyed.next, 6], "the next keys are {next:?}, not {} and 6", keyed.next);
    next.into_iter().try_for_each(free)
}

/// Memory that can only be executed, without any key of the program's.
pub fn execute_only(_: &[String]) -> Check {
    let all = mem::anon(4 * PAGE)?;
    all.fill(1);
    let (front, only) = (all.pages(0, 2), all.pages(2, 2));
    // SAFETY: writable memory of ours.
    unsafe { std::ptr::copy_nonoverlapping([0xb8, 42, 0, 0, 0, 0xc3].as_ptr(), only.at as *mut u8, 6) };
    // SAFETY: a range of ours that stays.
    sys("mprotect", unsafe { libc::mprotect(only.at as *mut _, only.len, libc::PROT_EXEC) })?;
    let key = || told(only.at).or_else(|_| Ok::<_, anyhow::Error>(("--xp".to_owned(), 0)));
    let before = key()?;
    crate::kit::rest()?;
    same("protection and key", key()?, before)?;
    same("what it gives", run(only), 42)?;
    front.check("the memory before it", 1)
}
