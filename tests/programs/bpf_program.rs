//! A BPF program that lets character devices be opened, attached to the control group given, as systemd does for a
//! service.
//!
//! # Safety
//!
//! The kernel is given a union of its size, with addresses of locals that outlive the call.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, bail};

use crate::kit::{Check, rest, same, skip};

const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

/// The kind of device is in the lower half of the context's first word; the answer is in register 0.
const CODE: [[u8; 8]; 6] = [
    [0x69, 0x12, 0, 0, 0, 0, 0, 0],
    [0xb7, 0, 0, 0, 1, 0, 0, 0],
    [0x55, 2, 1, 0, 2, 0, 0, 0],
    [0x95, 0, 0, 0, 0, 0, 0, 0],
    [0xb7, 0, 0, 0, 0, 0, 0, 0],
    [0x95, 0, 0, 0, 0, 0, 0, 0],
];

/// bpf(2); `words` are those of the request.
fn bpf(command: i32, words: &mut [u32]) -> std::io::Result<i32> {
    // SAFETY: the request has the size that is passed; what it points to are constants and locals of the callers.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, words.as_mut_ptr(), words.len() * 4) };
    if r < 0 { Err(std::io::Error::last_os_error()) } else { Ok(r as i32) }
}

fn halves<T>(pointer: *const T) -> [u32; 2] {
    let address = pointer as u64;
    [address as u32, (address >> 32) as u32]
}

fn load() -> Result<OwnedFd, anyhow::Error> {
    let mut words = [0_u32; 18];
    words[0] = PROG_TYPE_CGROUP_DEVICE;
    words[1] = CODE.len() as u32;
    words[2..4].copy_from_slice(&halves(CODE.as_ptr()));
    words[4..6].copy_from_slice(&halves(c"GPL".as_ptr()));
    words[12] = u32::from_ne_bytes(*b"only");
    let fd = bpf(PROG_LOAD, &mut words).map_err(|e| skip(format!("no BPF program can be loaded: {e}")))?;
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Number of a program.
fn number(program: &OwnedFd) -> Result<u32, anyhow::Error> {
    let mut info = [0_u32; 58];
    let address = halves(info.as_mut_ptr());
    let mut words = [program.as_raw_fd().cast_unsigned(), 232, address[0], address[1]];
    bpf(OBJ_GET_INFO_BY_FD, &mut words).context("bpf(BPF_OBJ_GET_INFO_BY_FD)")?;
    Ok(info[1])
}

/// Numbers of the programs attached to a group, and how.
fn attached(group: &File) -> Result<(Vec<u32>, u32), anyhow::Error> {
    let mut ids = [0_u32; 8];
    let address = halves(ids.as_mut_ptr());
    let mut words = [0_u32; 8];
    words[..2].copy_from_slice(&[group.as_raw_fd().cast_unsigned(), CGROUP_DEVICE]);
    words[4..6].copy_from_slice(&address);
    words[6] = ids.len() as u32;
    bpf(PROG_QUERY, &mut words).context("bpf(BPF_PROG_QUERY)")?;
    let count = words[6] as usize;
    Ok((ids.iter().copied().take(count).collect(), words[3]))
}

pub fn run(args: &[String]) -> Check {
    let Some(path) = args.first() else { bail!("give the folder of a control group") };
    let program = load()?;
    let again = program.as_fd().try_clone_to_owned().context("dup")?;
    let mut words;
    {
        let group = File::open(path).with_context(|| format!("opening {path}"))?;
        words = [
            group.as_raw_fd().cast_unsigned(),
            program.as_raw_fd().cast_unsigned(),
            CGROUP_DEVICE,
            ALLOW_MULTI,
        ];
        bpf(PROG_ATTACH, &mut words).map_err(|e| skip(format!("no BPF program can be attached: {e}")))?;
    }
    File::open("/dev/null").context("opening /dev/null before")?;
    rest()?;
    let group = File::open(path).with_context(|| format!("opening {path}"))?;
    let id = number(&program)?;
    same("number of the duplicate", number(&again)?, id)?;
    same("programs of the group", attached(&group)?, (vec![id], ALLOW_MULTI))?;
    File::open("/dev/null").context("opening /dev/null after")?;
    (words[0], words[3]) = (group.as_raw_fd().cast_unsigned(), 0);
    bpf(PROG_DETACH, &mut words).context("bpf(BPF_PROG_DETACH)")?;
    same("programs left", attached(&group)?.0, vec![])
}
