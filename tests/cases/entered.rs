//! Namespaces that a restored tree enters: joined ones, those that stayed outside, an empty network, and files of
//! namespaces.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::{Case, Cycle, Images, Program, events::PidFd, program::wait_gone, runner::skip};

const NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
/// Name, flag, and the file by which a new one is found.
const KINDS: [(&str, CloneFlags, &str); 5] = [
    ("net", CloneFlags::CLONE_NEWNET, "net"),
    ("uts", CloneFlags::CLONE_NEWUTS, "uts"),
    ("ipc", CloneFlags::CLONE_NEWIPC, "ipc"),
    ("time", NEWTIME, "time_for_children"),
    ("mnt", CloneFlags::CLONE_NEWNS, "mnt"),
];

/// Does `act` in a thread with namespaces of its own.
fn within<T: Send>(flags: CloneFlags, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let acting = scope.spawn(|| {
            let also = match flags.contains(CloneFlags::CLONE_NEWNS) {
                true => CloneFlags::CLONE_FS,
                false => CloneFlags::empty(),
            };
            match unshare(flags | also) {
                Err(e @ (Errno::EPERM | Errno::EINVAL)) => Err(skip(format!("no new namespaces: {e}"))),
                other => {
                    other.context("unshare")?;
                    act()
                }
            }
        });
        acting.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
    })
}

/// A new namespace, which commands that are started find by the number of the descriptor.
fn fresh(flag: CloneFlags, file: &str) -> Result<OwnedFd> {
    let path = format!("/proc/thread-self/ns/{file}");
    let namespace: OwnedFd = within(flag, || File::open(&path).context(path))?.into();
    fcntl(&namespace, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    Ok(namespace)
}

fn number(fd: &OwnedFd) -> Result<u64> {
    Ok(nix::sys::stat::fstat(fd).context("fstat")?.st_ino)
}

/// Number of the namespace a process is in.
fn of(pid: i32, kind: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/ns/{kind}");
    Ok(std::fs::metadata(&path).context(path)?.ino())
}

fn joined(kind: &str, flag: CloneFlags, file: &str) -> Result<()> {
    let program = Program::start("eventfd", &[])?;
    let namespace = fresh(flag, file)?;
    ensure!(of(program.pid(), kind)? != number(&namespace)?, "it is there already");
    let (cycle, images) = (Cycle::new()?, Images::new()?);
    cycle.dump(&program, &images)?;
    let join = format!("{kind}:/proc/self/fd/{}", namespace.as_raw_fd());
    cycle.try_restore(&images, &["--join-ns", &join])?.ok()?;
    for process in program.tree()? {
        ensure!(of(process.pid().as_raw(), kind)? == number(&namespace)?, "it is somewhere else");
    }
    program.verify()
}

/// All of them at once, also by a pid; a user namespace among them.
fn all_joined() -> Result<()> {
    let mut holder = Holder::start(&["--user", "--map-root-user", "--net", "--uts", "--ipc"])?;
    // Alone: who is in a user namespace may choose no pid outside of it.
    let program = Program::start("stack", &[])?;
    let (cycle, images) = (Cycle::new()?, Images::new()?);
    cycle.dump(&program, &images)?;
    let kinds = ["user", "net", "uts", "ipc"];
    let joins: Vec<String> = kinds.iter().map(|kind| format!("{kind}:{}", holder.0.id())).collect();
    let args: Vec<&str> = joins.iter().flat_map(|join| ["--join-ns", join]).collect();
    cycle.try_restore(&images, &args)?.ok()?;
    for kind in kinds {
        ensure!(of(program.pid(), kind)? == of(holder.0.id().cast_signed(), kind)?, "{kind}: somewhere else");
    }
    holder.end();
    program.verify()
}

/// A process that keeps namespaces.
struct Holder(Child);

impl Holder {
    fn start(namespaces: &[&str]) -> Result<Holder> {
        let started = Command::new("unshare")
            .args(namespaces)
            .args(["sh", "-c", "echo ready && read x"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = started.map_err(|e| skip(format!("the program unshare: {e}")))?;
        let mut said = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut said)?;
        }
        let holder = Holder(child);
        if said == "ready\n" { Ok(holder) } else { Err(skip("these namespaces cannot be made here")) }
    }

    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

fn bad_joins() -> Result<()> {
    let program = Program::start("eventfd", &[])?;
    let (cycle, images) = (Cycle::new()?, Images::new()?);
    cycle.dump(&program, &images)?;
    let net = fresh(CloneFlags::CLONE_NEWNET, "net")?;
    let net = format!("/proc/self/fd/{}", net.as_raw_fd());
    let (twice, other) = (format!("net:{net}"), format!("uts:{net}"));
    for (args, words) in [
        (&["-J", &twice, "-J", &twice][..], &["--join-ns net", "given twice"][..]),
        (&["-J", &other], &["uts namespace", "setns"]),
    ] {
        cycle.try_restore(&images, args)?.refused()?.says(words)?;
    }
    cycle.restore(&images)?;
    program.verify()
}

/// The network stays outside, and nothing of it is in the images.
fn outer_network() -> Result<()> {
    let program = within(CloneFlags::CLONE_NEWNET, || Program::start("eventfd", &[]))?;
    let net = File::open(format!("/proc/{}/ns/net", program.pid())).context("ns/net")?;
    let net = OwnedFd::from(net);
    fcntl(&net, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    let (cycle, images) = (Cycle::new()?, Images::new()?);
    let tree = program.tree()?;
    let external = |name: &str| Ok::<_, anyhow::Error>(format!("net[{}]{name}", number(&net)?));
    let nameless = cycle.try_dump(program.pid(), &images, &["--external", &external("")?])?;
    nameless.refused()?.says(&["has no name"])?;
    cycle.try_dump(program.pid(), &images, &["--external", &external(":outer")?])?.ok()?;
    wait_gone(&tree)?;
    ensure!(!images.names()?.iter().any(|n| n.starts_with("netdev")), "devices are in the images");
    cycle.try_restore(&images, &[])?.refused()?.says(&["--inherit-fd fd[N]:outer"])?;
    let inherit = format!("fd[{}]:outer", net.as_raw_fd());
    cycle.try_restore(&images, &["--inherit-fd", &inherit])?.ok()?;
    ensure!(of(program.pid(), "net")? == number(&net)?, "it is somewhere else");
    program.verify()
}

/// A tree of a pid namespace whose first process is not among it.
fn outer_processes() -> Result<()> {
    let ours = File::open("/proc/self/ns/pid").context("ns/pid")?;
    match unshare(CloneFlags::CLONE_NEWPID) {
        Err(e @ (Errno::EPERM | Errno::EINVAL)) => return Err(skip(format!("no new pid namespace: {e}"))),
        other => other.context("unshare")?,
    }
    let holder = Holder::start(&["--uts"]);
    // Alone: children would be left to the holder, which reaps nobody.
    let program = Program::start("stack", &[]);
    setns(&ours, CloneFlags::CLONE_NEWPID).context("setns")?;
    let (mut holder, program) = (holder?, program?);
    let pid = File::open(format!("/proc/{}/ns/pid", program.pid())).context("ns/pid")?;
    let pid = OwnedFd::from(pid);
    fcntl(&pid, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    let images = Images::new()?;
    let cycle = Cycle::new()?;
    let refused = cycle.try_dump(program.pid(), &images, &[])?.refused()?;
    refused.says(&["not its first process", "--external pid["])?;
    let (tree, inner) = (program.tree()?, inner(program.pid())?);
    let external = format!("pid[{}]:outer", number(&pid)?);
    cycle.try_dump(program.pid(), &images, &["--external", &external])?.ok()?;
    wait_gone(&tree)?;
    cycle.try_restore(&images, &[])?.refused()?.says(&["--inherit-fd fd[N]:outer"])?;
    let inherit = format!("fd[{}]:outer", pid.as_raw_fd());
    cycle.try_restore(&images, &["--inherit-fd", &inherit, "--pidfile", "pid"])?.ok()?;
    let restored: i32 = std::fs::read_to_string(images.file("pid"))?.trim().parse().context("pidfile")?;
    let process = PidFd::open(Pid::from_raw(restored)).context("the restored task")?;
    let found = (of(restored, "pid")?, self::inner(restored)?);
    process.kill(Signal::SIGTERM);
    wait_gone(&[process])?;
    holder.end();
    ensure!(found == (number(&pid)?, inner), "{found:?}: it is somewhere else");
    ensure!(program.output().lines().last() == Some("PASS"), "{}", program.output());
    Ok(())
}

/// What a process is called in its own pid namespace.
fn inner(pid: i32) -> Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:")).context("NSpid")?;
    Ok(line.split_whitespace().next_back().context("NSpid")?.to_owned())
}

/// Nothing of the network but that it is there.
fn empty_network() -> Result<()> {
    let program = within(CloneFlags::CLONE_NEWNET, || {
        let made = Command::new("ip").args(["link", "add", "name", "left", "type", "dummy"]).status();
        match made {
            Ok(status) if status.success() => Program::start("eventfd", &[]),
            _ => Err(skip("no device of kind dummy can be made with the program ip")),
        }
    })?;
    let (cycle, images) = (Cycle::new()?.with(&["--empty-ns", "net"]), Images::new()?);
    cycle.dump(&program, &images)?;
    ensure!(!images.names()?.iter().any(|n| n.starts_with("netdev")), "devices are in the images");
    cycle.restore(&images)?;
    let devices = std::fs::read_to_string(format!("/proc/{}/net/dev", program.pid()))?;
    ensure!(of(program.pid(), "net")? != of(std::process::id().cast_signed(), "net")?, "it is in ours");
    ensure!(!devices.contains("left:"), "a device came back: {devices}");
    program.verify()
}

/// Files of all its namespaces are those it is in when it is back, of which most are new.
fn files() -> Result<()> {
    let flags = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWCGROUP;
    let program = within(flags, || {
        // Nothing that comes or goes is to be shared with us.
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("mount")?;
        Program::start("namespace-files", &[])
    })?;
    let (cycle, images) = (Cycle::new()?.with(&["--external", "mnt[]"]), Images::new()?);
    cycle.dump(&program, &images)?;
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let joins = KINDS.iter().map(|(kind, flag, file)| {
        Case::new(format!("entered: a tree joins a namespace, {kind}"), move || joined(kind, *flag, file))
    });
    let mut cases: Vec<Case> = joins.collect();
    cases.push(Case::new("entered: a tree joins all namespaces of a process, that of users too", all_joined));
    cases.push(Case::new("entered: what cannot be joined is named", bad_joins));
    cases.push(Case::new("entered: a network that stayed outside", outer_network));
    cases.push(Case::new("entered: a pid namespace that stayed outside", outer_processes));
    cases.push(Case::new("entered: an empty network", empty_network));
    cases.push(Case::new("entered: files of namespaces", files));
    cases
}
