//! io_urings that no dump can keep: `io-uring-held WHAT` makes one, and goes on with it afterwards.
//!
//! # Safety
//!
//! As for the module above.

use std::os::fd::AsRawFd;
use std::ptr::{from_ref, null};

use super::{CQSIZE, NO_EVENT, Params, Request, Ring, nop, register, setup};
use crate::kit::mem::{self, PAGE};
use crate::kit::{Check, rest, same, skip};

const IOPOLL: u32 = 1;
const SQPOLL: u32 = 1 << 1;
const DISABLED: u32 = 1 << 6;
const SINGLE: u32 = 1 << 12;
const OWN_MEMORY: u32 = 1 << 14;

const POLL_ADD: u8 = 6;
const TIMEOUT: u8 = 11;
const PROVIDE_BUFFERS: u8 = 31;

const REGISTER_BUFFERS: u32 = 0;
const REGISTER_FILES: u32 = 2;
const REGISTER_EVENTFD: u32 = 4;
const REGISTER_PERSONALITY: u32 = 9;
const REGISTER_RESTRICTIONS: u32 = 11;
const ENABLE: u32 = 12;
const REGISTER_RING: u32 = 20;
const REGISTER_BUFFER_RING: u32 = 22;
const BUFFER_STATUS: u32 = 26;

/// See the module.
pub fn run(args: &[String]) -> Check {
    let what = args.first().map_or("", String::as_str);
    if what == "own-memory" {
        return own_memory();
    }
    if what == "part" {
        // Rings of more than a page, without the first.
        let ring = Ring::new(512, 0, 0)?;
        ring.unmap_first()?;
        return rest();
    }
    if what == "unopened" {
        let ring = Ring::new(2, 0, 0)?;
        drop(ring.fd);
        return rest();
    }
    let (flags, events) = match what {
        "polling" => (SQPOLL, 0),
        "single" => (SINGLE, 0),
        "disabled" | "restricted" => (DISABLED, 0),
        "iopoll" => (IOPOLL, 0),
        "overflow" => (CQSIZE, 2),
        _ => (0, 0),
    };
    let ring = Ring::new(2, flags, events)?;
    let event = nix::sys::eventfd::EventFd::new()?;
    let number = event.as_raw_fd();
    let buffer = mem::anon(PAGE)?;
    let one = [buffer.at as u64, PAGE as u64];
    let limit = [3_600u64, 0];
    match what {
        "files" => register(&ring.fd, REGISTER_FILES, from_ref(&number).cast(), 1).map(drop)?,
        "buffers" => register(&ring.fd, REGISTER_BUFFERS, one.as_ptr().cast(), 1).map(drop)?,
        "eventfd" => register(&ring.fd, REGISTER_EVENTFD, from_ref(&number).cast(), 1).map(drop)?,
        "personality" => {
            register(&ring.fd, REGISTER_PERSONALITY, null(), 0)?;
            let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", ring.fd.as_raw_fd()))?;
            if !told.contains("Personalities") {
                return Err(skip("this kernel does not tell of personalities"));
            }
        }
        "provided" | "provided-before" if !tells_of_buffers(&ring) => {
            return Err(skip("this kernel does not tell of provided buffers (Linux 6.8 does)"));
        }
        "provided" => {
            // struct io_uring_buf_reg: address, entries, group.
            let wanted = [buffer.at as u64, 8 | 7 << 32, 0, 0, 0];
            register(&ring.fd, REGISTER_BUFFER_RING, wanted.as_ptr().cast(), 1)?;
        }
        "provided-before" => {
            let (fd, address, len) = (1, buffer.at as u64, 64);
            let opcode = PROVIDE_BUFFERS;
            ring.one(&Request { opcode, fd, address, len, group: 9, ..Request::default() })?;
        }
        "number" => {
            // struct io_uring_rsrc_update: any number, for this descriptor.
            let wanted = [u64::from(u32::MAX), ring.fd.as_raw_fd() as u64];
            register(&ring.fd, REGISTER_RING, wanted.as_ptr().cast(), 1)?;
        }
        "restricted" => {
            // struct io_uring_restriction: a request may be one that does nothing.
            let restriction = [1u16, 0, 0, 0, 0, 0, 0, 0];
            register(&ring.fd, REGISTER_RESTRICTIONS, restriction.as_ptr().cast(), 1)?;
            register(&ring.fd, ENABLE, null(), 0)?;
        }
        "poll" => {
            let more = libc::POLLIN as u32;
            ring.put(&Request { opcode: POLL_ADD, fd: number, more, data: 5, ..Request::default() });
            ring.enter(1, 0)?;
        }
        "timeout" => {
            let address = limit.as_ptr() as u64;
            ring.put(&Request { opcode: TIMEOUT, fd: -1, address, len: 1, data: 6, ..Request::default() });
            ring.enter(1, 0)?;
        }
        // Nothing tells that it gave no event because it had asked for none.
        "silent" => {
            ring.put(&Request { flags: NO_EVENT, ..nop(0) });
            ring.enter(1, 0)?;
        }
        "overflow" => {
            for n in 0..4 {
                ring.put(&nop(n));
                ring.enter(1, 0)?;
            }
        }
        _ => {}
    }
    rest()?;
    match what {
        "disabled" => register(&ring.fd, ENABLE, null(), 0).map(drop),
        "polling" | "iopoll" | "timeout" => Ok(()),
        "overflow" => {
            for n in 0..4 {
                ring.enter(0, 1)?;
                same("an event", ring.take(), Some((n, 0)))?;
            }
            Ok(())
        }
        "poll" => {
            event.write(1)?;
            ring.enter(0, 1)?;
            same("the event that was waited for", ring.take().map(|(data, _)| data), Some(5))
        }
        _ => same("a request that does nothing", ring.one(&nop(9))?, 0),
    }
}

/// Whether the kernel answers what state a group of buffers is in, if only that there is none.
fn tells_of_buffers(ring: &Ring) -> bool {
    // struct io_uring_buf_status of group 7.
    let mut status = [0u32; 10];
    status[0] = 7;
    let told = register(&ring.fd, BUFFER_STATUS, status.as_mut_ptr().cast(), 1);
    !told.is_err_and(|e| format!("{e:#}").contains("EINVAL"))
}

/// A ring in memory of this process.
fn own_memory() -> Check {
    let memory = mem::shared(2 * PAGE)?;
    let mut params: Params = [0; 30];
    params[2] = OWN_MEMORY;
    let address = |at: usize| [at as u32, (at >> 32) as u32];
    params[18..20].copy_from_slice(&address(memory.at + PAGE));
    params[28..30].copy_from_slice(&address(memory.at));
    let _ring = setup(2, &mut params).map_err(|e| skip(format!("{e:#}")))?;
    rest()
}
