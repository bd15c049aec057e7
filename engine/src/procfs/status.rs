//! `/proc/PID/status`: labelled lines; the kernel escapes what could break a line.

use super::{ProcDir, number, trim, words};
use crate::error::Result;
use crate::pstree::RealPid;

/// What a dump needs of it; see proc_pid_status(5). Bits are those of the kernel's masks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    pub umask: u32,
    pub state: u8,
    pub tgid: i32,
    pub ppid: i32,
    /// Thread that traces this one, 0 for none.
    pub tracer: i32,
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    /// Real, effective, saved, file system.
    pub gid: [u32; 4],
    pub groups: Vec<u32>,
    /// Thread ids from our namespace inwards; empty before Linux 4.1.
    pub nspid: Vec<i32>,
    pub nstgid: Vec<i32>,
    pub nspgid: Vec<i32>,
    pub nssid: Vec<i32>,
    /// Kernel thread (line of Linux 6.9).
    pub kthread: bool,
    pub threads: u32,
    pub sig_pending: u64,
    pub shared_pending: u64,
    pub sig_blocked: u64,
    pub sig_ignored: u64,
    pub sig_caught: u64,
    pub cap_inh: u64,
    pub cap_prm: u64,
    pub cap_eff: u64,
    pub cap_bnd: u64,
    pub cap_amb: u64,
    pub no_new_privs: bool,
    /// 0 off, 1 strict, 2 filter.
    pub seccomp: u32,
    /// CPUs it may run on, those that are offline too: bit 0 of byte 0 is CPU 0. No zero bytes at the end.
    pub cpus: Vec<u8>,
    /// NUMA nodes its control group allows, in the same form.
    pub nodes: Vec<u8>,
    /// Address bits that count (linear address masking, Linux 6.4); `None` where the kernel does not tell.
    pub untag_mask: Option<u64>,
    /// `x86_Thread_features`: names of user shadow stack features that are on.
    pub thread_features: Vec<String>,
}

impl Status {
    /// Reads and parses.
    pub fn read(dir: &ProcDir) -> Result<Self> {
        let bytes = dir.read("status")?;
        Self::parse(&bytes).ok_or_else(|| dir.strange("status", &bytes))
    }

    /// Of thread `tid` of the task `dir` is of.
    pub fn read_thread(dir: &ProcDir, tid: RealPid) -> Result<Self> {
        let name = format!("task/{tid}/status");
        let bytes = dir.read(&name)?;
        Self::parse(&bytes).ok_or_else(|| dir.strange(&name, &bytes))
    }

    /// Parses the content of the file.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut status = Status::default();
        let mut seen = 0;
        for line in bytes.split(|c| *c == b'\n') {
            let Some(colon) = line.iter().position(|c| *c == b':') else { continue };
            let value = &line[colon + 1..];
            let word = trim(value);
            match &line[..colon] {
                b"Umask" => status.umask = u32::from_str_radix(std::str::from_utf8(word).ok()?, 8).ok()?,
                b"State" => status.state = *word.first()?,
                b"Tgid" => status.tgid = number(word)?,
                b"PPid" => status.ppid = number(word)?,
                b"TracerPid" => status.tracer = number(word)?,
                b"Uid" => status.uid = four(value)?,
                b"Gid" => status.gid = four(value)?,
                b"Groups" => status.groups = list(value)?,
                b"NSpid" => status.nspid = list(value)?,
                b"NStgid" => status.nstgid = list(value)?,
                b"NSpgid" => status.nspgid = list(value)?,
                b"NSsid" => status.nssid = list(value)?,
                b"Kthread" => status.kthread = word == b"1",
                b"Threads" => status.threads = number(word)?,
                b"SigPnd" => status.sig_pending = super::hex(word)?,
                b"ShdPnd" => status.shared_pending = super::hex(word)?,
                b"SigBlk" => status.sig_blocked = super::hex(word)?,
                b"SigIgn" => status.sig_ignored = super::hex(word)?,
                b"SigCgt" => status.sig_caught = super::hex(word)?,
                b"CapInh" => status.cap_inh = super::hex(word)?,
                b"CapPrm" => status.cap_prm = super::hex(word)?,
                b"CapEff" => status.cap_eff = super::hex(word)?,
                b"CapBnd" => status.cap_bnd = super::hex(word)?,
                b"CapAmb" => status.cap_amb = super::hex(word)?,
                b"NoNewPrivs" => status.no_new_privs = word == b"1",
                b"Seccomp" => status.seccomp = number(word)?,
                b"Cpus_allowed" => status.cpus = bits(word)?,
                b"Mems_allowed" => status.nodes = bits(word)?,
                b"untag_mask" => {
                    let digits = std::str::from_utf8(word).ok()?.strip_prefix("0x")?;
                    status.untag_mask = Some(u64::from_str_radix(digits, 16).ok()?);
                }
                b"x86_Thread_features" => {
                    status.thread_features =
                        words(value).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
                    continue;
                }
                _ => continue,
            }
            seen += 1;
        }
        // Every kernel in question has at least state, ids, signals and capabilities.
        (seen >= 15 && status.state != 0).then_some(status)
    }

    /// Whether the task has ended.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// A mask as the kernel prints it: words of 32 bits in hexadecimal, the highest first, commas between.
fn bits(word: &[u8]) -> Option<Vec<u8>> {
    let words: Option<Vec<u32>> =
        word.rsplit(|c| *c == b',').map(|w| u32::try_from(super::hex(w)?).ok()).collect();
    let mut bytes: Vec<u8> = words?.into_iter().flat_map(u32::to_le_bytes).collect();
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Some(bytes)
}

fn list<T: std::str::FromStr>(value: &[u8]) -> Option<Vec<T>> {
    words(value).map(number).collect()
}

fn four(value: &[u8]) -> Option<[u32; 4]> {
    list(value)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "Name:\tweird\\nState:\\tX\nUmask:\t0027\nState:\tt (tracing stop)\nTgid:\t42\nNgid:\t0\n\
        Pid:\t43\nPPid:\t1\nTracerPid:\t77\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t256\n\
        Groups:\t10 20 30 \nNStgid:\t42\t7\nNSpid:\t43\t8\nNSpgid:\t42\t7\nNSsid:\t42\t0\nKthread:\t0\n\
        VmPeak:\t    2472 kB\nThreads:\t2\nSigQ:\t0/96365\nSigPnd:\t0000000000000001\n\
        ShdPnd:\t8000000000000000\nSigBlk:\t0000000000010000\nSigIgn:\t0000000000001000\n\
        SigCgt:\t0000000180004202\nCapInh:\t0000000000000000\nCapPrm:\t000001ffff00003f\n\
        CapEff:\t000001ffff00003f\nCapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n\
        Seccomp:\t2\nSeccomp_filters:\t3\nSpeculation_Store_Bypass:\tthread vulnerable\n\
        untag_mask:\t0xffffffffffffffff\nCpus_allowed:\t00000000,000000f1,00000003\n\
        x86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\t\n";

    #[test]
    fn lines_are_found_by_label() {
        let s = Status::parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!((s.umask, s.state, s.tgid, s.ppid, s.tracer), (0o27, b't', 42, 1, 77));
        assert_eq!((s.uid, s.gid), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert_eq!((s.groups, s.nspid, s.nssid), (vec![10, 20, 30], vec![43, 8], vec![42, 0]));
        assert_eq!((s.sig_pending, s.shared_pending, s.sig_blocked), (1, 1 << 63, 1 << 16));
        assert_eq!((s.cap_prm, s.cap_bnd), (0x1ff_ff00_003f, 0x1ff_ffff_ffff));
        assert!(s.no_new_privs && !s.kthread);
        assert_eq!((s.seccomp, s.threads), (2, 2));
        assert_eq!(s.thread_features, ["shstk", "wrss"]);
        assert_eq!((s.cpus.as_slice(), s.nodes.len()), (&[3, 0, 0, 0, 0xf1][..], 0));
        assert_eq!(s.untag_mask, Some(u64::MAX));
    }

    #[test]
    fn what_is_no_status_is_refused() {
        assert_eq!(Status::parse(b""), None);
        assert_eq!(Status::parse(SAMPLE.replace("Uid:\t1", "Uid:\tx").as_bytes()), None);
        assert_eq!(Status::parse(SAMPLE.replace("Uid:\t1\t2", "Uid:\t1").as_bytes()), None);
    }
}
