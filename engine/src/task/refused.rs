//! State of threads that is rare, that no image can hold, and that would otherwise be lost without a word.

use parasite::task::TaskInfo;

use crate::{
    error::{Error, Result},
    procfs::status::Status,
    pstree::RealPid,
    sys::{ptrace, sched},
};

/// `NT_386_IOPERM`: the map of ports that a thread may use.
const NT_386_IOPERM: u32 = 0x201;

/// What has to be known to look.
#[derive(Debug)]
pub struct Refusals {
    /// The core scheduling cookie that restored threads will have from us; `None` without core scheduling.
    own_cookie: Option<u64>,
}

impl Refusals {
    /// Asks about this process.
    pub fn ask() -> Refusals {
        Refusals { own_cookie: sched::core_cookie(RealPid(nix::unistd::gettid().as_raw())).ok() }
    }

    /// Refuses what the process as a whole has.
    pub fn process(&self, info: &TaskInfo) -> Result<()> {
        if info.ldt > 0 {
            return Err(Error::unsupported("local segment descriptors (modify_ldt) cannot be kept")
                .remedy("programs of 16 and 32 bits under wine or dosemu use them"));
        }
        Ok(())
    }

    /// Refuses what a thread has.
    pub fn thread(&self, tid: RealPid, status: &Status) -> Result<()> {
        let refuse =
            |what: &str| Err(Error::unsupported(format!("thread {tid} {what}, which cannot be kept")));
        if status.untag_mask.is_some_and(|mask| mask != u64::MAX) {
            return refuse("uses addresses with tags (linear address masking)");
        }
        if !status.thread_features.is_empty() {
            return refuse("has a user shadow stack");
        }
        if has_ports(tid)? {
            return refuse("may use I/O ports (ioperm)");
        }
        if let Some(own) = self.own_cookie
            && sched::core_cookie(tid)? != own
        {
            return refuse("has a core scheduling cookie (PR_SCHED_CORE)");
        }
        Ok(())
    }
}

fn has_ports(tid: RealPid) -> Result<bool> {
    // 65,536 bits.
    let mut map = [0u8; 8192];
    match ptrace::get_regset(tid, NT_386_IOPERM, &mut map) {
        Ok(len) => Ok(len > 0),
        Err(e) if matches!(e.errno(), Some(libc::ENXIO | libc::ENODEV | libc::EINVAL | libc::EIO)) => {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}
