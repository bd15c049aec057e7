//! Threads: making them under their numbers, and what each has of its own.
//!
//! # Safety
//! New threads start on stacks inside the arena and run nothing but this blob.

use core::arch::asm;

use blobrt::{
    abi::CloneArgs,
    syscall::{Errno, check, nr, syscall0, syscall1, syscall2, syscall3, syscall4},
};
use restorer::{
    TaskArgs, ThreadArgs,
    args::{NONE, flag},
    report::{Call, Object},
};

use crate::{
    fail::{Failed, On},
    image::{Task, thread},
    memory::prctl,
};

/// Memory, folders, descriptors, handlers, semaphore undo: all that makes it a thread.
const CLONE_FLAGS: usize = 0x100 | 0x200 | 0x400 | 0x800 | 0x1_0000 | 0x4_0000;
const ARCH_SET_GS: usize = 0x1001;
const ARCH_SET_FS: usize = 0x1002;
const PR_SET_PDEATHSIG: usize = 1;
const PR_SET_NAME: usize = 15;
/// Tries to get a number by `ns_last_pid` before another process in the namespace forked too often.
const LAST_PID_TRIES: u32 = 100;

/// Makes every thread but the leader.
pub fn make_others(task: &Task) -> Result<(), Failed> {
    let clone3 = task.args.flags & flag::CLONE3 != 0;
    for new in task.threads().iter().skip(1) {
        if clone3 { by_clone3(task, new)? } else { by_last_pid(task, new)? }
    }
    Ok(())
}

fn by_clone3(task: &Task, new: &ThreadArgs) -> Result<(), Failed> {
    let tid = [new.tid];
    let args = CloneArgs {
        flags: CLONE_FLAGS as u64,
        stack: new.stack_top - 16,
        stack_size: 16,
        set_tid: tid.as_ptr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: the stack is inside the arena and this thread's own.
    unsafe { start(nr::CLONE3, (&raw const args) as usize, size_of::<CloneArgs>(), task.args, new) }.on(
        Call::Clone3,
        Object::Thread,
        new.tid as u64,
        0,
    )?;
    Ok(())
}

/// The kernel gives numbers upwards from the last one, which can be written. Others fork meanwhile, so
/// the number is checked, and only one of our tasks does this at a time.
fn by_last_pid(task: &Task, new: &ThreadArgs) -> Result<(), Failed> {
    task.shared.lock_last_pid();
    let result = try_last_pid(task, new);
    task.shared.unlock_last_pid();
    result
}

fn try_last_pid(task: &Task, new: &ThreadArgs) -> Result<(), Failed> {
    let mut text = [0u8; 12];
    let text = decimal(new.tid as u32 - 1, &mut text);
    let mut got = 0;
    for _ in 0..LAST_PID_TRIES {
        // SAFETY: the text is a local; the stack is inside the arena and this thread's own.
        unsafe {
            syscall4(nr::PWRITE64, task.args.last_pid_fd as usize, text.as_ptr() as usize, text.len(), 0)
                .on(Call::LastPid, Object::Thread, new.tid as u64, 0)?;
            got = start(nr::CLONE, CLONE_FLAGS, new.stack_top as usize, task.args, new).on(
                Call::Clone,
                Object::Thread,
                new.tid as u64,
                0,
            )?;
            if got == new.tid as usize {
                return Ok(());
            }
            // It ends by itself; its stack is used again, so it must be gone.
            while syscall3(nr::TGKILL, task.args.pid as usize, got, 0).is_ok() {
                let _ = syscall0(nr::SCHED_YIELD);
            }
        }
    }
    Err(Failed::new(Call::Clone, Object::Thread, 17, new.tid as u64, got as u64))
}

/// Makes a thread by clone or clone3 (whose first two arguments are `a` and `b`); it runs [`begin`] on its
/// stack.
///
/// # Safety
/// The call gives the new thread a stack of its own.
unsafe fn start(
    nr: usize,
    a: usize,
    b: usize,
    task: *const TaskArgs,
    new: *const ThreadArgs,
) -> Result<usize, Errno> {
    let ret: usize;
    // SAFETY: both sides return behind the call with equal registers; the new one has another stack and
    // leaves the block by a call that does not return.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "and rsp, -16",
            "mov rdi, {task}",
            "mov rsi, {new}",
            "call {begin}",
            "ud2",
            "2:",
            task = in(reg) task,
            new = in(reg) new,
            begin = sym begin,
            inlateout("rax") nr => ret,
            in("rdi") a,
            in("rsi") b,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    check(ret)
}

/// First function of a new thread.
unsafe extern "C" fn begin(args: *const TaskArgs, me: *const ThreadArgs) -> ! {
    // SAFETY: the maker passes the arena and the thread's row; gettid and exit take no pointers.
    unsafe {
        if syscall0(nr::GETTID) != Ok((*me).tid as usize) {
            loop {
                let _ = syscall1(nr::EXIT, 0);
            }
        }
        let task = Task { args: &*args, shared: &*((*args).shared as *const restorer::Shared) };
        if let Err(failed) = own_state(&task, &*me) {
            crate::fail::fail(&task, (*me).tid, failed)
        }
        thread(args, me)
    }
}

/// What the calling thread can set for itself at once.
pub fn own_state(task: &Task, me: &ThreadArgs) -> Result<(), Failed> {
    segments(task, me)?;
    prctl(PR_SET_NAME, me.comm.as_ptr() as usize, Object::Thread)?;
    // SAFETY: addresses of the task; the kernel checks them when it uses them.
    unsafe {
        let _ = syscall1(nr::SET_TID_ADDRESS, me.clear_tid as usize);
        if me.robust != 0 {
            syscall2(nr::SET_ROBUST_LIST, me.robust as usize, me.robust_len as usize).on(
                Call::SetRobustList,
                Object::Robust,
                me.robust,
                me.robust_len,
            )?;
        }
        let rseq = me.rseq;
        if rseq.len != 0 {
            syscall4(nr::RSEQ, rseq.addr as usize, rseq.len as usize, 0, rseq.sig as usize).on(
                Call::Rseq,
                Object::Rseq,
                rseq.addr,
                u64::from(rseq.len),
            )?;
        }
    }
    Ok(())
}

/// Selectors before bases: loading a selector changes the base.
fn segments(task: &Task, me: &ThreadArgs) -> Result<(), Failed> {
    for segment in task.table(me.segments) {
        let mut segment = *segment;
        // SAFETY: a struct user_desc; the kernel may write the entry number back.
        unsafe { syscall1(nr::SET_THREAD_AREA, segment.as_mut_ptr() as usize) }.on(
            Call::SetThreadArea,
            Object::Segment,
            u64::from(segment[0]),
            0,
        )?;
    }
    let [ds, es, fs, gs] = me.selectors;
    // SAFETY: 64-bit code uses none of these bases but through fs and gs, which the blob does not.
    unsafe {
        if ds | es | fs | gs != 0 {
            asm!("mov ds, {:x}", in(reg) ds, options(nostack, nomem));
            asm!("mov es, {:x}", in(reg) es, options(nostack, nomem));
            asm!("mov fs, {:x}", in(reg) fs, options(nostack, nomem));
            asm!("mov gs, {:x}", in(reg) gs, options(nostack, nomem));
        }
        for (code, base) in [(ARCH_SET_FS, me.fs_base), (ARCH_SET_GS, me.gs_base)] {
            syscall2(nr::ARCH_PRCTL, code, base as usize).on(Call::ArchPrctl, Object::Segment, base, 0)?;
        }
    }
    Ok(())
}

/// Policy, priority and nice value. Needs CAP_SYS_NICE, so it comes before the credentials.
pub fn schedule(me: &ThreadArgs) -> Result<(), Failed> {
    if me.policy == NONE {
        return Ok(());
    }
    let param = [me.priority];
    // SAFETY: struct sched_param is one int; 0 means the calling thread.
    unsafe {
        syscall3(nr::SETPRIORITY, 0, 0, me.nice as isize as usize).on(
            Call::Setpriority,
            Object::Nice,
            me.nice as i64 as u64,
            0,
        )?;
        syscall3(nr::SCHED_SETSCHEDULER, 0, me.policy as usize, param.as_ptr() as usize).on(
            Call::SchedSetscheduler,
            Object::Sched,
            u64::from(me.policy),
            u64::from(me.priority),
        )?;
    }
    Ok(())
}

/// The signal at the parent's death; a change of credentials clears it.
pub fn parent_death_signal(me: &ThreadArgs) -> Result<(), Failed> {
    if me.pdeath_sig != 0 {
        prctl(PR_SET_PDEATHSIG, me.pdeath_sig as usize, Object::Prctl)?;
    }
    Ok(())
}

fn decimal(mut n: u32, out: &mut [u8; 12]) -> &[u8] {
    let mut at = out.len();
    loop {
        at -= 1;
        out[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            return &out[at..];
        }
    }
}
