//! The requests of runc, crun and podman (which runs one of the two).

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sched::CloneFlags;
use rcriu_images::pb::{CgroupRoot, CriuCgMode, CriuOpts, CriuReqType, CriuResp, ExtMountMap, InheritFd};
use rcriu_tests::cycle::compare;
use rcriu_tests::home::masked;
use rcriu_tests::program::wait_gone;
use rcriu_tests::rpc::{Client, Told, answer_notifications, request, with};
use rcriu_tests::{Case, Engine, Home};

use super::{Output, Running, echoes};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Runtime {
    Runc,
    Crun,
}

/// Devices that runc names although they are no mounts.
const DEVICES: [&str; 6] = ["/dev/null", "/dev/random", "/dev/full", "/dev/tty", "/dev/zero", "/dev/urandom"];

/// What every runtime asks before anything else, with a worker of its own.
fn asks_the_version(opts: Option<CriuOpts>) -> Result<()> {
    let client = Client::swrk(quiet()?);
    let mut asked = request(CriuReqType::Version);
    asked.opts = opts;
    let version = client.ask(&asked).version.context("no version")?;
    ensure!(version.major_number * 10_000 + version.minor_number * 100 >= 31_601, "{version:?}");
    ensure!(client.end() == 0, "the worker fails");
    Ok(())
}

/// A worker whose output is the client's to check.
fn quiet() -> Result<Command> {
    let mut command = Engine::rcriu()?.command(&[]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

impl Runtime {
    /// Mounts from outside, with what they are on the host.
    fn mounts(self, of: &Running, restored: bool) -> Vec<ExtMountMap> {
        let mut all = Vec::new();
        let mut add = |key: &str, val: &str| {
            let val = if restored { val } else { key };
            all.push(ExtMountMap { key: key.into(), val: val.into() });
        };
        for hierarchy in of.groups.hierarchies() {
            let inside = format!("/sys/fs/cgroup/{}", hierarchy.name);
            add(&inside, &hierarchy.group.display().to_string());
        }
        add("/etc/hosts", &of.hosts());
        if let Some(path) = masked() {
            add(&path, "/dev/null");
        }
        if self == Runtime::Runc {
            DEVICES.iter().for_each(|device| add(device, device));
            // It says this one twice.
            add("/dev/null", "/dev/null");
        }
        all
    }

    /// What dump and restore share.
    fn options(self, of: &Running, (images, work): (&File, &File), restored: bool) -> CriuOpts {
        CriuOpts {
            images_dir_fd: images.as_raw_fd(),
            work_dir_fd: Some(work.as_raw_fd()),
            ext_unix_sk: Some(false),
            tcp_established: Some(true),
            shell_job: Some(false),
            file_locks: Some(true),
            log_level: Some(4),
            log_file: Some(if restored { "restore.log" } else { "dump.log" }.into()),
            ext_mnt: self.mounts(of, restored),
            manage_cgroups: Some(true),
            orphan_pts_master: Some(true),
            config_file: (self == Runtime::Runc).then(|| "/etc/criu/runc.conf".into()),
            empty_ns: (self == Runtime::Runc).then_some(CloneFlags::CLONE_NEWNET.bits().cast_unsigned()),
            notify_scripts: (restored || self == Runtime::Runc).then_some(true),
            ..CriuOpts::default()
        }
    }

    fn dump(self, of: &Running, folders: (&File, &File), leave_running: bool) -> Result<()> {
        asks_the_version((self == Runtime::Crun).then(CriuOpts::default))?;
        let opts = CriuOpts {
            pid: Some(of.program.pid()),
            leave_running: Some(leave_running),
            root: of.program.root().map(|root| root.display().to_string()),
            auto_dedup: (self == Runtime::Runc).then_some(false),
            lazy_pages: (self == Runtime::Runc).then_some(false),
            freeze_cgroup: Some(of.groups.freezer()?.display().to_string()),
            manage_cgroups_mode: (self == Runtime::Crun).then(|| CriuCgMode::Soft.into()),
            ..self.options(of, folders, false)
        };
        let client = Client::swrk(quiet()?);
        client.send(&with(CriuReqType::Dump, opts));
        let Told { names, resp, .. } = answer_notifications(&client);
        succeeded(&resp)?;
        ensure!(resp.dump.context("no answer to a dump")?.restored == Some(false));
        let mut expected = vec!["pre-dump", "network-lock", "query-ext-files", "post-dump"];
        match self {
            Runtime::Crun => expected.clear(),
            Runtime::Runc if leave_running => expected.push("network-unlock"),
            Runtime::Runc => {}
        }
        ensure!(names == expected, "told: {names:?}");
        ensure!(client.end() == 0, "the worker fails");
        Ok(())
    }

    /// Restores what was dumped from `of`, whose error output was the pipe called `pipe`; gives its new output.
    fn restore(self, of: &Running, folders: (&File, &File), pipe: Option<String>) -> Result<File> {
        asks_the_version(None)?;
        let (reader, writer) = std::io::pipe()?;
        let mut command = Engine::rcriu()?.command(&[]);
        command.stdout(writer.try_clone()?).stderr(writer);
        let inherit = |fd| pipe.iter().map(move |key| InheritFd { key: key.clone(), fd });
        let root = |(controllers, path): (&str, String)| CgroupRoot { ctrl: Some(controllers.into()), path };
        let opts = CriuOpts {
            root: Some(of.bound_root("criu-root")?),
            rst_sibling: Some(true),
            evasive_devices: (self == Runtime::Runc).then_some(true),
            inherit_fd: inherit(1).chain(inherit(2)).collect(),
            cg_root: of.groups.roots().filter(|_| self == Runtime::Runc).map(root).collect(),
            ..self.options(of, folders, true)
        };
        // runc puts the worker into the groups of the container, crun does not.
        let client = match self {
            Runtime::Runc => of.groups.within(|| Ok(Client::swrk(command)))?,
            Runtime::Crun => Client::swrk(command),
        };
        client.send(&with(CriuReqType::Restore, opts));
        let Told { names, resp, master } = answer_notifications(&client);
        succeeded(&resp)?;
        let orphan = master.as_ref().map(|_| "orphan-pts-master");
        let before = ["pre-restore", "setup-namespaces*", "post-setup-namespaces"];
        let after = ["post-restore*", "network-unlock", "pre-resume", "post-resume"];
        let expected: Vec<&str> = before.into_iter().chain(orphan).chain(after).collect();
        ensure!(names == expected, "told: {names:?}");
        of.program.moved(resp.restore.context("no answer to a restore")?.pid);
        ensure!(client.end() == 0, "the worker fails");
        Ok(master.map_or_else(|| File::from(std::os::fd::OwnedFd::from(reader)), File::from))
    }
}

fn succeeded(resp: &CriuResp) -> Result<()> {
    ensure!(resp.success && resp.cr_errmsg.is_none(), "{resp:?}");
    Ok(())
}

/// Left running, dumped, and restored.
fn whole(runtime: Runtime, home: Home, output: Output) -> Result<()> {
    let mut container = Running::start(home, output, &["home"])?;
    // runc leaves the network empty, and fills it itself.
    let state = |container: &Running| {
        let state = container.program.state()?;
        anyhow::Ok(state.without(|name| runtime == Runtime::Runc && name.contains("/net/")))
    };
    let before = state(&container)?;
    let (images, work) = (container.folder("first")?, container.folder("log of first")?);
    runtime.dump(&container, (&images, &work), true)?;
    compare(&before, &state(&container)?).context("the dump changed what it left running")?;

    let (images, work) = (container.folder("images")?, container.folder("log")?);
    let tree = container.program.tree()?;
    let pipe = match output {
        Output::Pipe => Some(fs::read_link(format!("/proc/{}/fd/2", container.program.pid()))?),
        Output::Terminal | Output::File | Output::Fifo => None,
    };
    runtime.dump(&container, (&images, &work), false)?;
    wait_gone(&tree)?;
    let pipe = pipe.map(|link| link.display().to_string());
    if output == Output::Fifo {
        // Nobody reads while it is restored, and it does not wait for somebody.
        container.output = File::open("/dev/null")?;
    }
    let given = runtime.restore(&container, (&images, &work), pipe)?;
    // A file goes on where it is: what the worker has for output is another thing.
    match output {
        Output::Pipe | Output::Terminal => container.output = given,
        Output::File => {}
        Output::Fifo => container.output = File::open(container.scratch.path().join("output"))?,
    }
    compare(&before, &state(&container)?)?;
    match output {
        Output::Terminal => echoes(&mut container.output)?,
        Output::Pipe | Output::File | Output::Fifo => {
            let theirs = fs::read_link(format!("/proc/{}/fd/2", container.program.pid()))?;
            let ours = fs::read_link(format!("/proc/self/fd/{}", container.output.as_raw_fd()))?;
            ensure!(theirs == ours, "its output is {}, not {}", theirs.display(), ours.display());
        }
    }
    container.program.verify()
}

/// A failed restore answers at once, with the reason, and leaves nothing.
fn failing(point: &'static str) -> Result<()> {
    let container = Running::start(Home::new(), Output::Pipe, &["tree", "2", "2"])?;
    let (images, work) = (container.folder("images")?, container.folder("log")?);
    let tree = container.program.tree()?;
    Runtime::Crun.dump(&container, (&images, &work), false)?;
    wait_gone(&tree)?;
    let root = Some(container.bound_root("criu-root")?);
    let opts = CriuOpts {
        root,
        rst_sibling: Some(true),
        ..Runtime::Crun.options(&container, (&images, &work), true)
    };
    super::siblings::fails(&with(CriuReqType::Restore, opts), point)
}

/// A container with users of its own that was dumped.
struct Dumped {
    container: Running,
    opts: CriuOpts,
    /// Its root.
    user: u32,
    /// What the options name by number.
    _folders: [File; 2],
}

/// One whose images belong to `owner` alone; `None` is its root.
fn owned_by(owner: Option<u32>) -> Result<Dumped> {
    let container = Running::start(Home::new().without_init().with_users(), Output::Pipe, &["home"])?;
    let (images, work) = (container.folder("images")?, container.folder("log")?);
    let tree = container.program.tree()?;
    let map = fs::read_to_string(format!("/proc/{}/uid_map", container.program.pid()))?;
    let user: u32 = map.split_whitespace().nth(1).context("no map")?.parse()?;
    Runtime::Crun.dump(&container, (&images, &work), false)?;
    wait_gone(&tree)?;
    let path = container.scratch.path().join("images");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
    give(&path, owner.unwrap_or(user))?;
    let opts = CriuOpts {
        root: Some(container.bound_root("criu-root")?),
        ..Runtime::Crun.options(&container, (&images, &work), true)
    };
    Ok(Dumped { container, opts, user, _folders: [images, work] })
}

/// Gives a folder and all that is in it to a user.
fn give(path: &Path, user: u32) -> Result<()> {
    for entry in fs::read_dir(path)? {
        chown(entry?.path(), Some(user), Some(user))?;
    }
    Ok(chown(path, Some(user), Some(user))?)
}

fn comes_back(dumped: &Dumped) -> Result<()> {
    let (container, client) = (&dumped.container, Client::swrk(quiet()?));
    client.send(&with(CriuReqType::Restore, dumped.opts.clone()));
    let resp = answer_notifications(&client).resp;
    succeeded(&resp)?;
    container.program.moved(resp.restore.context("no answer to a restore")?.pid);
    container.program.verify()
}

/// As LXD gives them to the container's root, and as `lxc-checkpoint` leaves them, to root of the host.
fn images_of(owner: Option<u32>) -> Result<()> {
    comes_back(&owned_by(owner)?)
}

/// Images of somebody else, which root of the tree's user namespace cannot reach: restored when they are given to it.
fn unreadable() -> Result<()> {
    let dumped = owned_by(Some(12_345))?;
    let client = Client::swrk(quiet()?);
    client.send(&with(CriuReqType::Restore, dumped.opts.clone()));
    let resp = answer_notifications(&client).resp;
    let said = resp.cr_errmsg();
    ensure!(!resp.success && said.contains(".img: ") && said.contains("chown -R"), "{resp:?}");
    client.end();
    give(&dumped.container.scratch.path().join("images"), dumped.user)?;
    comes_back(&dumped)
}

pub fn cases() -> Vec<Case> {
    let name = |text: &str| format!("containers: {text}");
    let plain = || Home::new().without_init();
    let cases = [
        ("runc, with pipes", Runtime::Runc, plain(), Output::Pipe),
        ("runc, with a terminal", Runtime::Runc, plain(), Output::Terminal),
        ("runc, with a file of the host", Runtime::Runc, plain(), Output::File),
        ("runc, with a named pipe of the host", Runtime::Runc, plain(), Output::Fifo),
        ("runc, in a cgroup namespace", Runtime::Runc, plain().with_groups(), Output::Pipe),
        ("crun, with pipes", Runtime::Crun, plain(), Output::Pipe),
        ("crun, with a file of the host", Runtime::Crun, plain(), Output::File),
        ("crun, with a terminal", Runtime::Crun, plain(), Output::Terminal),
        (
            "crun, in user and cgroup namespaces",
            Runtime::Crun,
            plain().with_users().with_groups(),
            Output::Pipe,
        ),
    ];
    let whole = cases.map(|(text, runtime, home, output)| {
        Case::new(name(&format!("checkpoint and restore by {text}")), move || whole(runtime, home, output))
    });
    let failing = ["restore-task-born", "restore-forked", "restore-caught"].map(|point| {
        Case::new(name(&format!("an error at {point} in a restore by crun is told at once")), move || {
            failing(point)
        })
    });
    let images = [
        Case::new(name("images that the tree's root cannot read"), unreadable),
        Case::new(name("images of the tree's root"), || images_of(None)),
        Case::new(name("images of the host's root, for a tree with users of its own"), || images_of(Some(0))),
    ];
    whole.into_iter().chain(failing).chain(images).collect()
}
