//! What a client asks for, and the answers.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rcriu_engine::error::{Error, Kind, Result, SysContext};
use rcriu_engine::interrupt;
use rcriu_engine::mm::xfer::Listener;
use rcriu_engine::process::{self, Forked};
use rcriu_engine::pstree::RealPid;
use rcriu_engine::scripts::Notifier;
use rcriu_images::pb::{
    CriuDumpResp, CriuFeatures, CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType, CriuResp,
    CriuRestoreResp, CriuVersion,
};

use super::connection::Connection;
use super::notify::Client;
use super::{Trust, prepare};
use crate::cli::{self, Action, Folders, Raw, checked};
use crate::log as logfile;
use crate::{run, servers};

/// Serves requests of one client until it needs nothing more.
pub fn serve(client: Connection, raw: &Raw, trust: Trust) -> Result<ExitCode> {
    let mut session = Session { client, base: raw.clone(), trust, pre_dumped: false };
    loop {
        let Some(request) = session.client.receive()? else {
            ::log::info!("the client is gone");
            return Ok(ExitCode::FAILURE);
        };
        interrupt::reset();
        match session.answer(&request)? {
            Then::More => {}
            Then::End(code) => return Ok(code),
        }
    }
}

/// How a page server lives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Serves {
    /// In a session of its own.
    Alone,
    /// As our child, which the client waits for through us.
    AsChild,
}

/// What to do after an answer.
enum Then {
    More,
    End(ExitCode),
}

struct Session {
    client: Connection,
    /// Options of configuration files.
    base: Raw,
    trust: Trust,
    /// A pre-dump was done: only another one or the dump may follow.
    pre_dumped: bool,
}

impl Session {
    fn answer(&mut self, request: &CriuReq) -> Result<Then> {
        use CriuReqType as T;
        let kind = T::try_from(request.r#type).unwrap_or(T::Empty);
        if let Err(e) = self.in_order(request, kind) {
            self.client.send(&failure(T::Empty, &e), None)?;
            return Ok(Then::End(ExitCode::FAILURE));
        }
        // A request without options names no folder.
        let none = || CriuOpts { images_dir_fd: -1, ..CriuOpts::default() };
        let opts = request.opts.clone().unwrap_or_else(none);
        let ok = match kind {
            T::Dump => self.dump(&opts)?,
            T::PreDump => {
                self.pre_dumped = self.pre_dump(&opts, kind)?;
                if self.pre_dumped {
                    return Ok(Then::More);
                }
                false
            }
            T::SinglePreDump => self.pre_dump(&opts, kind)?,
            T::Restore => self.restore(&opts)?,
            T::Check => self.check(request.opts.as_ref())?,
            T::FeatureCheck => self.features(request.features.unwrap_or_default())?,
            T::Version => self.version()?,
            T::WaitPid => self.wait_pid(request.pid())?,
            T::PageServer => self.page_server(&opts, Serves::Alone)?,
            T::PageServerChld => self.page_server(&opts, Serves::AsChild)?,
            T::CpuinfoDump => self.cpuinfo(&opts, kind, Action::CpuinfoDump)?,
            T::CpuinfoCheck => self.cpuinfo(&opts, kind, Action::CpuinfoCheck)?,
            T::Empty | T::Notify => false,
        };
        if ok && request.keep_open() {
            return Ok(Then::More);
        }
        Ok(Then::End(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
    }

    /// Whether a request makes sense here and now.
    fn in_order(&self, request: &CriuReq, kind: CriuReqType) -> Result<()> {
        use CriuReqType as T;
        if matches!(kind, T::Empty | T::Notify) {
            return Err(Error::usage(format!("request type {} makes no sense", request.r#type)));
        }
        // These leave nothing behind that the next request would find.
        let repeatable = matches!(
            kind,
            T::PageServer
                | T::PageServerChld
                | T::CpuinfoDump
                | T::CpuinfoCheck
                | T::FeatureCheck
                | T::Version
        );
        if request.keep_open() && !repeatable {
            return Err(Error::usage("keep_open does not go with this request"));
        }
        if self.pre_dumped && !matches!(kind, T::PreDump | T::Dump) {
            return Err(Error::usage("after a pre-dump only another one or a dump may follow"));
        }
        Ok(())
    }

    fn cpuinfo(&self, opts: &CriuOpts, kind: CriuReqType, action: Action) -> Result<bool> {
        let done = self.prepare(opts, action).and_then(|(raw, folders)| match action {
            Action::CpuinfoDump => run::cpuinfo_dump(&folders.images),
            _ => run::cpuinfo_check(&folders.images, raw.cpu_cap),
        });
        if let Err(e) = &done {
            cli::log_failure(action, e);
        }
        self.client.send(&outcome(kind, &done), None)?;
        Ok(done.is_ok())
    }

    /// Starts a page server and tells where it listens; `WAIT_PID` waits for one that is our child.
    fn page_server(&self, opts: &CriuOpts, how: Serves) -> Result<bool> {
        let done = self
            .prepare(opts, Action::PageServer)
            .and_then(|(raw, folders)| self.start_server(&raw, &folders, how))
            .inspect_err(|e| cli::log_failure(Action::PageServer, e));
        let mut resp = outcome(CriuReqType::PageServer, &done);
        resp.ps = done.as_ref().ok().map(|(pid, port)| CriuPageServerInfo {
            pid: Some(pid.0),
            port: Some(i32::from(*port)),
            ..CriuPageServerInfo::default()
        });
        self.client.send(&resp, None)?;
        Ok(done.is_ok())
    }

    fn start_server(&self, raw: &Raw, folders: &Folders, how: Serves) -> Result<(RealPid, u16)> {
        let listener = Listener::bind(&servers::listening(raw))?;
        // A socket that was handed over has no port.
        let port = if raw.ps_socket.is_some() { 0 } else { listener.port()? };
        match process::fork()? {
            Forked::Parent(pid) => Ok((pid, port)),
            Forked::Child => {
                self.client.leave();
                let ready = if how == Serves::Alone { process::leave_terminal() } else { Ok(()) };
                let served = ready.and_then(|()| servers::serve_pages(raw, folders, listener));
                let failed = served.inspect_err(|e| cli::log_failure(Action::PageServer, e)).is_err();
                std::process::exit(i32::from(failed))
            }
        }
    }

    fn dump(&self, opts: &CriuOpts) -> Result<bool> {
        let done = self.try_dump(opts, Action::Dump);
        let mut resp = outcome(CriuReqType::Dump, &done);
        resp.dump = Some(CriuDumpResp { restored: Some(false) });
        let sent = self.client.send(&resp, None);
        // A client that had itself dumped may be dead now: nobody reads the answer.
        if done.is_err() || opts.pid.is_some() {
            sent?;
        }
        Ok(done.is_ok())
    }

    fn pre_dump(&self, opts: &CriuOpts, kind: CriuReqType) -> Result<bool> {
        let done = self.try_dump(opts, Action::PreDump);
        self.client.send(&outcome(kind, &done), None)?;
        Ok(done.is_ok())
    }

    fn try_dump(&self, opts: &CriuOpts, action: Action) -> Result<()> {
        let (raw, folders) = self.prepare(opts, action)?;
        let options = checked::dump(&raw, &folders, self.listener(opts));
        let done = options.and_then(|options| run::dump(action, &options, raw.display_stats));
        done.inspect_err(|e| cli::log_failure(action, e))
    }

    fn restore(&self, opts: &CriuOpts) -> Result<bool> {
        let command: Vec<OsString> = opts.exec_cmd.iter().map(OsString::from).collect();
        let done = self.prepare(opts, Action::Restore).and_then(|(raw, folders)| {
            checked::restore(&raw, &folders, &command, self.listener(opts))
                .and_then(|options| run::restore(&options, raw.display_stats))
                .inspect_err(|e| cli::log_failure(Action::Restore, e))
        });
        let mut resp = outcome(CriuReqType::Restore, &done);
        resp.restore = Some(CriuRestoreResp { pid: done.as_ref().map_or(-1, |pid| pid.0) });
        self.client.send(&resp, None)?;
        if done.is_ok() && !command.is_empty() {
            return Err(execute(&command));
        }
        Ok(done.is_ok())
    }

    fn check(&self, opts: Option<&CriuOpts>) -> Result<bool> {
        let prepared = match opts.filter(|o| o.log_file.is_some() && !o.log_to_stderr()) {
            Some(opts) => self.prepare(opts, Action::Check).map(drop),
            None => Ok(()),
        };
        let done = prepared.and_then(|()| crate::check::required());
        self.client.send(&outcome(CriuReqType::Check, &done), None)?;
        Ok(done.is_ok())
    }

    fn features(&self, asked: CriuFeatures) -> Result<bool> {
        let has = |asked: Option<bool>, name: &str| Some(asked == Some(true) && crate::check::has(name));
        let features = CriuFeatures {
            mem_track: has(asked.mem_track, "mem_dirty_track"),
            lazy_pages: has(asked.lazy_pages, "uffd-noncoop"),
            pidfd_store: has(asked.pidfd_store, "pidfd_store"),
        };
        let resp = CriuResp { features: Some(features), ..success(CriuReqType::FeatureCheck) };
        self.client.send(&resp, None)?;
        Ok(true)
    }

    fn version(&self) -> Result<bool> {
        let mut numbers = crate::CRIU_VERSION.split('.').map(|n| n.parse().unwrap_or(0));
        let version = CriuVersion {
            major_number: numbers.next().unwrap_or(0),
            minor_number: numbers.next().unwrap_or(0),
            sublevel: numbers.next(),
            ..CriuVersion::default()
        };
        let resp = CriuResp { version: Some(version), ..success(CriuReqType::Version) };
        self.client.send(&resp, None)?;
        Ok(true)
    }

    /// Waits for a child of ours: a page server that an earlier request started.
    fn wait_pid(&self, pid: u32) -> Result<bool> {
        let waited = i32::try_from(pid)
            .map_err(|_| Error::usage(format!("{pid} is no pid")))
            .and_then(|pid| waitpid(Pid::from_raw(pid), None).call("waitpid"));
        let mut resp = outcome(CriuReqType::WaitPid, &waited);
        resp.status = waited.as_ref().ok().map(|status| match status {
            WaitStatus::Exited(_, code) => (code & 0xff) << 8,
            WaitStatus::Signaled(_, signal, core) => *signal as i32 | if *core { 0x80 } else { 0 },
            _ => 0,
        });
        self.client.send(&resp, None)?;
        Ok(waited.is_ok())
    }

    fn listener(&self, opts: &CriuOpts) -> Option<Arc<dyn Notifier>> {
        opts.notify_scripts().then(|| Arc::new(Client(self.client.clone())) as Arc<dyn Notifier>)
    }

    /// Everything before the engine; a failure is in the log, if there is one by then.
    fn prepare(&self, opts: &CriuOpts, action: Action) -> Result<(Raw, Folders)> {
        let prepared = prepare::prepare(&self.base, opts, self.client.peer(), self.trust, action);
        prepared
            .and_then(|(raw, folders)| {
                process::check_privileges(raw.unprivileged)?;
                cli::served::check(action, &raw)?;
                Ok((raw, folders))
            })
            .inspect_err(|e| cli::log_failure(action, e))
    }
}

/// Becomes the command of `exec_cmd`, with the log as its output. Returns only on failure.
fn execute(command: &[OsString]) -> Error {
    let log = logfile::settings().fd.get();
    let out = || process::duplicate_descriptor(log).map_or(Stdio::null(), Stdio::from);
    let e = Command::new(&command[0]).args(&command[1..]).stdout(out()).stderr(out()).exec();
    Error::io("execve", &e).during(format!("exec_cmd {}", command[0].display()))
}

fn success(kind: CriuReqType) -> CriuResp {
    CriuResp { r#type: kind.into(), success: true, ..CriuResp::default() }
}

fn outcome<T>(kind: CriuReqType, done: &Result<T>) -> CriuResp {
    match done {
        Ok(_) => success(kind),
        Err(e) => failure(kind, e),
    }
}

/// An answer that says what went wrong. A success never carries a message: clients take it for an error.
fn failure(kind: CriuReqType, e: &Error) -> CriuResp {
    CriuResp {
        r#type: kind.into(),
        success: false,
        cr_errno: errno(e),
        cr_errmsg: Some(logfile::first_error().unwrap_or_else(|| format!("Error: {e}\n"))),
        ..CriuResp::default()
    }
}

/// The number that goes with an error, where there is one.
fn errno(e: &Error) -> Option<i32> {
    match e.kind() {
        Kind::Usage(_) => Some(libc::EBADRQC),
        Kind::TaskDied(_) => Some(libc::ESRCH),
        Kind::Unsupported(_) => Some(libc::ENOTSUP),
        Kind::TimedOut => Some(libc::ETIMEDOUT),
        Kind::Interrupted(_) => Some(libc::EINTR),
        Kind::Sys { errno, .. } => Some(*errno),
        Kind::Told { errno, .. } => Some(*errno).filter(|e| *e != 0),
        Kind::Image(_) | Kind::Host(_) | Kind::Bug(_) => None,
    }
}
