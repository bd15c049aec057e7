//! Tasks that cannot be dumped: each refusal names its reason. Nothing was done to them yet, but that namespaces are
//! looked at when a task has stopped, lest it change them afterwards.

use std::time::{Duration, Instant};

use super::guardian;
use crate::{
    error::{Error, Kind, Result},
    procfs::{
        ProcDir,
        stat::{PF_KTHREAD, Stat},
        status::Status,
    },
    pstree::RealPid,
};

/// How long a guardian may take.
const UNDONE: Duration = Duration::from_secs(3);

/// The root task: it exists, is alive, and is not this process or one that waits for it.
pub fn root(pid: RealPid) -> Result<()> {
    let dir = ProcDir::open(pid).map_err(|e| match e.kind() {
        Kind::TaskDied(_) => Error::host(format!("there is no task {pid}")),
        _ => e,
    })?;
    let status = Status::read(&dir)?;
    // Nothing below it can be one either: such threads are children of the kernel's own.
    if status.kthread || Stat::read(&dir)?.flags & PF_KTHREAD != 0 {
        return Err(Error::unsupported(format!("{} is a thread of the kernel", name(pid)))
            .remedy("give the pid of a process"));
    }
    if status.tgid != pid.0 {
        return Err(Error::usage(format!("{pid} is a thread of task {0}", status.tgid))
            .remedy(format!("give the task: -t {}", status.tgid)));
    }
    if status.is_zombie() && dir.threads()?.len() <= 1 {
        return Err(Error::host(format!("{} has ended already (it is a zombie)", name(pid))));
    }
    let mut ancestor = RealPid(std::process::id().cast_signed());
    loop {
        if ancestor == pid {
            let who = if pid.0.cast_unsigned() == std::process::id() {
                "this very process"
            } else {
                "a parent of this process"
            };
            return Err(Error::usage(format!("{} is {who}: it would dump itself", name(pid)))
                .remedy("start the dump from outside of the tree, for example from another shell"));
        }
        let parent = ProcDir::open(ancestor).and_then(|dir| Stat::read(&dir)).map(|stat| stat.ppid);
        match parent {
            Ok(ppid) if ppid > 0 => ancestor = RealPid(ppid),
            _ => return Ok(()),
        }
    }
}

/// Any living task of the tree, before it is seized.
///
/// `status` was read just now.
pub fn task(dir: &ProcDir, mut status: Status) -> Result<()> {
    let pid = dir.pid();
    // A dump that was killed: it is being undone.
    let soon = Instant::now() + UNDONE;
    while is_guardian(status.tracer) && Instant::now() < soon {
        std::thread::sleep(Duration::from_millis(1));
        status = Status::read(dir)?;
    }
    if status.tracer != 0 && status.tracer != std::process::id().cast_signed() {
        return Err(traced(pid, status.tracer));
    }
    Ok(())
}

/// Whether thread `tid` belongs to a dump's guardian.
fn is_guardian(tid: i32) -> bool {
    tid != 0
        && ProcDir::open(RealPid(tid))
            .and_then(|dir| dir.read("comm"))
            .is_ok_and(|comm| comm.trim_ascii_end() == guardian::NAME.to_bytes())
}

/// The refusal of a task that `tracer` traces.
pub fn traced(pid: RealPid, tracer: i32) -> Error {
    let tracer = RealPid(tracer);
    Error::host(format!("{} is being traced by {}", name(pid), name(tracer)))
        .remedy("end the debugger or tracer first")
}

/// `task 12 (bash)`, for messages.
pub fn name(pid: RealPid) -> String {
    let comm = ProcDir::open(pid).and_then(|dir| dir.read("comm")).unwrap_or_default();
    let comm = comm.strip_suffix(b"\n").unwrap_or(&comm);
    if comm.is_empty() { format!("task {pid}") } else { format!("task {pid} ({})", comm.escape_ascii()) }
}

/// What a thread in an uninterruptible wait waits for; `None` for all others.
pub fn waits_for(tid: RealPid) -> Option<String> {
    let dir = ProcDir::open(tid).ok()?;
    if Stat::read(&dir).ok()?.state != b'D' {
        return None;
    }
    let call = dir.read("syscall").unwrap_or_default();
    let number = crate::procfs::words(&call).next().and_then(crate::procfs::number::<i64>);
    let wchan = dir.read("wchan").unwrap_or_default();
    let why = match number {
        Some(libc::SYS_vfork) => "waits for the child of its vfork to execute or end".to_owned(),
        Some(libc::SYS_clone | libc::SYS_clone3) => {
            "waits for the child of its vfork-like clone to execute or end".to_owned()
        }
        Some(n) => format!("is in an uninterruptible wait of system call {n}, {}", wchan.escape_ascii()),
        None => format!("is in an uninterruptible wait, {}", wchan.escape_ascii()),
    };
    Some(format!("{} {why}", name(tid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(dir: &ProcDir) -> Result<()> {
        root(dir.pid())?;
        task(dir, Status::read(dir)?)?;
        Ok(())
    }
    use std::process::{Child, Command};

    struct Kept(Child);
    impl Drop for Kept {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn pid(child: &Kept) -> RealPid {
        RealPid(child.0.id() as i32)
    }

    #[test]
    fn a_pid_that_is_nobody_is_named() {
        let mut child = Command::new("true").spawn().unwrap();
        let gone = RealPid(child.id() as i32);
        child.wait().unwrap();
        assert_eq!(root(gone).unwrap_err().to_string(), format!("there is no task {gone}"));
    }

    #[test]
    fn ourselves_and_our_parents_are_refused() {
        let me = RealPid(std::process::id() as i32);
        assert!(root(me).unwrap_err().to_string().contains("this very process"));
        let parent = RealPid(std::os::unix::process::parent_id() as i32);
        assert!(root(parent).unwrap_err().to_string().contains("a parent of this process"));
    }

    #[test]
    fn a_zombie_is_refused_and_a_living_task_is_not() {
        let alive = Kept(Command::new("sleep").arg("1000").spawn().unwrap());
        root(pid(&alive)).unwrap();
        refused(&ProcDir::open(pid(&alive)).unwrap()).unwrap();
        let zombie = Kept(Command::new("true").spawn().unwrap());
        let dir = ProcDir::open(pid(&zombie)).unwrap();
        while !Status::read(&dir).unwrap().is_zombie() {
            std::thread::yield_now();
        }
        assert!(root(pid(&zombie)).unwrap_err().to_string().contains("zombie"));
    }

    #[test]
    fn a_thread_is_told_from_a_task() {
        let (send, receive) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            send.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = wait.recv();
        });
        let e = root(RealPid(receive.recv().unwrap())).unwrap_err().to_string();
        assert!(e.contains("is a thread of task"), "{e}");
        drop(done);
        thread.join().unwrap();
    }

    #[test]
    fn a_kernel_thread_is_refused() {
        let Ok(dir) = ProcDir::open(RealPid(2)) else { return };
        if Stat::read(&dir).is_ok_and(|s| s.flags & PF_KTHREAD != 0) {
            assert!(refused(&dir).unwrap_err().to_string().contains("thread of the kernel"));
        } else {
            eprintln!("skipped: no kernel threads are visible here");
        }
    }
}
