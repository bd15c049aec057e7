//! Descriptors through sockets: to the engine on kernels without pidfd_getfd(2), from the engine always.
//!
//! # Safety
//! System calls over structures on this stack that follow the kernel's layout.

use blobrt::syscall::{Errno, Result, nr, syscall1, syscall3};

use crate::{Control, EINVAL};

/// Most descriptors one message can carry (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

const AF_UNIX: usize = 1;
const SOCK_DGRAM_CLOEXEC: usize = 2 | 0o2000000;
const SOCK_STREAM_CLOEXEC: usize = 1 | 0o2000000;
const MSG_CMSG_CLOEXEC: usize = 0x4000_0000;
const EMFILE: Errno = Errno(24);
const SOL_SOCKET: u64 = 1;
const SCM_RIGHTS: u64 = 1;
/// A `struct sockaddr_un` is no longer than this.
const MAX_ADDRESS: u64 = 110;

#[repr(C)]
struct Msghdr {
    name: u64,
    name_len: u64,
    iov: u64,
    iov_len: u64,
    control: u64,
    control_len: u64,
    flags: u64,
}

#[repr(C, align(8))]
struct Rights {
    len: u64,
    level_and_type: u64,
    fds: [i32; MAX_FDS],
}

/// Sends `args[0]` descriptors to the datagram socket whose address, `args[1]` bytes, is at the start of
/// the data area; the numbers follow, at the next multiple of 8. `ret[0]` is the number of the socket
/// that was used and closed.
///
/// # Safety
/// As [`Control::data_mut`].
pub unsafe fn send(control: &mut Control) -> Result<()> {
    let (count, address_len) = (control.args[0] as usize, control.args[1]);
    if count == 0 || count > MAX_FDS || address_len > MAX_ADDRESS {
        return Err(EINVAL);
    }
    let skip = address_len.next_multiple_of(8) as usize;
    // SAFETY: the caller vouches for the area.
    let words: &[i32] = unsafe { control.data_mut(skip / 4 + count) }?;
    let mut rights = Rights {
        len: (16 + 4 * count) as u64,
        level_and_type: SOL_SOCKET | SCM_RIGHTS << 32,
        fds: [0; MAX_FDS],
    };
    for (to, fd) in rights.fds.iter_mut().zip(words.iter().skip(skip / 4)) {
        *to = *fd;
    }
    let byte = [0u8; 1];
    let iov = [(&raw const byte) as u64, 1];
    let message = Msghdr {
        name: control.data,
        name_len: address_len,
        iov: (&raw const iov) as u64,
        iov_len: 1,
        control: (&raw const rights) as u64,
        control_len: rights.len.next_multiple_of(8),
        flags: 0,
    };
    // SAFETY: the structures live on this stack until the calls return.
    unsafe {
        let socket = syscall3(nr::SOCKET, AF_UNIX, SOCK_DGRAM_CLOEXEC, 0)?;
        control.ret[0] = socket as u64;
        let sent = syscall3(nr::SENDMSG, socket, (&raw const message) as usize, 0);
        let _ = syscall1(nr::CLOSE, socket);
        sent.map(drop)
    }
}

/// Takes a descriptor, close-on-exec, from who listens at the address.
///
/// # Safety
/// `address_len` bytes at `address` are readable.
pub unsafe fn fetch(address: u64, address_len: u64) -> Result<usize> {
    // SAFETY: as the caller says; the socket is gone at the end, whatever happens.
    unsafe {
        let socket = syscall3(nr::SOCKET, AF_UNIX, SOCK_STREAM_CLOEXEC, 0)?;
        let fd = syscall3(nr::CONNECT, socket, address as usize, address_len as usize)
            .and_then(|_| receive(socket));
        let _ = syscall1(nr::CLOSE, socket);
        fd
    }
}

/// Takes the descriptor that comes through `socket`, close-on-exec.
///
/// # Safety
/// `socket` is a socket of ours.
unsafe fn receive(socket: usize) -> Result<usize> {
    let mut byte = [0u8; 1];
    let iov = [(&raw mut byte) as u64, 1];
    let mut rights = Rights { len: 0, level_and_type: 0, fds: [-1; MAX_FDS] };
    let mut message = Msghdr {
        name: 0,
        name_len: 0,
        iov: (&raw const iov) as u64,
        iov_len: 1,
        control: (&raw mut rights) as u64,
        // Room for one.
        control_len: 24,
        flags: 0,
    };
    // SAFETY: the structures live on this stack until the call returns.
    unsafe { syscall3(nr::RECVMSG, socket, (&raw mut message) as usize, MSG_CMSG_CLOEXEC) }?;
    match rights {
        Rights { len: 20, level_and_type, fds: [fd, ..] }
            if level_and_type == SOL_SOCKET | SCM_RIGHTS << 32 && fd >= 0 =>
        {
            Ok(fd as usize)
        }
        // Without room in its table the process gets the message, but not the descriptor.
        _ => Err(EMFILE),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Command, tests::Bench};

    #[test]
    fn impossible_requests_are_refused() {
        for (count, address) in [(0, 10), (MAX_FDS as u64 + 1, 10), (1, 200), (u64::MAX, 10)] {
            let mut bench = Bench::new(Command::SendFds);
            bench.control.args[0] = count;
            bench.control.args[1] = address;
            assert_eq!(bench.run(), -22, "{count} {address}");
        }
    }

    #[test]
    fn descriptors_are_taken() {
        use std::os::fd::AsRawFd;
        let (here, there) = std::os::unix::net::UnixDatagram::pair().unwrap();
        // SAFETY: a socket of ours.
        let receive = || unsafe { receive(there.as_raw_fd() as usize) };
        here.send(b"x").unwrap();
        assert_eq!(receive(), Err(EMFILE), "no descriptor in it");
        give(here.as_raw_fd(), here.as_raw_fd());
        let taken = receive().unwrap();
        let name = |fd: usize| std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert_eq!(name(taken), name(here.as_raw_fd() as usize));
        // SAFETY: closes what was taken.
        unsafe { syscall1(nr::CLOSE, taken) }.unwrap();
    }

    /// Sends descriptor `fd` to who reads the other end of `socket`.
    pub(crate) fn give(socket: i32, fd: i32) {
        let rights = Rights { len: 20, level_and_type: SOL_SOCKET | SCM_RIGHTS << 32, fds: [fd; MAX_FDS] };
        let iov = [c"x".as_ptr() as u64, 1];
        let message = Msghdr {
            name: 0,
            name_len: 0,
            iov: (&raw const iov) as u64,
            iov_len: 1,
            control: (&raw const rights) as u64,
            control_len: 24,
            flags: 0,
        };
        // SAFETY: the structures live until the call returns.
        unsafe { syscall3(nr::SENDMSG, socket as usize, (&raw const message) as usize, 0) }.unwrap();
    }

    #[test]
    fn descriptors_arrive() {
        use std::os::fd::AsRawFd;
        use std::os::linux::net::SocketAddrExt;
        let name = format!("parasite-test-{}", std::process::id());
        let addr = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let here = std::os::unix::net::UnixDatagram::bind_addr(&addr).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();

        let mut bench = Bench::new(Command::SendFds);
        let mut bytes = vec![1u8, 0, 0];
        bytes.extend(name.as_bytes());
        bench.control.args[0] = 1;
        bench.control.args[1] = bytes.len() as u64;
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend(file.as_raw_fd().to_ne_bytes());
        for (to, from) in bench.data.iter_mut().zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..from.len()].copy_from_slice(from);
            *to = u64::from_ne_bytes(word);
        }
        assert_eq!(bench.run(), 0);
        assert_eq!(here.recv(&mut [0; 8]).unwrap(), 1);
    }
}
