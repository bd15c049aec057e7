//! The ways that pages take into the images: `page-path KIND [MIB]`. Memory with pages full of zeros in between,
//! pages that cannot be read, and a process that may or may not write them to a file itself.
//!
//! # Safety
//!
//! setrlimit(2) gets a structure on this stack.

use anyhow::{Context, bail};

use crate::kit::mem::{Mapping, PAGE, anon};
use crate::kit::{Check, number, rest, sys};

/// Every page of this distance was written with zeros; the ones before are without content.
const ZERO: usize = 7;

fn fill(m: Mapping) {
    for i in 0..m.len / PAGE {
        match i % ZERO {
            0 => m.pages(i, 1).clear(),
            1 => {}
            _ => _ = m.pages(i, 1).fill(i as u64),
        }
    }
}

fn check(m: Mapping) -> Check {
    (0..m.len / PAGE).try_for_each(|i| match i % ZERO {
        0 | 1 => m.pages(i, 1).check_zero("page without content"),
        _ => m.pages(i, 1).check("page with content", i as u64),
    })
}

fn limit(resource: libc::__rlimit_resource_t, value: u64) -> Check {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: `limit` outlives the call.
    sys("setrlimit", unsafe { libc::setrlimit(resource, &limit) }).map(drop)
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    let memory = anon(number(args, 1, 24)? << 20)?;
    fill(memory);
    // In the middle of what is read: not readable, and read-only.
    let (hidden, fixed) = (memory.pages(1024, 64), memory.pages(2048, 64));
    hidden.protect(libc::PROT_NONE)?;
    fixed.protect(libc::PROT_READ)?;
    let open = || std::fs::read_dir("/proc/self/fd").map(|d| d.count() as u64 - 1).context("/proc/self/fd");
    match args.first().map(String::as_str) {
        Some("plain") => {}
        Some("file-limit") => limit(libc::RLIMIT_FSIZE, 1 << 20)?,
        Some("full-table") => limit(libc::RLIMIT_NOFILE, open()?)?,
        other => bail!("unknown kind {other:?}"),
    }
    rest()?;
    hidden.protect(libc::PROT_READ)?;
    check(memory)
}
