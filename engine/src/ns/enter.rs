//! Acting inside a namespace: in a thread that enters it and ends, so that nothing of this process moves.

use std::{
    fs::File,
    os::fd::{BorrowedFd, OwnedFd},
    thread,
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::ProcDir,
    pstree::RealPid,
};

/// What a thread can enter for itself, with the name in `/proc/PID/ns`, in an order that works.
const ENTERED: [(CloneFlags, &str); 5] = [
    (CloneFlags::CLONE_NEWCGROUP, "cgroup"),
    (CloneFlags::CLONE_NEWIPC, "ipc"),
    (CloneFlags::CLONE_NEWUTS, "uts"),
    (CloneFlags::CLONE_NEWNET, "net"),
    (CloneFlags::CLONE_NEWNS, "mnt"),
];

/// Does `act` in the namespaces of task `pid` that `kinds` names; for all others, in those of this process.
///
/// A mount namespace is entered at its root. Those of pids, users and time are not for a single thread to enter.
///
/// # Errors
/// A namespace that cannot be entered: EPERM without CAP_SYS_ADMIN in it; what `act` returns.
pub fn inside<T: Send>(pid: RealPid, kinds: CloneFlags, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let dir = ProcDir::open(pid)?;
    let wanted = ENTERED.iter().filter(|(flag, _)| kinds.contains(*flag));
    let files = wanted
        .map(|(flag, name)| Ok((*flag, dir.file(&format!("ns/{name}"), OFlag::O_RDONLY)?)))
        .collect::<Result<Vec<_>>>()?;
    let files: Vec<_> = files.iter().map(|(flag, file)| (*flag, file)).collect();
    inside_of(&files, act).during(|| format!("namespaces of task {pid}"))
}

/// The same in these namespaces.
///
/// # Errors
/// As [`inside`].
pub fn inside_of<T: Send>(
    namespaces: &[(CloneFlags, &OwnedFd)],
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let entered = scope.spawn(|| enter(namespaces).and_then(|()| act()));
        entered.join().unwrap_or_else(|_| Err(Error::bug("a thread in another namespace panicked")))
    })
}

/// Does `act` with the calling thread in `namespace`, of the network or ipc, and goes back.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN in it; what `act` returns. If there is no way back, that.
pub fn here<T>(namespace: BorrowedFd<'_>, kind: CloneFlags, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let name = if kind == CloneFlags::CLONE_NEWNET { "net" } else { "ipc" };
    let path = format!("/proc/thread-self/ns/{name}");
    let ours = File::open(&path).call(path)?;
    setns(namespace, kind).call("setns")?;
    let done = act();
    setns(ours, kind).call("setns").during(|| format!("back to our own {name} namespace"))?;
    done
}

fn enter(files: &[(CloneFlags, &OwnedFd)]) -> Result<()> {
    for (flag, file) in files {
        if flag.contains(CloneFlags::CLONE_NEWNS) {
            // Root and working folder are those of the whole process else.
            unshare(CloneFlags::CLONE_FS).call("unshare(CLONE_FS)")?;
        }
        setns(file, *flag).call("setns")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_thread_acts_there_and_this_process_stays_here() {
        let Ok(mut child) = Command::new("unshare")
            .args(["--uts", "--net", "--mount", "sh", "-c", "hostname elsewhere && echo ready && read x"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            eprintln!("skipped: no unshare program");
            return;
        };
        let mut said = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut said).unwrap();
        if said == "ready\n" {
            let pid = RealPid(child.id().cast_signed());
            let name = || Ok(nix::unistd::gethostname().call("gethostname")?.into_string().unwrap());
            let ours = name().unwrap();
            let kinds = CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
            assert_eq!(inside(pid, kinds, name).unwrap(), "elsewhere");
            assert_eq!(name().unwrap(), ours);
            let link = || Ok(std::fs::read_link("/proc/thread-self/ns/net").unwrap());
            assert_ne!(inside(pid, kinds, link).unwrap(), link().unwrap());
        } else {
            eprintln!("skipped: namespaces cannot be made here");
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
