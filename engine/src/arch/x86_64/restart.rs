//! What a stop does to the system call a thread is in, and how the call goes on.
//!
//! A thread that is stopped inside a call leaves the call first: rax holds one of the values below, and the
//! kernel acts on it when the thread goes on. As long as it is only stopped, that is all there is to it. A thread
//! in an image has nobody to act on it: its registers are *settled*, so that they say the same by themselves.
//!
//! | rax | which calls | thread goes on | in an image |
//! |---|---|---|---|
//! | -512, -513, -514 | all that end by an event: read, wait4, pause, flock, accept ... Those with a point in time as their end (clock_nanosleep, mq_timedreceive, futex_waitv). ppoll, select and pselect6, which keep what is left in the caller's memory | made again | at the instruction, to be made again: nothing is lost |
//! | -516 | nanosleep, clock_nanosleep, poll and futex with a timeout: the kernel has the end | restart_syscall(2), with the time that is left | made again: a timeout counts from then on, unless it is a point in time |
//! | -EINTR | [`CUT_SHORT`]: what signal(7) lists as failing after SIGSTOP and SIGCONT too, with nothing done | made again, as with -514 | likewise |
//! | any other | the call is over | | |
//!
//! A call that goes on by restart_syscall(2) has that number from then on: which it was has to be found out
//! again ([`Regs::origin`]) before it can be made again.

use super::Regs;

/// `-errno` values with which the kernel marks an interrupted call that it will start again.
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

/// libc does not have it for x86_64.
const SYS_IO_PGETEVENTS: i64 = 333;

/// Calls that a stop ends with EINTR although they have done nothing yet, so that they can be made again. With
/// a timeout set on the socket those that receive, accept, send and connect; select, pselect6 and ppoll where
/// they may not write what is left of their timeout.
const CUT_SHORT: [i64; 20] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_ppoll,
];

/// The same on sockets; what other files mean by EINTR here only their drivers know.
const CUT_SHORT_ON_SOCKETS: [i64; 4] = [libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev];

/// Calls that the kernel restarts through a restart block.
const TIMED: [i64; 4] = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];

/// No pointer is below (`vm.mmap_min_addr` is 64 KiB).
const LOWEST_POINTER: u64 = 0x1_0000;
/// Clocks of processes and threads have negative numbers; of the others there are a dozen.
const CLOCKS: i32 = 16;
/// Descriptors that nobody polls at once: pointers are larger.
const MANY: u64 = 1 << 20;

/// What becomes of the system call a thread was stopped in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupted {
    /// It was in none, or the call had its result already.
    No,
    /// It is made again from its instruction.
    Restarts,
    /// It waits with a timeout that only the kernel knows the rest of. Made again it waits for the whole of it.
    Timed,
    /// The same, but which call it was is not known: in an image it returns EINTR.
    Unknown,
}

/// A guess at what a call was that goes by the number of restart_syscall(2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// This one.
    Call(i64),
    /// The arguments fit several: where in the kernel it waits tells.
    Unclear,
}

impl Regs {
    /// Whether a stop interrupted a call, judged as the kernel does on the way back to user code.
    pub fn interrupted(&self) -> Interrupted {
        if (self.orig_rax as i64) < 0 {
            return Interrupted::No;
        }
        match -(self.rax as i64) {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::Restarts,
            ERESTART_RESTARTBLOCK if self.is_resumed() => Interrupted::Unknown,
            ERESTART_RESTARTBLOCK => Interrupted::Timed,
            _ => Interrupted::No,
        }
    }

    /// Has the kernel make a call again that our stop ended with EINTR, unless a signal handler runs
    /// first. A timeout relative to the call's start begins anew. True if there was such a call.
    ///
    /// `is_socket` is asked about the descriptor of a call that others than sockets may end like this.
    pub fn make_again(&mut self, is_socket: impl FnOnce(i32) -> bool) -> bool {
        let nr = self.orig_rax as i64;
        let cut = self.rax == -i64::from(libc::EINTR) as u64
            && (CUT_SHORT.contains(&nr) || CUT_SHORT_ON_SOCKETS.contains(&nr) && is_socket(self.rdi as i32));
        if cut {
            self.rax = -ERESTARTNOHAND as u64;
        }
        cut
    }

    /// Has the kernel make a timed call again as it was, instead of restart_syscall(2): with its whole timeout,
    /// or, where the call is not known, returning EINTR.
    pub fn begin_anew(&mut self) {
        self.rax = match self.interrupted() {
            Interrupted::Timed => -ERESTARTNOHAND,
            _ => -i64::from(libc::EINTR),
        } as u64;
    }

    /// Whether the interrupted call goes by the number of restart_syscall(2), having been interrupted before.
    pub fn is_resumed(&self) -> bool {
        self.orig_rax == libc::SYS_restart_syscall as u64 && -(self.rax as i64) == ERESTART_RESTARTBLOCK
    }

    /// Which call it was that goes by the number of restart_syscall(2), from what its instruction follows
    /// (`code`, the bytes up to the instruction after it) and its arguments. `None`: it fits no call.
    pub fn origin(&self, code: &[u8]) -> Option<Origin> {
        // mov $number, %eax; syscall
        if let Some((head, &super::SYSCALL_INSN)) = code.split_last_chunk()
            && let Some((head, number)) = head.split_last_chunk()
            && head.last() == Some(&0xb8)
        {
            let number = i64::from(u32::from_le_bytes(*number));
            if TIMED.contains(&number) {
                return Some(Origin::Call(number));
            }
        }
        let mut fit = TIMED.into_iter().filter(|nr| self.fits(*nr));
        match (fit.next(), fit.next()) {
            (Some(nr), None) => Some(Origin::Call(nr)),
            (Some(_), Some(_)) => Some(Origin::Unclear),
            _ => None,
        }
    }

    /// As [`Regs::origin`], from the kernel function it waits in (`/proc/TID/wchan`). The functions of sleeping
    /// count as the scheduler's, so that their callers are named instead.
    pub fn origin_by_place(&self, place: &str) -> Option<i64> {
        let calls: &[i64] = match place {
            "" | "0" => &[],
            _ if place.starts_with("futex") => &[libc::SYS_futex],
            _ if place.contains("poll") => &[libc::SYS_poll],
            _ => &[libc::SYS_nanosleep, libc::SYS_clock_nanosleep],
        };
        calls.iter().copied().find(|nr| self.fits(*nr))
    }

    /// Whether the arguments can be those of a timed call, which the kernel had accepted.
    fn fits(&self, nr: i64) -> bool {
        let pointer = |at: u64| (LOWEST_POINTER..super::TASK_SIZE).contains(&at);
        // Of a C int the upper half is zero or the sign.
        let int = |word: u64| [0, word as i32 as u64 >> 32].contains(&(word >> 32)).then_some(word as i32);
        match nr {
            libc::SYS_nanosleep => {
                // The number of a process's clock could be a low address.
                pointer(self.rdi)
                    && (self.rsi == 0 || pointer(self.rsi))
                    && !self.fits(libc::SYS_clock_nanosleep)
            }
            libc::SYS_clock_nanosleep => {
                let flags = self.rsi as u32 & libc::TIMER_ABSTIME.cast_unsigned();
                int(self.rdi).is_some_and(|clock| clock < CLOCKS) && flags == 0 && pointer(self.rdx)
            }
            libc::SYS_poll => {
                let set = pointer(self.rdi) || self.rsi as u32 == 0;
                let some = self.rsi < MANY && int(self.rdx).is_some_and(|timeout| timeout != 0);
                set && some
            }
            libc::SYS_futex => {
                let command = self.rsi as i32 & libc::FUTEX_CMD_MASK;
                pointer(self.rdi)
                    && self.rdi.is_multiple_of(4)
                    && self.rsi < 0x200
                    && [libc::FUTEX_WAIT, libc::FUTEX_WAIT_BITSET].contains(&command)
                    && pointer(self.r10)
            }
            _ => false,
        }
    }

    /// Registers for an image or a signal frame, where nobody will restart a call any more: an
    /// interrupted call is set up to be made again. A thread that is cured gets its registers unchanged
    /// instead, and the kernel restarts it with the time that is left.
    pub fn settle(&mut self) -> Interrupted {
        let what = self.interrupted();
        match what {
            Interrupted::No => {}
            Interrupted::Restarts | Interrupted::Timed => {
                self.rax = self.orig_rax;
                self.rip = self.rip.wrapping_sub(super::SYSCALL_INSN.len() as u64);
            }
            Interrupted::Unknown => self.rax = -i64::from(libc::EINTR) as u64,
        }
        what
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTR: u64 = 0x7f00_0000_1000;

    fn at(rax: i64, orig_rax: i64) -> Regs {
        let (rdi, rip) = (PTR, 0x1000);
        Regs { rax: rax as u64, orig_rax: orig_rax as u64, rip, rdi, ..Regs::default() }
    }

    #[test]
    fn interrupted_calls_are_settled() {
        // What the kernel leaves, in which call, and what becomes of it.
        for (rax, nr, expect) in [
            (-512, libc::SYS_read, Interrupted::Restarts),
            (-513, libc::SYS_clone, Interrupted::Restarts),
            (-514, libc::SYS_ppoll, Interrupted::Restarts),
            (-516, libc::SYS_nanosleep, Interrupted::Timed),
            (-516, libc::SYS_clock_nanosleep, Interrupted::Timed),
            (-516, libc::SYS_poll, Interrupted::Timed),
            (-516, libc::SYS_futex, Interrupted::Timed),
        ] {
            let before = at(rax, nr);
            let mut after = before;
            assert_eq!(after.settle(), expect);
            assert_eq!(after, Regs { rax: nr as u64, rip: before.rip - 2, ..before });
        }
        let mut lost = at(-516, libc::SYS_restart_syscall);
        assert_eq!(lost.settle(), Interrupted::Unknown);
        assert_eq!(lost, at(-4, libc::SYS_restart_syscall));
        // The same value outside a call, and a finished call.
        for (rax, orig_rax) in [(-512, -1), (-516, -1), (5, 0), (-4, 0)] {
            let mut after = at(rax, orig_rax);
            assert_eq!(after.settle(), Interrupted::No);
            assert_eq!(after, at(rax, orig_rax));
        }
    }

    #[test]
    fn only_calls_that_did_nothing_are_made_again() {
        let mut epoll = at(-4, libc::SYS_epoll_wait);
        assert!(epoll.make_again(|_| false));
        assert_eq!(epoll.interrupted(), Interrupted::Restarts);
        // Its descriptor is gone already.
        let mut close = at(-4, libc::SYS_close);
        assert!(!close.make_again(|_| true));
        assert_eq!(close, at(-4, libc::SYS_close));
        assert!(!at(1, libc::SYS_epoll_wait).make_again(|_| true));
        // A socket with a timeout; a driver that means it.
        let read = Regs { rdi: 7, ..at(-4, libc::SYS_read) };
        assert!({ read }.make_again(|fd| fd == 7));
        assert!(!{ read }.make_again(|_| false));
        // A signal handler has run: its end is no system call.
        assert!(!at(-4, -1).make_again(|_| true));
    }

    #[test]
    fn without_a_restart_block_the_whole_call_is_made_again() {
        let mut sleep = at(-516, libc::SYS_nanosleep);
        sleep.begin_anew();
        assert_eq!(sleep, at(-514, libc::SYS_nanosleep));
        let mut unknown = at(-516, libc::SYS_restart_syscall);
        unknown.begin_anew();
        assert_eq!(unknown.rax as i64, -4);
    }

    #[test]
    fn the_number_before_the_instruction_tells_the_call() {
        let code = |nr: u8| [0x90, 0xb8, nr, 0, 0, 0, 0x0f, 0x05];
        let regs = Regs { rsi: 5, ..at(-516, libc::SYS_restart_syscall) };
        for nr in TIMED {
            assert_eq!(regs.origin(&code(nr as u8)), Some(Origin::Call(nr)));
        }
        // Not a timed one; not at a call at all; too short.
        for code in [&code(39)[..], &[0x90; 8], &[], &[0x0f, 0x05]] {
            assert_eq!(Regs { rdx: PTR, ..regs }.origin(code), None);
        }
    }

    #[test]
    fn arguments_tell_the_call_where_they_can() {
        let regs = at(-516, libc::SYS_restart_syscall);
        let call = |r: Regs| r.origin(&[]);
        let sleep = Regs { rdi: PTR, rsi: PTR, rdx: PTR, ..regs };
        assert_eq!(call(sleep), Some(Origin::Call(libc::SYS_nanosleep)));
        for clock in [libc::CLOCK_MONOTONIC as u64, -6i32 as u32 as u64, -6i64 as u64] {
            let sleep = Regs { rdi: clock, rsi: 0, rdx: PTR, r10: PTR, ..regs };
            assert_eq!(call(sleep), Some(Origin::Call(libc::SYS_clock_nanosleep)));
        }
        let poll = Regs { rdi: PTR, rsi: 3, rdx: 5000, ..regs };
        assert_eq!(call(poll), Some(Origin::Call(libc::SYS_poll)));
        let forever = Regs { rdx: -1i32 as u32 as u64, ..poll };
        assert_eq!(call(forever), Some(Origin::Call(libc::SYS_poll)));
        let futex = Regs { rdi: PTR, rsi: 0x80, rdx: PTR, r10: PTR, ..regs };
        assert_eq!(call(futex), Some(Origin::Call(libc::SYS_futex)));
        // No remainder asked for, or no descriptors: both the same to us, not to the kernel.
        let unclear = Regs { rdi: PTR, rsi: 0, rdx: 1000, ..regs };
        assert_eq!(call(unclear), Some(Origin::Unclear));
        assert_eq!(unclear.origin_by_place("hrtimer_nanosleep"), Some(libc::SYS_nanosleep));
        assert_eq!(unclear.origin_by_place("do_poll.constprop.0"), Some(libc::SYS_poll));
        assert_eq!(unclear.origin_by_place("do_syscall_64"), Some(libc::SYS_nanosleep));
        assert_eq!(unclear.origin_by_place("futex_do_wait"), None);
        assert_eq!(unclear.origin_by_place("0"), None);
    }
}
