//! Control groups: membership of tasks and threads, properties, and what happens to groups that are gone or
//! there already. The cases make groups of their own in the pids hierarchy (version 1) and in the unified one.
//!
//! # Safety
//!
//! Calls that nix lacks, with strings and buffers of the length that is passed along.

use std::ffi::{CStr, CString};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rcriu_engine::faults::FAULT;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Images, Program, skip};

/// A group made for one case. Dropped, whoever is in it is killed and it goes.
pub struct Group {
    pub path: PathBuf,
}

/// Where a hierarchy is mounted.
pub fn hierarchy(kind: &str, option: &str) -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let fits = |line: &&str| {
        line.split_once(" - ").is_some_and(|(front, back)| {
            let mut back = back.split(' ');
            front.split(' ').nth(3) == Some("/")
                && back.next() == Some(kind)
                && (option.is_empty() || back.nth(1).is_some_and(|o| o.split(',').any(|o| o == option)))
        })
    };
    let mount = mounts.lines().find(fits).and_then(|l| l.split(' ').nth(4));
    mount.map(PathBuf::from).ok_or_else(|| skip(format!("no {kind} hierarchy {option} is mounted")))
}

impl Group {
    pub fn new(root: &Path) -> Result<Group> {
        // The pid in the namespace of the case would not be unique.
        let unique = tempfile::Builder::new().prefix("rcriu-case-").rand_bytes(12).make(|p| {
            let name = p.file_name().unwrap_or_default();
            Ok(name.to_owned())
        })?;
        let path = root.join(unique.as_file());
        fs::create_dir(&path)
            .map_err(|e| skip(format!("no group can be made in {}: {e}", root.display())))?;
        Ok(Group { path })
    }

    fn below(&self, name: &str) -> Result<Group> {
        let path = self.path.join(name);
        fs::create_dir(&path)?;
        Ok(Group { path })
    }

    pub fn set(&self, file: &str, value: impl ToString) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value.to_string()).with_context(|| format!("writing {}", path.display()))
    }

    fn get(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    fn remove(&self) -> Result<()> {
        fs::remove_dir(&self.path).with_context(|| format!("removing {}", self.path.display()))
    }

    /// As in `/proc/PID/cgroup`.
    pub fn name(&self, root: &Path) -> String {
        format!("/{}", self.path.strip_prefix(root).unwrap_or(&self.path).display())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let _ = fs::remove_dir(&self.path);
    }
}

/// The group of a task or thread (`PID` or `PID/task/TID`) in the hierarchy with these controllers.
pub fn group_of(who: &str, controllers: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{who}/cgroup"))?;
    let line = text.lines().find_map(|l| {
        let (_, rest) = l.split_once(':')?;
        let (names, path) = rest.split_once(':')?;
        (names == controllers).then(|| path.to_owned())
    });
    line.with_context(|| format!("{who} is in no group of {controllers}: {text}"))
}

/// Tids of a program without its main thread.
fn threads(pid: i32) -> Result<Vec<String>> {
    let mut tids = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != pid.to_string() {
            tids.push(name);
        }
    }
    tids.sort();
    Ok(tids)
}

fn groups_come_back() -> Result<()> {
    let root = hierarchy("cgroup", "pids")?;
    let (group, program) = (Group::new(&root)?, Program::start("threads", &["4"])?);
    let part = group.below("part")?;
    group.set("pids.max", 777)?;
    part.set("pids.max", 99)?;
    group.set("cgroup.procs", program.pid())?;
    let apart = threads(program.pid())?.pop().context("no threads")?;
    part.set("tasks", &apart)?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    part.remove()?;
    group.remove()?;
    cycle.restore(&images)?;
    ensure!(group_of(&program.pid().to_string(), "pids")? == group.name(&root), "the task is elsewhere");
    let thread = format!("{}/task/{apart}", program.pid());
    ensure!(group_of(&thread, "pids")? == part.name(&root), "the thread is elsewhere");
    ensure!(group.get("pids.max")? == "777" && part.get("pids.max")? == "99", "limits are lost");
    program.verify()
}

/// Sets an extended attribute; false where a group has none.
fn set_attribute(path: &Path, name: &CStr, value: &[u8]) -> Result<bool> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: strings, and a buffer with its length.
    let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Ok(set == 0)
}

fn attribute(path: &Path, name: &CStr) -> Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut value = vec![0_u8; 100];
    // SAFETY: strings, and a buffer with its length.
    let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(len).context("getxattr")?);
    Ok(value)
}

fn unified_groups_come_back() -> Result<()> {
    let root = hierarchy("cgroup2", "")?;
    let (group, program) = (Group::new(&root)?, Program::start("tree", &["2", "2"])?);
    let part = group.below("part")?;
    group.set("cgroup.max.depth", 3)?;
    // As systemd notes on groups.
    let (note, value) = (c"trusted.delegate", b"1");
    let marked = set_attribute(&group.path, note, value)?;
    let tree = rcriu_tests::state::descendants(&rcriu_tests::state::processes()?, program.pid());
    group.set("cgroup.procs", program.pid())?;
    let child = *tree.iter().find(|p| **p != program.pid()).context("no children")?;
    part.set("cgroup.procs", child)?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    part.remove()?;
    group.remove()?;
    cycle.restore(&images)?;
    ensure!(group_of(&program.pid().to_string(), "")? == group.name(&root), "the root task is elsewhere");
    ensure!(group_of(&child.to_string(), "")? == part.name(&root), "the child is elsewhere");
    ensure!(group.get("cgroup.max.depth")? == "3", "the depth is lost");
    ensure!(!marked || attribute(&group.path, note)? == value, "the attribute is lost");
    program.verify()
}

fn a_frozen_group_is_frozen_again() -> Result<()> {
    let root = hierarchy("cgroup2", "")?;
    let (group, program) = (Group::new(&root)?, Program::start("sleeper", &[])?);
    group.set("cgroup.procs", program.pid())?;
    group.set("cgroup.freeze", 1)?;
    let path = group.path.to_str().context("path")?.to_owned();
    let (images, tree) = (Images::new()?, program.tree()?);
    let cycle = Cycle::new()?;
    cycle.try_dump(program.pid(), &images, &["--freeze-cgroup", &path])?.ok()?;
    group.set("cgroup.freeze", 0)?;
    wait_gone(&tree)?;
    group.remove()?;
    cycle.restore(&images)?;
    ensure!(group.get("cgroup.freeze")? == "1", "the group runs");
    group.set("cgroup.freeze", 0)?;
    program.verify()
}

/// A program in a group with a limit, dumped.
fn dumped() -> Result<(PathBuf, Group, Program, Images)> {
    let root = hierarchy("cgroup", "pids")?;
    let (group, program, images) = (Group::new(&root)?, Program::start("sleeper", &[])?, Images::new()?);
    group.set("pids.max", 777)?;
    group.set("cgroup.procs", program.pid())?;
    Cycle::new()?.dump(&program, &images)?;
    Ok((root, group, program, images))
}

fn what_stands_there_stays() -> Result<()> {
    let (root, group, program, images) = dumped()?;
    group.set("pids.max", 55)?;
    Cycle::new()?.try_restore(&images, &["--manage-cgroups=strict"])?.refused()?.says(&["exists already"])?;
    Cycle::new()?.restore(&images)?;
    ensure!(group.get("pids.max")? == "55", "the default changes groups that exist");
    ensure!(group_of(&program.pid().to_string(), "pids")? == group.name(&root), "the task is elsewhere");
    program.verify()
}

fn full_sets_what_stands_there() -> Result<()> {
    let (_, group, program, images) = dumped()?;
    group.set("pids.max", 55)?;
    Cycle::new()?.try_restore(&images, &["--manage-cgroups=full"])?.ok()?;
    ensure!(group.get("pids.max")? == "777", "the limit was not set");
    program.verify()
}

fn missing_groups_are_named() -> Result<()> {
    let (_, group, program, images) = dumped()?;
    group.remove()?;
    Cycle::new()?
        .try_restore(&images, &["--manage-cgroups=none"])?
        .refused()?
        .says(&["does not exist", "soft"])?;
    Cycle::new()?.try_restore(&images, &["--manage-cgroups=ignore"])?.ok()?;
    ensure!(
        group_of(&program.pid().to_string(), "pids")? == group_of("self", "pids")?,
        "ignore moves the task"
    );
    program.verify()
}

fn another_root() -> Result<()> {
    let (root, group, program, images) = dumped()?;
    let other = Group::new(&root)?;
    let new = format!("pids:{}/inner", other.name(&root));
    Cycle::new()?.try_restore(&images, &["--cgroup-root", &new])?.ok()?;
    let inner = Group { path: other.path.join("inner") };
    ensure!(
        group_of(&program.pid().to_string(), "pids")? == inner.name(&root),
        "it is not below the new root"
    );
    ensure!(inner.get("pids.max")? == "777", "the limit was lost");
    ensure!(group.get("cgroup.procs")?.is_empty(), "the old group is used");
    program.verify()
}

fn a_failed_restore_takes_groups_back() -> Result<()> {
    let (_, group, program, images) = dumped()?;
    group.remove()?;
    for point in ["restore-forked", "restore-caught"] {
        let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
        let mut command = Engine::rcriu()?.command(&args);
        command.env(FAULT, point);
        Engine::rcriu()?.finish(command)?.refused()?.says(&[point])?;
        ensure!(!group.path.exists(), "after {point} the group is still there");
    }
    fs::create_dir(&group.path)?;
    group.set("pids.max", 55)?;
    let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log", "--manage-cgroups=full"];
    let mut command = Engine::rcriu()?.command(&args);
    command.env(FAULT, "restore-caught");
    Engine::rcriu()?.finish(command)?.refused()?;
    if group.get("pids.max")? != "55" {
        bail!("the limit was not put back");
    }
    Cycle::new()?.restore(&images)?;
    program.verify()
}

fn programs_stay_attached() -> Result<()> {
    let root = hierarchy("cgroup2", "")?;
    let group = Group::new(&root)?;
    let path = group.path.to_str().context("path")?.to_owned();
    let program = Program::start("bpf-program", &[&path])?;
    group.set("cgroup.procs", program.pid())?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    // Attached once only, although a restore has failed in between.
    let args = ["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
    let mut command = Engine::rcriu()?.command(&args);
    command.env(FAULT, "restore-caught");
    Engine::rcriu()?.finish(command)?.refused()?;
    cycle.restore(&images)?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    group.remove()?;
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    type Body = fn() -> Result<()>;
    let all: &[(&str, Body)] = &[
        ("groups of tasks and threads come back with their limits", groups_come_back),
        ("groups of version 2 come back", unified_groups_come_back),
        ("a group that was frozen is frozen again", a_frozen_group_is_frozen_again),
        ("groups that exist stay as they are", what_stands_there_stays),
        ("--manage-cgroups=full sets what exists", full_sets_what_stands_there),
        ("groups that are missing are named", missing_groups_are_named),
        ("--cgroup-root puts them elsewhere", another_root),
        ("BPF programs are attached to groups again", programs_stay_attached),
        ("a failed restore takes groups back", a_failed_restore_takes_groups_back),
    ];
    all.iter().map(|(name, body)| Case::new(format!("cgroups: {name}"), *body)).collect()
}
