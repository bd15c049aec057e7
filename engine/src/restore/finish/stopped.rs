//! Tasks that were stopped by job control are stopped again, and their parents know of it already.
//!
//! A stop is a piece of news: the parent gets SIGCHLD, and wait(2) reports it once. In the dumped tree that news
//! was old. So children stop while their parents are still caught, and the parents are made to take the news
//! before they go on.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcriu_images::pb;

use super::caught::Caught;
use crate::error::{Context, Error, Kind, Result, SysContext};
use crate::procfs::ProcDir;
use crate::procfs::stat::Stat;
use crate::pstree::{RealPid, VirtPid};
use crate::restore::read::TaskImage;
use crate::task::stop::News;

/// How long a task may take to stop once it was told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// A child that stands still.
#[derive(Clone, Copy, Debug)]
pub struct Stopped {
    /// Which, as its parent calls it.
    pub pid: VirtPid,
    /// What its parent knew of it.
    pub news: News,
}

/// Sends the signal that stopped the task, to act once it runs.
pub fn send_stop(image: &TaskImage, pid: RealPid, leave_stopped: bool) -> Result<()> {
    let number = match image.tc.stop_signo {
        Some(number) if !leave_stopped => number as i32,
        _ => libc::SIGSTOP,
    };
    let signal = Signal::try_from(number)
        .ok()
        .filter(|s| [Signal::SIGSTOP, Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU].contains(s))
        .ok_or_else(|| Error::image(format!("core-{}.img: signal {number} stops nobody", image.pid)))?;
    kill(Pid::from_raw(pid.0), signal).call("kill")
}

/// Waits until the task, which nobody traces any more, has stopped. `false`: it went on instead, as one does
/// that handles or ignores the signal.
pub fn await_stop(pid: RealPid) -> Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    let mut nap = Duration::from_micros(20);
    loop {
        match ProcDir::open(pid).and_then(|dir| Stat::read(&dir)) {
            Ok(stat) if stat.state == b'T' => return Ok(true),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => return Ok(false),
            Err(e) => return Err(e),
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(2));
    }
}

/// Makes the caught parent take the news that `children` stopped, as far as it had taken it in the dump: from
/// wait(2), and the SIGCHLD it may have got now, unless one was pending (the kernel keeps only one) or is due.
pub fn take_news(parent: &mut Caught, image: &TaskImage, children: &[Stopped]) -> Result<()> {
    for child in children.iter().filter(|c| matches!(c.news, News::Taken(_))) {
        let options = libc::WUNTRACED | libc::WNOHANG | libc::__WALL;
        parent
            .call("wait4", libc::SYS_wait4, [child.pid.0 as u64, 0, options as u64, 0, 0, 0])
            .during(|| format!("news that {} stopped", child.pid))?;
    }
    if children.is_empty() || children.iter().any(|c| c.news == News::Untold) || has_sigchld(image) {
        return Ok(());
    }
    // A signal set with SIGCHLD, then a timeout of zero.
    let set = 1u64 << (libc::SIGCHLD - 1);
    let data: Vec<u8> = [set, 0, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    let at = parent.put(&data)?;
    match parent.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, [at, 0, at + 8, 8, 0, 0]) {
        Ok(_) => Ok(()),
        // There was none: it is ignored, or SA_NOCLDSTOP.
        Err(e) if matches!(e.errno(), Some(libc::EAGAIN | libc::EINTR)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Whether a SIGCHLD was pending for the process or its leader.
fn has_sigchld(image: &TaskImage) -> bool {
    let own = image.core.thread_core.as_ref().and_then(|t| t.signals_p.as_ref());
    let is_sigchld = |e: &pb::SiginfoEntry| {
        e.siginfo.get(..4).is_some_and(|b| b == libc::SIGCHLD.to_ne_bytes().as_slice())
    };
    [image.tc.signals_s.as_ref(), own].into_iter().flatten().any(|q| q.signals.iter().any(is_sigchld))
}
