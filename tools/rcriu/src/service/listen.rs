//! The command service: a listening socket, and a process of its own for each client.
//!
//! A worker changes folder, log and signal state as its request asks, and a restore forks from it: so it is not
//! a thread of ours. It is this program again, with the client's socket as standard input.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self as sk, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use rcriu_engine::error::{Error, Kind, Result, SysContext};
use rcriu_engine::{interrupt, process};

use crate::cli::Raw;

/// The word by which a worker is started; not for people.
pub const WORKER: &str = "service-worker";

/// Where the socket is when no address is given.
const DEFAULT: &str = "./criu_service.socket";

/// Serves until a signal ends it. `configuration` are the options about configuration files that we were
/// started with; workers get them too.
pub fn listen(raw: &Raw, configuration: &[OsString]) -> Result<ExitCode> {
    let address = raw.address.as_deref().unwrap_or_else(|| {
        log::warn!("no --address given: listening on {DEFAULT}");
        DEFAULT
    });
    let path = Path::new(address);
    let listener = bound(path).map_err(|e| e.during(format!("service socket {address}")))?;
    log::info!("The service socket is bound to {address}");
    if raw.restore_detached {
        nix::unistd::daemon(true, false).call("daemon")?;
    }
    if let Some(path) = &raw.pidfile {
        write_pidfile(path)?;
    }
    if let Some(fd) = raw.status_fd {
        ready(fd)?;
    }
    let served = accept_all(&listener, configuration);
    let _ = fs::remove_file(path);
    match served {
        // A signal is how a server is told to end.
        Err(e) if matches!(e.kind(), Kind::Interrupted(_)) => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS),
    }
}

fn bound(path: &Path) -> Result<OwnedFd> {
    let fd = sk::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let fd = fd.call("socket")?;
    // A socket left over by an earlier service is in the way; anything else is not ours to remove.
    if fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        fs::remove_file(path).call("unlink")?;
    }
    sk::bind(fd.as_raw_fd(), &UnixAddr::new(path).call("sockaddr_un")?).call("bind")?;
    // Anyone may connect; a request is done with the rights that the kernel tells us the client has.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).call("chmod")?;
    sk::listen(&fd, Backlog::new(16).call("listen")?).call("listen")?;
    Ok(fd)
}

fn write_pidfile(path: &Path) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| write!(file, "{}", std::process::id()))
        .call("write")
        .map_err(|e| e.during(format!("pidfile {}", path.display())))
}

fn ready(fd: i32) -> Result<()> {
    let file = process::take_descriptor(fd).map_err(|e| e.during("--status-fd"))?;
    fs::File::from(file).write_all(&[0]).call("write").map_err(|e| e.during("--status-fd"))
}

fn accept_all(listener: &OwnedFd, configuration: &[OsString]) -> Result<()> {
    let mut workers: Vec<Child> = Vec::new();
    loop {
        interrupt::check()?;
        // Ended workers are noticed after a second at the latest.
        let mut wait = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, PollTimeout::from(1000u16)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => workers.extend(accept(listener, configuration)?),
            Err(e) => return Err(Error::sys("poll", e as i32)),
        }
        workers.retain_mut(|child| match child.try_wait() {
            Ok(Some(status)) => {
                log::info!("Worker(pid {}) ended: {status}", child.id());
                false
            }
            _ => true,
        });
    }
}

fn accept(listener: &OwnedFd, configuration: &[OsString]) -> Result<Option<Child>> {
    let client = match sk::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
        Ok(fd) => process::take_descriptor(fd)?,
        Err(Errno::ECONNABORTED | Errno::EINTR) => return Ok(None),
        Err(e) => return Err(Error::sys("accept4", e as i32)),
    };
    log::info!("Connected.");
    let worker = Command::new("/proc/self/exe")
        .args(configuration)
        .arg(WORKER)
        .stdin(Stdio::from(client))
        .spawn()
        .call("execve(/proc/self/exe)");
    Ok(worker.inspect_err(|e| log::error!("can't start a worker: {e}")).ok())
}
