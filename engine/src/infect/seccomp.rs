//! Whether a thread's seccomp filters let the kernel restart what we interrupted.
//!
//! A sleep with a timeout is not made again after a stop; the kernel has the thread call
//! restart_syscall(2) instead. A filter that does not allow that call kills the thread for it (so does a
//! plain SIGSTOP and SIGCONT). Such a thread makes its call again, which its filter has allowed before.

use crate::{
    arch::{Interrupted, Regs},
    error::Result,
    pstree::RealPid,
    sys::ptrace::{self, SockFilter},
};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const RET_ACTION: u32 = 0xffff_0000;
const RET_LOG: u32 = 0x7ffc_0000;

/// Whether the restart that `regs` is about to do would be refused.
pub(super) fn forbids_restart(tid: RealPid, regs: &Regs) -> Result<bool> {
    if !matches!(regs.interrupted(), Interrupted::Timed | Interrupted::Unknown) {
        return Ok(false);
    }
    let mut data = [0u32; 16];
    data[0] = libc::SYS_restart_syscall as u32;
    data[1] = AUDIT_ARCH_X86_64;
    let words = [regs.rip, regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    for (to, word) in data[2..].chunks_exact_mut(2).zip(words) {
        to.copy_from_slice(&[word as u32, (word >> 32) as u32]);
    }
    for index in 0.. {
        match ptrace::seccomp_get_filter(tid, index) {
            Ok(Some(filter)) if !allows(&filter, &data) => return Ok(true),
            Ok(Some(_)) => {}
            Ok(None) => break,
            // No filters, or a kernel or privileges that do not show them: strict mode has no sleep.
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EACCES | libc::EIO)) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(false)
}

/// Whether a filter allows the call described by `data` (`struct seccomp_data`, as words). A program
/// the kernel would not have taken forbids.
fn allows(filter: &[SockFilter], data: &[u32; 16]) -> bool {
    run(filter, data).is_some_and(|ret| ret & RET_ACTION >= RET_LOG && ret >> 31 == 0)
}

/// A classic BPF program's return value; see Documentation/networking/filter.rst of the kernel.
fn run(filter: &[SockFilter], data: &[u32; 16]) -> Option<u32> {
    let (mut a, mut x, mut mem) = (0u32, 0u32, [0u32; 16]);
    let mut pc = 0usize;
    loop {
        let i = filter.get(pc)?;
        pc += 1;
        let operand = if i.code & 0x08 == 0 { i.k } else { x };
        match i.code & 0x07 {
            // Load: absolute, length, immediate, scratch memory.
            0x00 => {
                a = match i.code & 0xe0 {
                    0x20 if i.k % 4 == 0 => *data.get(i.k as usize / 4)?,
                    0x80 => size_of_val(data) as u32,
                    0x00 => i.k,
                    0x60 => *mem.get(i.k as usize)?,
                    _ => return None,
                }
            }
            0x01 => {
                x = match i.code & 0xe0 {
                    0x80 => size_of_val(data) as u32,
                    0x00 => i.k,
                    0x60 => *mem.get(i.k as usize)?,
                    _ => return None,
                }
            }
            0x02 => *mem.get_mut(i.k as usize)? = a,
            0x03 => *mem.get_mut(i.k as usize)? = x,
            0x04 => {
                a = match i.code & 0xf0 {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    0x30 => a.checked_div(operand)?,
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.wrapping_shl(operand),
                    0x70 => a.wrapping_shr(operand),
                    0x80 => a.wrapping_neg(),
                    0x90 => a.checked_rem(operand)?,
                    0xa0 => a ^ operand,
                    _ => return None,
                }
            }
            0x05 => {
                let taken = match i.code & 0xf0 {
                    0x00 => {
                        pc = pc.checked_add(i.k as usize)?;
                        continue;
                    }
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                pc += usize::from(if taken { i.jt } else { i.jf });
            }
            0x06 => return Some(if i.code & 0x18 == 0x10 { a } else { i.k }),
            _ => match i.code & 0xf8 {
                0x00 => x = a,
                _ => a = x,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0001;
    const KILL: u32 = 0x8000_0000;

    fn op(code: u16, jt: u8, jf: u8, k: u32) -> SockFilter {
        SockFilter { code, jt, jf, k }
    }

    fn call(nr: u32) -> [u32; 16] {
        let mut data = [0; 16];
        data[0] = nr;
        data[1] = AUDIT_ARCH_X86_64;
        data
    }

    #[test]
    fn a_list_of_allowed_calls_is_understood() {
        // ld arch; jne x86_64 -> kill; ld nr; je 219 -> allow; jge 300 -> allow; errno
        let list = [
            op(0x20, 0, 0, 4),
            op(0x15, 1, 0, AUDIT_ARCH_X86_64),
            op(0x06, 0, 0, KILL),
            op(0x20, 0, 0, 0),
            op(0x15, 1, 0, 219),
            op(0x35, 0, 1, 300),
            op(0x06, 0, 0, ALLOW),
            op(0x06, 0, 0, ERRNO),
        ];
        assert!(allows(&list, &call(219)));
        assert!(allows(&list, &call(334)));
        assert!(!allows(&list, &call(35)));
        let mut foreign = call(219);
        foreign[1] = 0x4000_0003;
        assert!(!allows(&list, &foreign));
    }

    #[test]
    fn arithmetic_and_memory_work() {
        // x = 3; a = nr; mem[2] = a; a = (a * x) - 1; a ^= mem[2] by way of x; ret a
        let program = [
            op(0x01, 0, 0, 3),
            op(0x20, 0, 0, 0),
            op(0x02, 0, 0, 2),
            op(0x2c, 0, 0, 0),
            op(0x14, 0, 0, 1),
            op(0x61, 0, 0, 2),
            op(0xac, 0, 0, 0),
            op(0x16, 0, 0, 0),
        ];
        assert_eq!(run(&program, &call(7)), Some((7 * 3 - 1) ^ 7));
    }

    #[test]
    fn broken_programs_forbid() {
        assert!(!allows(&[], &call(1)));
        assert!(!allows(&[op(0x05, 0, 0, u32::MAX)], &call(1)));
        assert!(!allows(&[op(0x20, 0, 0, 64), op(0x06, 0, 0, ALLOW)], &call(1)));
        assert!(!allows(&[op(0x34, 0, 0, 0), op(0x06, 0, 0, ALLOW)], &call(1)));
    }
}
