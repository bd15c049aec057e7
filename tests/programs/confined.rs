//! Confined by a security module: AppArmor profiles of threads, policy in a namespace of AppArmor, SELinux labels of a
//! process and of its sockets.
//!
//! The profiles and types are those of `kernel-matrix/policy`.
//!
//! # Safety
//!
//! getxattr gets a name that ends with a zero, and a buffer of the length it is told.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result};

use crate::kit::{Check, rest, same, skip, sys, team};

const POLICY: &str = "/sys/kernel/security/apparmor/policy";
/// No more rights than to files, and not to this one.
const DENIED: &str = "/tmp/rcriu-test-denied";

/// An attribute of this thread, without mode and end.
fn attribute(name: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/thread-self/attr/{name}")).context(name.to_owned())?;
    let text = text.trim_end_matches(['\0', '\n']);
    Ok(text.split_once(" (").map_or(text, |(label, _)| label).to_owned())
}

fn become_(label: &str) -> Check {
    fs::write("/proc/thread-self/attr/current", format!("changeprofile {label}"))
        .with_context(|| format!("changeprofile {label}"))
}

fn needs_profiles() -> Check {
    if !Path::new("/sys/kernel/security/apparmor").exists() {
        return Err(skip("needs a kernel with AppArmor at work, and securityfs"));
    }
    let loaded = fs::read_to_string("/sys/kernel/security/apparmor/profiles").context("profiles")?;
    if !loaded.contains("rcriu-test (") {
        return Err(skip("needs the profiles of kernel-matrix/policy/apparmor (apparmor_parser -r)"));
    }
    Ok(())
}

/// What the profile of a thread forbids.
fn is_denied() -> Check {
    match fs::read(DENIED) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        other => anyhow::bail!("{DENIED} is not denied: {other:?}"),
    }
}

/// Threads under a profile, under another one, under both at once, and under none.
pub fn profiles(_: &[String]) -> Check {
    needs_profiles()?;
    fs::write(DENIED, "x").context(DENIED)?;
    const LABELS: [&str; 4] = ["rcriu-test", "rcriu-other", "rcriu-other//&rcriu-test", "unconfined"];
    let set = |i: usize| -> Result<()> {
        if LABELS[i] != "unconfined" {
            become_(LABELS[i])?;
        }
        same("profile", attribute("current")?.as_str(), LABELS[i])
    };
    let check = |i: usize, ()| -> Check {
        // The kernel orders a stack by itself.
        same("profile", attribute("current")?.as_str(), LABELS[i])?;
        match i {
            0 | 2 => is_denied(),
            _ => fs::read(DENIED).map(drop).context("what only another profile denies"),
        }
    };
    team::run(LABELS.len() - 1, set, check)
}

/// `profile NAME`: one thread under one profile, with no_new_privs and without capabilities, and few descriptors.
pub fn profile(args: &[String]) -> Check {
    needs_profiles()?;
    let label = args.first().map_or("rcriu-test", String::as_str);
    fs::write(DENIED, "x").context(DENIED)?;
    become_(label)?;
    nix::sys::prctl::set_no_new_privs().context("PR_SET_NO_NEW_PRIVS")?;
    let nofile = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let full = (0..8).map(|_| fs::File::open("/proc/self/exe")).collect::<Result<Vec<_>, _>>()?;
    let last = full.iter().map(AsRawFd::as_raw_fd).max().unwrap_or(2) as u64;
    // None is free.
    nix::sys::resource::setrlimit(nofile, last + 1, last + 1).context("setrlimit")?;
    rest()?;
    drop(full);
    let now = attribute("current")?;
    // A restore may have been told another.
    if args.get(1).is_none() {
        same("profile", now.as_str(), label)?;
        is_denied()?;
    }
    Ok(())
}

/// Under a profile of a namespace with policy of its own, of which a part is not used yet.
pub fn namespace(_: &[String]) -> Check {
    needs_profiles()?;
    let space = format!("{POLICY}/namespaces/rcriu-test-space");
    if !Path::new(&format!("{POLICY}/namespaces")).exists() {
        return Err(skip("needs namespaces of AppArmor"));
    }
    let loaded = fs::read_dir(format!("{POLICY}/profiles")).context("profiles")?;
    let mut blobs = Vec::new();
    for profile in loaded.flatten().filter(|p| p.file_name().to_string_lossy().starts_with("rcriu-")) {
        blobs.push(fs::read(profile.path().join("raw_data")).map_err(|e| skip(format!("raw_data: {e}")))?);
    }
    match fs::create_dir(&space) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e).context("mkdir"),
        _ => {}
    }
    for blob in blobs {
        fs::write(format!("{space}/.replace"), blob).context(".replace")?;
    }
    fs::write(DENIED, "x").context(DENIED)?;
    become_(":rcriu-test-space:rcriu-test")?;
    let before = attribute("current")?;
    rest()?;
    same("profile", attribute("current")?, before)?;
    is_denied()
}

fn label_of(socket: &impl AsRawFd) -> Result<String> {
    let mut label = vec![0u8; 512];
    // SAFETY: as said above.
    let len = unsafe {
        libc::fgetxattr(
            socket.as_raw_fd(),
            c"security.selinux".as_ptr(),
            label.as_mut_ptr().cast(),
            label.len(),
        )
    };
    label.truncate(usize::try_from(sys("fgetxattr", len)?)?);
    Ok(String::from_utf8_lossy(&label).trim_end_matches('\0').to_owned())
}

/// An SELinux label of the process and all its threads, another for sockets that are made, and sockets of both and of
/// the label before.
pub fn context(args: &[String]) -> Check {
    const USED: &str = "system_u:system_r:rcriu_test_t:s0";
    const SOCKETS: &str = "system_u:system_r:rcriu_sock_t:s0";
    let own = attribute("current").unwrap_or_default();
    if own.split(':').count() < 4 || !Path::new("/sys/fs/selinux/enforce").exists() {
        return Err(skip("needs a kernel with SELinux at work"));
    }
    if fs::write("/sys/fs/selinux/context", USED).is_err() {
        return Err(skip("needs the types of kernel-matrix/policy/selinux.cil in the policy"));
    }
    let before = UdpSocket::bind("127.0.0.1:0").context("bind")?;
    fs::write("/proc/self/attr/current", USED).context("current")?;
    let plain = TcpListener::bind("127.0.0.1:0").context("bind")?;
    let pair = UnixStream::pair().context("socketpair")?;
    fs::write("/proc/self/attr/sockcreate", SOCKETS).context("sockcreate")?;
    let (tcp, udp) = (TcpListener::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
    let unix = UnixListener::bind("named").context("bind")?;
    let (told, ready) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || -> Result<[String; 2]> {
        let _ = told.send(());
        gone.recv().context("the first thread")?;
        Ok([attribute("current")?, attribute("sockcreate")?])
    });
    ready.recv().context("the thread")?;
    let look = || -> Result<Vec<String>> {
        let mut all = vec![attribute("current")?, attribute("sockcreate")?];
        all.extend([label_of(&before)?, label_of(&plain)?, label_of(&pair.0)?, label_of(&pair.1)?]);
        all.extend([label_of(&tcp)?, label_of(&udp)?, label_of(&unix)?]);
        Ok(all)
    };
    let was = look()?;
    same("labels", &was[..2], &[USED.to_owned(), SOCKETS.to_owned()][..])?;
    rest()?;
    go.send(()).context("the thread")?;
    let other = other.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    if !args.is_empty() {
        return Ok(());
    }
    same("labels", look()?, was)?;
    // The second one has its own, which a new thread inherits.
    same("labels of the thread", other, [USED.to_owned(), SOCKETS.to_owned()])?;
    same("label of a new socket", label_of(&UdpSocket::bind("127.0.0.1:0")?)?.as_str(), SOCKETS)
}
