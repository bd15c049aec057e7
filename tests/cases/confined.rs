//! Security modules: AppArmor profiles and SELinux labels stay, or become what `--lsm-profile` says. What this host
//! cannot give is named before anything is made.
//!
//! Most needs a kernel with such a module and the policy of `kernel-matrix/policy`; the kernel matrix has both.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rcriu_images::{ImageDir, ImageKind, pb};
use rcriu_tests::{Case, Cycle, Images, Program, skip};

use crate::kinds::{Kind, all, kind};

pub const KINDS: &[Kind] = &[
    kind("a profile stays, with no_new_privs and no free descriptor", "confined", &[]).beyond_criu(),
    kind("threads keep their profiles and stacks of them", "confined-threads", &[]),
    kind("a namespace of AppArmor keeps its policy", "confined-namespace", &[]).beyond_criu(),
    kind("SELinux labels of process, threads and sockets stay", "confined-context", &[]).beyond_criu(),
];

const SPACE: &str = "/sys/kernel/security/apparmor/policy/namespaces/rcriu-test-space";

fn has_apparmor() -> bool {
    Path::new("/sys/kernel/security/apparmor").exists()
}

fn has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// Labels of all threads.
fn labels(pid: i32) -> Result<Vec<String>> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).context("task")?;
    let mut labels = Vec::new();
    for thread in threads {
        let text = fs::read_to_string(thread?.path().join("attr/current")).context("attr/current")?;
        let text = text.trim_end_matches(['\0', '\n']);
        labels.push(text.split_once(" (").map_or(text, |(label, _)| label).to_owned());
    }
    Ok(labels)
}

/// Restored as `profile`, all threads have `label`.
fn given(program: &'static str, profile: &str, label: &str) -> Result<()> {
    let program = Program::start(program, &["rcriu-test", "other"])?;
    let images = Images::new()?;
    let cycle = Cycle::new()?.with_restore(&["--lsm-profile", profile]);
    cycle.dump(&program, &images)?;
    cycle.restore(&images)?;
    let labels = labels(program.pid())?;
    ensure!(labels.iter().all(|is| is == label), "labels are {labels:?} instead of {label:?}");
    Ok(())
}

/// What was dumped has the profile `label` of another kernel.
fn foreign(module: pb::Lsmtype, label: &str) -> Result<(Program, Images, Cycle)> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let dir = ImageDir::open(images.as_str()?)?;
    let mut inventory: pb::InventoryEntry = dir.read_one(ImageKind::Inventory, 0)?;
    inventory.lsmtype = Some(module as i32);
    let mut out = dir.writer(ImageKind::Inventory, 0);
    out.write(&inventory)?;
    out.finish()?;
    let pid = program.pid().unsigned_abs().into();
    let mut core: pb::CoreEntry = dir.read_one(ImageKind::Core, pid)?;
    let creds = core.thread_core.as_mut().and_then(|t| t.creds.as_mut()).context("credentials")?;
    creds.lsm_profile = Some(label.to_owned());
    let mut out = dir.writer(ImageKind::Core, pid);
    out.write(&core)?;
    out.finish()?;
    Ok((program, images, cycle))
}

/// Images from a host with a module that is not here.
fn no_such_module() -> Result<()> {
    let (module, label, words) = match has_selinux() {
        true => (pb::Lsmtype::Apparmor, "box", ["AppArmor profile \"box\"", "--lsm-profile selinux:LABEL"]),
        false => (pb::Lsmtype::Selinux, "a:b:c:s0", ["SELinux label \"a:b:c:s0\"", "--lsm-profile"]),
    };
    let (program, images, cycle) = foreign(module, label)?;
    cycle.try_restore(&images, &[])?.refused()?.says(&[&words[..], &["this host has"]].concat())?;
    let checked = cycle.try_restore(&images, &["--dry-run"])?;
    ensure!(checked.refused().is_ok(), "a dry run that finds nothing wrong");
    cycle.try_restore(&images, &["--lsm-profile", "none:"])?.ok()?;
    program.verify()
}

/// `--lsm-profile` for a module that is not here; without one, unconfined is what all are.
fn option_without_module() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    let profile = if has_apparmor() { "selinux:a:b:c:s0" } else { "apparmor:box" };
    cycle
        .try_restore(&images, &["--lsm-profile", profile])?
        .refused()?
        .says(&[&format!("--lsm-profile {profile}")[..], "this host has"])?;
    cycle
        .try_restore(&images, &["--lsm-profile", "apparmor:unconfined", "--lsm-mount-context", "a:b:c:s0"])?
        .ok()?;
    program.verify()
}

/// A profile that nobody has loaded.
fn no_such_profile() -> Result<()> {
    if !has_apparmor() {
        return Err(skip("needs a kernel with AppArmor at work, and securityfs"));
    }
    let (program, images, cycle) = foreign(pb::Lsmtype::Apparmor, "rcriu-never-loaded")?;
    cycle
        .try_restore(&images, &[])?
        .refused()?
        .says(&["\"rcriu-never-loaded\" is not loaded", "apparmor_parser"])?;
    cycle.try_restore(&images, &["--lsm-profile", "unconfined"])?.ok()?;
    program.verify()
}

/// The namespace is gone when the tree comes back, as on another host.
fn namespace_elsewhere() -> Result<()> {
    let program = Program::start("confined-namespace", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    fs::remove_dir(SPACE).context("rmdir")?;
    cycle.restore(&images)?;
    let profiles = fs::read_dir(format!("{SPACE}/profiles")).context("profiles")?.count();
    ensure!(profiles >= 2, "{profiles} profiles came back");
    program.verify()
}

/// A restore that fails takes the namespace away again.
fn namespace_after_failure() -> Result<()> {
    let program = Program::start("confined-namespace", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    cycle.dump(&program, &images)?;
    fs::remove_dir(SPACE).context("rmdir")?;
    // Nobody is called so when tasks are to change.
    let failed =
        cycle.try_restore(&images, &["--lsm-profile", "apparmor::rcriu-test-space:rcriu-never-loaded"])?;
    failed.refused()?.says(&["the security label", "rcriu-never-loaded"])?;
    ensure!(!Path::new(SPACE).exists(), "the namespace stayed");
    cycle.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let mut cases = all("confined", KINDS);
    let mut one = |name: &str, body: fn() -> Result<()>| {
        cases.push(Case::new(format!("confined: {name}"), body).alone())
    };
    one("--lsm-profile gives a task another profile", || {
        given("confined", "apparmor:rcriu-other", "rcriu-other")
    });
    one("--lsm-profile gives all threads one profile", || {
        given("confined-threads", "apparmor:rcriu-other", "rcriu-other")
    });
    one("--lsm-profile unconfined takes profiles away", || {
        given("confined-threads", "unconfined", "unconfined")
    });
    one("--lsm-profile gives a process another SELinux label", || {
        let label = "system_u:system_r:rcriu_other_t:s0";
        given("confined-context", &format!("selinux:{label}"), label)
    });
    one("a label of a module that is not here is named", no_such_module);
    one("--lsm-profile for a module that is not here is named", option_without_module);
    one("a profile that is not loaded is named", no_such_profile);
    one("a namespace of AppArmor that is gone comes back", namespace_elsewhere);
    one("a restore that fails leaves no namespace of AppArmor", namespace_after_failure);
    cases
}
