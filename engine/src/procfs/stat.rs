//! `/proc/PID/stat`: one line of numbers around a name that may hold any byte.

use super::{ProcDir, number, words};
use crate::{error::Result, pstree::RealPid};

/// What a dump needs of it; see proc_pid_stat(5) for the fields.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stat {
    /// Command name: any bytes but NUL, also blanks, newlines and parentheses.
    pub comm: Vec<u8>,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, `X`, `I` ...
    pub state: u8,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    /// Device number of the controlling terminal, 0 for none.
    pub tty_nr: i32,
    /// Foreground group of that terminal, -1 for none.
    pub tpgid: i32,
    /// `PF_*` of the kernel.
    pub flags: u32,
    pub nice: i32,
    /// Clock ticks after boot.
    pub start_time: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// As waitpid(2) gives it.
    pub exit_code: i32,
}

/// `PF_KTHREAD` in [`Stat::flags`]: a thread of the kernel.
pub const PF_KTHREAD: u32 = 0x0020_0000;
/// `PF_IO_WORKER` in [`Stat::flags`]: a thread of the kernel that works for an io_uring of its process.
pub const PF_IO_WORKER: u32 = 0x10;
/// `PF_FORKNOEXEC` in [`Stat::flags`]: forked and has not executed since.
pub const PF_FORKNOEXEC: u32 = 0x40;
/// `PF_EXITING` in [`Stat::flags`]: on the way out.
pub const PF_EXITING: u32 = 0x4;

/// Whether thread `tid` of a process is one that the kernel has made for an io_uring. Such a one can be traced, but what
/// it does for the program would be interrupted; and it never runs code of the program.
pub fn is_io_worker(dir: &ProcDir, tid: RealPid) -> bool {
    // There are many threads, and names are had at little cost: theirs are iou-wrk-PID and iou-sqp-PID.
    dir.read(&format!("task/{tid}/comm")).is_ok_and(|comm| comm.starts_with(b"iou-"))
        && dir.thread(tid).and_then(|dir| Stat::read(&dir)).is_ok_and(|stat| stat.flags & PF_IO_WORKER != 0)
}

impl Stat {
    /// Reads and parses.
    pub fn read(dir: &ProcDir) -> Result<Self> {
        let bytes = dir.read("stat")?;
        Self::parse(&bytes).ok_or_else(|| dir.strange("stat", &bytes))
    }

    /// Parses the content of the file.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        // The name ends at the last parenthesis: all that follows is numbers.
        let open = bytes.iter().position(|c| *c == b'(')?;
        let close = bytes.iter().rposition(|c| *c == b')')?;
        let comm = bytes.get(open + 1..close)?.to_vec();
        let fields: Vec<&[u8]> = words(&bytes[close + 1..]).collect();
        // Numbers as in the man page: field 3 is the first after the name.
        let field = |n: usize| fields.get(n - 3).copied();
        let int = |n| number::<i32>(field(n)?);
        let long = |n| number::<u64>(field(n)?);
        Some(Stat {
            comm,
            state: *field(3)?.first()?,
            ppid: int(4)?,
            pgid: int(5)?,
            sid: int(6)?,
            tty_nr: int(7)?,
            tpgid: int(8)?,
            flags: number(field(9)?)?,
            nice: int(19)?,
            start_time: long(22)?,
            start_code: long(26)?,
            end_code: long(27)?,
            start_stack: long(28)?,
            start_data: long(45)?,
            end_data: long(46)?,
            start_brk: long(47)?,
            arg_start: long(48)?,
            arg_end: long(49)?,
            env_start: long(50)?,
            env_end: long(51)?,
            exit_code: int(52)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: &str = "S 1 2204 2204 1025 -1 4194304 93 0 0 0 0 0 0 0 20 -5 1 0 124400 2531328 231 \
        18446744073709551615 94500524724224 94500524724673 140722131825888 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 \
        94500524735952 94500524736560 94500592234496 140722131831526 140722131831533 140722131831533 \
        140722131832817 0\n";

    #[test]
    fn fields_are_found() {
        let stat = Stat::parse(format!("2204 (spin) {TAIL}").as_bytes()).unwrap();
        assert_eq!(stat.comm, b"spin");
        assert_eq!((stat.state, stat.ppid, stat.pgid, stat.sid), (b'S', 1, 2204, 2204));
        assert_eq!((stat.tty_nr, stat.tpgid, stat.flags, stat.nice), (1025, -1, 4_194_304, -5));
        assert_eq!(stat.start_time, 124_400);
        assert_eq!(stat.start_code, 94_500_524_724_224);
        assert_eq!(stat.start_stack, 140_722_131_825_888);
        assert_eq!(stat.start_brk, 94_500_592_234_496);
        assert_eq!((stat.env_end, stat.exit_code), (140_722_131_832_817, 0));
    }

    #[test]
    fn hostile_names_do_not_shift_fields() {
        for name in ["a) S 1 2 3", "", ")", "((", "line\nbreak", ") (x) Z"] {
            let stat = Stat::parse(format!("7 ({name}) {TAIL}").as_bytes()).unwrap();
            assert_eq!(stat.comm, name.as_bytes());
            assert_eq!((stat.state, stat.exit_code), (b'S', 0));
        }
        let mut bytes = b"7 (\xff\xfe) ".to_vec();
        bytes.extend(TAIL.as_bytes());
        assert_eq!(Stat::parse(&bytes).unwrap().comm, b"\xff\xfe");
    }

    #[test]
    fn short_content_is_refused() {
        assert_eq!(Stat::parse(b""), None);
        assert_eq!(Stat::parse(b"7 (x) S 1 2"), None);
        assert_eq!(Stat::parse(b")7("), None);
    }
}
