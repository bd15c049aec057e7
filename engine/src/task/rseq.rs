//! Restartable sequences of a thread: where the area is, and what happens to one that is interrupted.

use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result},
    pstree::RealPid,
    sys::{ptrace::RseqConfig, vm},
};

/// Offset of the pointer to the current section in `struct rseq`.
const SECTION: u64 = 8;
/// Offset of the flags in `struct rseq`.
const FLAGS: usize = 16;
/// `RSEQ_CS_FLAG_NO_RESTART_ON_SIGNAL`.
const NO_RESTART_ON_SIGNAL: u32 = 1 << 1;

/// A thread's registration and the section it was stopped in.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rseq {
    /// For the image; `None` where the kernel lacks restartable sequences.
    pub entry: Option<pb::RseqEntry>,
    /// Instruction to go on at, when the thread was stopped inside a section.
    pub abort_ip: Option<u64>,
}

/// Reads the registration of a thread stopped at `ip`. The thread must not have run since: on its way back to
/// its code the kernel clears the pointer to the section.
pub fn dump(tid: RealPid, config: &RseqConfig, ip: u64) -> Result<Rseq> {
    let mut entry = pb::RseqEntry {
        rseq_abi_pointer: config.pointer,
        rseq_abi_size: config.size,
        signature: config.signature,
        rseq_cs_pointer: None,
    };
    if config.pointer == 0 {
        return Ok(Rseq { entry: Some(entry), abort_ip: None });
    }
    let mut area = [0u8; 20];
    vm::read(tid, config.pointer, &mut area).during(|| format!("rseq area of thread {tid}"))?;
    let pointer = word(&area, SECTION as usize);
    if pointer == 0 {
        return Ok(Rseq { entry: Some(entry), abort_ip: None });
    }
    let mut section = [0u8; 32];
    vm::read(tid, pointer, &mut section).during(|| format!("rseq section of thread {tid}"))?;
    let section = Section::parse(&section).during(|| format!("rseq section of thread {tid}"))?;
    let flags = section.flags | half(&area, FLAGS);
    let restarts = flags & NO_RESTART_ON_SIGNAL == 0;
    if !restarts {
        // The program wants to go on inside the section: the restorer gives the pointer back.
        entry.rseq_cs_pointer = Some(pointer);
    }
    let abort_ip = (restarts && section.contains(ip)).then_some(section.abort_ip);
    Ok(Rseq { entry: Some(entry), abort_ip })
}

/// `struct rseq_cs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Section {
    flags: u32,
    start_ip: u64,
    len: u64,
    abort_ip: u64,
}

impl Section {
    fn parse(bytes: &[u8; 32]) -> Result<Self> {
        let version = half(bytes, 0);
        if version != 0 {
            return Err(Error::unsupported(format!("version {version} of rseq sections is not known")));
        }
        Ok(Section {
            flags: half(bytes, 4),
            start_ip: word(bytes, 8),
            len: word(bytes, 16),
            abort_ip: word(bytes, 24),
        })
    }

    fn contains(&self, ip: u64) -> bool {
        ip.wrapping_sub(self.start_ip) < self.len
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// The registration for the restorer. [`pb::RseqEntry::rseq_cs_pointer`] is for whoever stops the thread last:
/// registering clears it.
pub fn restore(entry: Option<&pb::RseqEntry>) -> restorer::args::RseqArea {
    match entry {
        Some(e) if e.rseq_abi_pointer != 0 => {
            restorer::args::RseqArea { addr: e.rseq_abi_pointer, len: e.rseq_abi_size, sig: e.signature }
        }
        _ => restorer::args::RseqArea::default(),
    }
}

/// Gives up the area that our own libc has registered for the calling thread, the only one.
///
/// # Errors
/// Only if there is one and it cannot be given up.
pub fn forget_own() -> Result<()> {
    crate::sys::rseq::unregister_own()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> RealPid {
        RealPid(std::process::id() as i32)
    }

    /// Areas in our own memory stand for those of a stopped thread.
    #[allow(clippy::field_reassign_with_default)] // a field is private
    fn dump_of(version: u32, area_flags: u32, ip: u64) -> Result<Rseq> {
        let mut section = [0u8; 32];
        section[..4].copy_from_slice(&version.to_ne_bytes());
        for (at, value) in [(8, 0x1000u64), (16, 0x10), (24, 0x2000)] {
            section[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
        let mut area = [0u8; 32];
        area[8..16].copy_from_slice(&(section.as_ptr() as u64).to_ne_bytes());
        area[16..20].copy_from_slice(&area_flags.to_ne_bytes());
        let mut config = RseqConfig::default();
        config.pointer = area.as_ptr() as u64;
        config.size = 32;
        dump(me(), &config, ip)
    }

    #[test]
    fn inside_a_section_the_thread_goes_to_the_abort_handler() {
        let inside = dump_of(0, 0, 0x100f).unwrap();
        assert_eq!(inside.abort_ip, Some(0x2000));
        assert_eq!(inside.entry.unwrap().rseq_cs_pointer, None);
        for ip in [0xfff, 0x1010] {
            assert_eq!(dump_of(0, 0, ip).unwrap().abort_ip, None);
        }
    }

    #[test]
    fn a_section_that_survives_signals_is_kept() {
        let kept = dump_of(0, NO_RESTART_ON_SIGNAL, 0x1000).unwrap();
        assert_eq!(kept.abort_ip, None);
        assert!(kept.entry.unwrap().rseq_cs_pointer.is_some());
        assert!(dump_of(7, 0, 0x1000).unwrap_err().to_string().contains("version 7"));
    }

    #[test]
    fn without_a_registration_nothing_is_read() {
        let none = dump(me(), &RseqConfig::default(), 0).unwrap();
        assert_eq!((none.entry.unwrap().rseq_abi_pointer, none.abort_ip), (0, None));
    }
}
