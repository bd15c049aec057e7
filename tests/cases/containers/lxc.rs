//! The command lines of liblxc, below LXC, LXD and Incus.

use std::fs;

use anyhow::{Context, Result, ensure};
use rcriu_tests::cycle::compare;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Engine, Home};

use super::{Groups, Output, Running};

/// Options of every call.
const ALWAYS: [&str; 13] = [
    "--tcp-established",
    "--file-locks",
    "--link-remap",
    "--manage-cgroups=full",
    "--ext-mount-map",
    "auto",
    "--enable-external-sharing",
    "--enable-external-masters",
    "--enable-fs",
    "hugetlbfs",
    "--enable-fs",
    "tracefs",
    "-v4",
];

/// Its arguments for `action`, with images in `folder` and the tree in `groups`.
fn arguments(action: &str, folder: &str, groups: &Groups) -> Vec<String> {
    let mut args: Vec<String> = [&[action], &ALWAYS[..]].concat().into_iter().map(String::from).collect();
    args.extend(["-D".into(), folder.into(), "-o".into(), format!("{folder}/{action}.log")]);
    for (controllers, path) in named(groups) {
        let root = if controllers.is_empty() { path } else { format!("{controllers}:{path}") };
        args.extend(["--cgroup-root".into(), root]);
    }
    args
}

/// Groups that it tells of: those of version 2 only where there are no others.
fn named(groups: &Groups) -> impl Iterator<Item = (&str, String)> {
    let alone = groups.roots().count() == 1;
    groups.roots().filter(move |(controllers, _)| alone || !controllers.is_empty())
}

/// What `lxc-checkpoint` asks first.
fn asks_the_version() -> Result<()> {
    let said = Engine::rcriu()?.run(&["--version"])?.ok()?.stdout;
    let version =
        said.lines().next().and_then(|line| line.strip_prefix("Version: ")).context("no version")?;
    ensure!(("2.0".."9").contains(&version), "{version}");
    Ok(())
}

fn run(args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = Engine::rcriu()?.run(&args)?.ok()?;
    // Of what a restore prints it takes a page, and only when it is over.
    ensure!(done.stdout.is_empty() && done.stderr.is_empty(), "{done:?}");
    Ok(())
}

fn dump(container: &Running, folder: &str, more: &[&str]) -> Result<()> {
    asks_the_version()?;
    let mut args = arguments("dump", folder, &container.groups);
    let freezer =
        container.groups.freezer()?.display().to_string().replacen("/sys/fs/cgroup/", "/sys/fs/cgroup//", 1);
    let pid = container.program.pid().to_string();
    // A mount that is not there, as many of a container's configuration are not.
    args.extend(["--ext-mount-map", "/sys/fs/fuse/connections:sys/fs/fuse/connections"].map(String::from));
    args.extend(["--ext-mount-map", "/etc/hosts:etc/hosts"].map(String::from));
    args.extend(
        ["-t", &pid, "--skip-in-flight", "--freeze-cgroup", &freezer, "--force-irmap"].map(String::from),
    );
    args.extend(more.iter().map(|arg| arg.to_string()));
    run(&args)
}

/// Restores into `groups`; liblxc finds the container by being its parent.
fn restore(container: &Running, folder: &str, groups: &Groups) -> Result<()> {
    let mut args = arguments("restore", folder, groups);
    let hosts = format!("etc/hosts:{}", container.hosts());
    let root = container.bound_root("rootfs")?;
    for option in [
        &["--ext-mount-map", "sys/fs/fuse/connections:/sys/fs/fuse/connections"][..],
        &["--ext-mount-map", &hosts],
        &["--root", &root, "--restore-detached", "--restore-sibling", "--ext-mount-map", "console:"],
    ] {
        args.extend(option.iter().map(|arg| arg.to_string()));
    }
    run(&args)?;
    let (me, thread) = (std::process::id(), nix::unistd::gettid());
    let children = fs::read_to_string(format!("/proc/{me}/task/{thread}/children"))?;
    let first = children.split_whitespace().next().context("no child")?;
    container.program.moved(first.parse()?);
    Ok(())
}

/// Left running and stopped, and started in the same groups or in others.
fn whole(home: Home, elsewhere: bool) -> Result<()> {
    let container = Running::start(home, Output::Pipe, &["home", "net"])?;
    let other = Groups::new()?;
    // In another group, what is seen from outside differs.
    let state = || {
        let state = container.program.state()?;
        anyhow::Ok(
            state.without(|name| elsewhere && ["groups", "mounts"].iter().any(|end| name.ends_with(end))),
        )
    };
    let folder = |name| Ok::<_, anyhow::Error>(container.scratch.path().join(name).display().to_string());
    let before = state()?;
    let seen = mounts_inside(&container)?;
    container.folder("first")?;
    dump(&container, &folder("first")?, &["--leave-running"])?;
    compare(&before, &state()?).context("the dump changed what it left running")?;
    container.folder("images")?;
    let tree = container.program.tree()?;
    dump(&container, &folder("images")?, &[])?;
    wait_gone(&tree)?;
    restore(&container, &folder("images")?, if elsewhere { &other } else { &container.groups })?;
    compare(&before, &state()?)?;
    let now = mounts_inside(&container)?;
    ensure!(seen == now, "groups shown inside were\n{seen}\nand are\n{now}");
    let groups = if elsewhere { &other } else { &container.groups };
    for (controllers, path) in named(groups) {
        let is = crate::cgroups::group_of(&container.program.pid().to_string(), controllers)?;
        ensure!(is == path, "it is in {is} of {controllers}, not in {path}");
    }
    container.program.verify()
}

/// Which groups the container's mounts show it: root and mount point of each.
fn mounts_inside(container: &Running) -> Result<String> {
    let names = ["cgroup", "mnt"];
    // Of the thread that is inside: by a /proc that it has taken along.
    let proc = fs::File::open("/proc")?;
    let table = rcriu_tests::home::inside(container.program.pid(), &names, || {
        use std::io::Read;
        use std::os::fd::AsFd;
        let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
        let fd =
            nix::fcntl::openat(proc.as_fd(), "thread-self/mountinfo", flags, nix::sys::stat::Mode::empty())?;
        let mut text = String::new();
        fs::File::from(fd).read_to_string(&mut text)?;
        Ok(text)
    })?;
    let words = |line: &str| line.split(' ').skip(3).take(2).collect::<Vec<_>>().join(" on ");
    let groups = table.lines().filter(|line| line.contains(" - cgroup"));
    Ok(groups.map(words).collect::<Vec<_>>().join("\n"))
}

pub fn cases() -> Vec<Case> {
    let home = || Home::new().without_init().with_groups();
    let case = |text: &str, home: Home, elsewhere| {
        Case::new(format!("containers: checkpoint and restore by liblxc, {text}"), move || {
            whole(home, elsewhere)
        })
    };
    vec![
        case("in the same groups", home(), false),
        case("in other groups", home(), true),
        case("in a user namespace", home().with_users(), false),
    ]
}
