//! Action scripts and notifications: the stages at which the outside may act while the engine waits.
//!
//! The engine calls one [`Notifier`] and does not know who listens: scripts of `--action-script`, the client of
//! an RPC connection, both, or nobody. A failing listener fails the operation, whose guards then undo it.
//!
//! Order on dump: pre-dump, network-lock, query-ext-files, post-dump (images complete, tasks frozen, tree not
//! yet killed), status-ready of a lazy dump, and network-unlock if the tree lives on. On restore: pre-restore,
//! setup-namespaces, post-setup-namespaces, orphan-pts-master, post-restore, network-unlock, pre-resume,
//! post-resume. A pre-dump has none. Stages of the network and of namespaces are those of a tree that has its own. The
//! root task's pid is given at every stage once it is known.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use crate::error::{Error, Result, SysContext};
use crate::interrupt;
use crate::options::{Dir, External, LogFd};
use crate::pstree::RealPid;
use crate::sys;

/// A moment at which the outside is told. `Display` gives the name that scripts and clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Before images are streamed.
    PreStream,
    /// Before anything is done to the tasks.
    PreDump,
    /// Images are complete and readable by others, tasks still frozen, network still locked.
    PostDump,
    /// Before the first fork of a restore.
    PreRestore,
    /// All tasks are rebuilt and wait in the restorer.
    PostRestore,
    /// The network must be closed now.
    NetworkLock,
    /// The network may be opened again.
    NetworkUnlock,
    /// The root task exists, its namespaces are empty.
    SetupNamespaces,
    /// Namespaces are filled.
    PostSetupNamespaces,
    /// Tasks are about to run.
    PreResume,
    /// Tasks run.
    PostResume,
    /// The master side of an orphaned pty is handed over.
    OrphanPtsMaster,
    /// A server is ready for its peer.
    StatusReady,
    /// The client may name further external resources.
    QueryExtFiles,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Stage; 14] = [
        Stage::PreStream,
        Stage::PreDump,
        Stage::PostDump,
        Stage::PreRestore,
        Stage::PostRestore,
        Stage::NetworkLock,
        Stage::NetworkUnlock,
        Stage::SetupNamespaces,
        Stage::PostSetupNamespaces,
        Stage::PreResume,
        Stage::PostResume,
        Stage::OrphanPtsMaster,
        Stage::StatusReady,
        Stage::QueryExtFiles,
    ];

    /// The name that scripts find in `CRTOOLS_SCRIPT_ACTION` and RPC clients in `notify.script`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::PreStream => "pre-stream",
            Stage::PreDump => "pre-dump",
            Stage::PostDump => "post-dump",
            Stage::PreRestore => "pre-restore",
            Stage::PostRestore => "post-restore",
            Stage::NetworkLock => "network-lock",
            Stage::NetworkUnlock => "network-unlock",
            Stage::SetupNamespaces => "setup-namespaces",
            Stage::PostSetupNamespaces => "post-setup-namespaces",
            Stage::PreResume => "pre-resume",
            Stage::PostResume => "post-resume",
            Stage::OrphanPtsMaster => "orphan-pts-master",
            Stage::StatusReady => "status-ready",
            Stage::QueryExtFiles => "query-ext-files",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Somebody who is told of stages, and whose failure fails the operation.
pub trait Notifier: Send + Sync + fmt::Debug {
    /// Tells of `stage` and waits for the answer. `root` is the root task's pid in our pid namespace, once
    /// there is one.
    fn notify(&self, stage: Stage, root: Option<RealPid>) -> Result<()>;

    /// Hands over the master of an orphaned pty. `Ok(false)`: nobody wants it.
    fn orphan_pts_master(&self, master: BorrowedFd<'_>) -> Result<bool> {
        let _ = master;
        Ok(false)
    }

    /// Asks for further external resources (stage query-ext-files of a dump).
    fn query_external(&self) -> Result<Vec<External>> {
        Ok(Vec::new())
    }
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoNotifier;

impl Notifier for NoNotifier {
    fn notify(&self, _: Stage, _: Option<RealPid>) -> Result<()> {
        Ok(())
    }
}

/// Several listeners, told in order; the first failure ends it.
#[derive(Debug, Clone)]
pub struct Notifiers(pub Vec<Arc<dyn Notifier>>);

impl Notifier for Notifiers {
    fn notify(&self, stage: Stage, root: Option<RealPid>) -> Result<()> {
        self.0.iter().try_for_each(|n| n.notify(stage, root))
    }

    fn orphan_pts_master(&self, master: BorrowedFd<'_>) -> Result<bool> {
        for n in &self.0 {
            if n.orphan_pts_master(master)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn query_external(&self) -> Result<Vec<External>> {
        let mut all = Vec::new();
        for n in &self.0 {
            all.extend(n.query_external()?);
        }
        Ok(all)
    }
}

/// The programs of `--action-script`.
///
/// Each runs without arguments, in our environment plus `CRTOOLS_SCRIPT_ACTION`, `CRTOOLS_IMAGE_DIR` and, when
/// known, `CRTOOLS_INIT_PID`; standard input is empty, the outputs go to the log. All are run even when one
/// fails.
#[derive(Debug, Clone)]
pub struct ActionScripts {
    /// The programs, in the order they are run.
    pub paths: Vec<PathBuf>,
    /// The images folder.
    pub images_dir: Dir,
    /// Where their output goes.
    pub log: LogFd,
}

impl ActionScripts {
    fn run(&self, path: &std::path::Path, stage: Stage, root: Option<RealPid>) -> Result<()> {
        let mut command = Command::new(path);
        command
            .env("CRTOOLS_SCRIPT_ACTION", stage.name())
            .env("CRTOOLS_IMAGE_DIR", format!("/proc/{}/fd/{}", std::process::id(), self.images_dir.raw_fd()))
            .stdin(Stdio::null())
            .stdout(Stdio::from(sys::fd::duplicate(self.log.get())?))
            .stderr(Stdio::from(sys::fd::duplicate(self.log.get())?));
        if let Some(pid) = root {
            command.env("CRTOOLS_INIT_PID", pid.to_string());
        }
        let status = wait(command.spawn().call("execve")?)?;
        if status.success() { Ok(()) } else { Err(Error::host(format!("the script ended with {status}"))) }
    }
}

/// Waits for a script. It may take as long as it likes, but not keep us from being stopped: it is killed then.
fn wait(mut child: Child) -> Result<ExitStatus> {
    let stopped = match sys::pidfd::open(RealPid(child.id() as i32), 0) {
        Ok(pidfd) => interrupt::wait_readable(pidfd.as_fd()),
        // Before Linux 5.3 there is nothing to poll.
        Err(e) if e.errno() == Some(libc::ENOSYS) => Ok(()),
        Err(e) => Err(e),
    };
    if stopped.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().call("waitpid")?;
    stopped.map(|()| status)
}

impl Notifier for ActionScripts {
    fn notify(&self, stage: Stage, root: Option<RealPid>) -> Result<()> {
        log::debug!("Running {stage} scripts");
        let mut first = Ok(());
        for path in &self.paths {
            let done = self
                .run(path, stage, root)
                .map_err(|e| e.during(format!("action script {} at stage {stage}", path.display())));
            first = first.and(done);
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &std::path::Path, text: &str) -> PathBuf {
        let path = dir.join("script");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        path
    }

    #[test]
    fn scripts_see_stage_images_and_pid() {
        let tmp = tempfile::tempdir().unwrap();
        let path = script(
            tmp.path(),
            "echo \"$CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID\"; : > \"$CRTOOLS_IMAGE_DIR/seen\"",
        );
        let log = fs::File::create(tmp.path().join("log")).unwrap();
        let scripts = ActionScripts {
            paths: vec![path],
            images_dir: Dir::open(tmp.path()).unwrap(),
            log: LogFd::new(log.as_raw_fd()),
        };
        scripts.notify(Stage::PostDump, Some(RealPid(77))).unwrap();
        scripts.notify(Stage::PreDump, None).unwrap();
        assert!(tmp.path().join("seen").exists());
        assert_eq!(fs::read_to_string(tmp.path().join("log")).unwrap(), "post-dump 77\npre-dump \n");
    }

    #[test]
    fn a_failing_script_is_named_with_its_stage() {
        let tmp = tempfile::tempdir().unwrap();
        let path = script(tmp.path(), "exit 3");
        let scripts = ActionScripts {
            paths: vec![path.clone()],
            images_dir: Dir::open(tmp.path()).unwrap(),
            log: LogFd::default(),
        };
        let e = scripts.notify(Stage::NetworkLock, None).unwrap_err().to_string();
        assert!(e.contains("network-lock") && e.contains(path.to_str().unwrap()) && e.contains('3'), "{e}");
    }

    #[test]
    fn the_first_failure_among_listeners_ends_it() {
        #[derive(Debug)]
        struct No;
        impl Notifier for No {
            fn notify(&self, _: Stage, _: Option<RealPid>) -> Result<()> {
                Err(Error::host("no"))
            }
        }
        let both = Notifiers(vec![Arc::new(NoNotifier), Arc::new(No)]);
        assert!(both.notify(Stage::PreResume, None).is_err());
        assert!(both.query_external().unwrap().is_empty());
    }

    #[test]
    fn stage_names_are_those_of_criu_and_unique() {
        let mut names: Vec<_> = Stage::ALL.iter().map(|s| s.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 14);
        assert!(names.contains(&"post-setup-namespaces"));
    }
}
