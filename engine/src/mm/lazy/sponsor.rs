//! Userfaultfds for tasks of another user namespace, who have no right to watch the forks of their own memory.
//!
//! The kernel asks for privilege over the host twice: userfaultfd(2) of who makes the descriptor, and of who asks it for
//! EVENT_FORK. The first it asks at the opening of `/dev/userfaultfd` instead (Linux 6.1), the second of whoever calls
//! UFFDIO_API: so we open, the task makes the descriptor of its address space, and a child of ours with our rights asks.
//!
//! ```text
//! task       makes the descriptor  --->  sponsor   UFFDIO_API
//!            goes on               <---            errno, 0 if it is done
//! ```

use std::os::fd::{AsFd, OwnedFd};

use nix::{fcntl::OFlag, sys::stat::Mode};

use crate::{
    error::{Error, Result, SysContext},
    process::{self, Forked},
    pstree::RealPid,
    restore::passing::Channel,
    sys::userfaultfd::{self as uffd, Features},
};

const DEVICE: &str = "/dev/userfaultfd";
/// The only kind of message.
const ASK: u8 = 0;

/// The child; ended with the value.
#[derive(Debug)]
pub struct Sponsor(RealPid);

/// What tasks inherit of it.
#[derive(Debug)]
pub struct Sponsored {
    device: OwnedFd,
    channel: Channel,
}

impl Sponsor {
    /// Forks it. The caller must have one thread. `keep` brings descriptors to where they are not in the way of the
    /// tasks'.
    ///
    /// # Errors
    /// A kernel that makes no userfaultfd for who has no right to.
    pub fn start(
        features: Features,
        keep: impl Fn(OwnedFd) -> Result<OwnedFd>,
    ) -> Result<(Sponsor, Sponsored)> {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let device = nix::fcntl::open(DEVICE, flags, Mode::empty()).call(format!("open({DEVICE})")).map_err(|e| {
            e.remedy(
                "restore without --lazy-pages or --background what has a user namespace of its own, or on Linux 6.1 \
                 or later",
            )
        })?;
        let (ours, theirs) = Channel::pair()?;
        match process::fork()? {
            Forked::Parent(pid) => {
                let sponsor = Sponsor(pid);
                drop(ours);
                Ok((sponsor, Sponsored { device: keep(device)?, channel: theirs.moved(keep)? }))
            }
            Forked::Child => {
                drop((device, theirs));
                while let Ok(Some((ASK, _, Some(fd)))) = ours.receive() {
                    let errno = match uffd::api(&fd, features) {
                        Ok(_) => 0,
                        Err(e) => e.errno().unwrap_or(libc::EIO),
                    };
                    if ours.send(ASK, errno.cast_unsigned(), None).is_err() {
                        break;
                    }
                }
                process::leave(0)
            }
        }
    }
}

impl Drop for Sponsor {
    fn drop(&mut self) {
        process::end(self.0);
    }
}

impl Sponsored {
    /// A userfaultfd of this process with all features, in a task. No two tasks may ask at a time.
    pub fn make(&self) -> Result<OwnedFd> {
        let fd = uffd::open_by(&self.device)?;
        self.channel.send(ASK, 0, Some(fd.as_fd()))?;
        match self.channel.receive()? {
            Some((ASK, 0, None)) => Ok(fd),
            Some((ASK, errno, None)) => Err(Error::sys("ioctl(UFFDIO_API)", errno.cast_signed())),
            _ => Err(Error::host("the process that asks for a userfaultfd's events was ended")
                .remedy("somebody killed it: restore again")),
        }
    }
}
