//! PID 1 of a guest of the kernel matrix: mounts what tests need, prints what the kernel offers, runs
//! every test binary below `/tests` in the order of their names, prints one verdict line and powers off.
//!
//! Lines for the runner on the console: `FACT name on|off`, `RUN name`, `RESULT name status`,
//! `VERDICT pass|fail`. Everything else is output of the tests.

use std::{fs, io, path::Path, process::Command};

use nix::kmod::ModuleInitFlags;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use rcriu_engine::{
    kernel::Kernel,
    task::lsm::{Host, Module},
};

fn main() {
    let verdict = match run() {
        Ok(true) => "pass",
        Ok(false) => "fail",
        Err(e) => {
            println!("kernel-matrix: {e}");
            "fail"
        }
    };
    println!("VERDICT {verdict}");
    nix::unistd::sync();
    // PID 1 that returns panics the kernel, so there is nothing better to do with a failure here.
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

/// Makes the root a mount that is on another: pivot_root(2), with which tests make containers, cannot leave the first
/// root of an initramfs, which is on nothing.
fn cover_root() -> io::Result<()> {
    let at = "/root";
    fs::create_dir_all(at)?;
    let none = None::<&str>;
    mount(Some("/"), at, none, MsFlags::MS_BIND, none)?;
    std::env::set_current_dir(at)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

fn run() -> io::Result<bool> {
    cover_root()?;
    for (what, at, kind, data) in [
        ("proc", "/proc", "proc", None),
        ("sysfs", "/sys", "sysfs", None),
        ("devtmpfs", "/dev", "devtmpfs", None),
        ("devpts", "/dev/pts", "devpts", Some("ptmxmode=0666")),
        ("tmpfs", "/dev/shm", "tmpfs", None),
        ("tmpfs", "/tmp", "tmpfs", None),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", None),
        ("securityfs", "/sys/kernel/security", "securityfs", None),
    ] {
        fs::create_dir_all(at)?;
        mount(Some(what), at, Some(kind), MsFlags::empty(), data)?;
    }
    // As a container or an ordinary boot would have them.
    for (link, to) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let path = Path::new("/dev").join(link);
        if !path.exists() {
            std::os::unix::fs::symlink(to, path)?;
        }
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));

    load_modules()?;
    let kernel = Kernel::probe().map_err(|e| io::Error::other(e.to_string()))?;
    for (name, on) in kernel.facts() {
        println!("FACT {name} {}", if on { "on" } else { "off" });
    }

    load_policy()?;
    let module = Host::look().module;
    for (name, on) in [("apparmor", Some(Module::AppArmor)), ("selinux", Some(Module::SeLinux))] {
        println!("FACT {name} {}", if module == on { "on" } else { "off" });
    }

    let line = fs::read_to_string("/proc/cmdline")?;
    let words = |name: &str| -> Vec<String> {
        line.split_whitespace().filter_map(|word| Some(word.strip_prefix(name)?.to_owned())).collect()
    };
    let skips = words("rcriu.skip=").into_iter().flat_map(|word| ["--skip".to_owned(), word]);
    let words: Vec<String> = words("rcriu.test=").into_iter().chain(skips).collect();
    let mut tests: Vec<_> = fs::read_dir("/tests")?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    tests.sort();
    let mut good = true;
    let criu = Path::new("/bin/criu").exists();
    for test in tests {
        let name = test.file_name().unwrap_or_default().to_string_lossy().into_owned();
        println!("RUN {name}");
        let status = Command::new(&test)
            .arg("--test-threads=1")
            .args(&words)
            .env("PATH", "/bin:/usr/bin")
            .env("HOME", "/tmp")
            .env("RCRIU_BIN", "/bin/rcriu")
            .env("RCRIU_TEST_PROGRAM", "/bin/rcriu-test-program")
            .envs(criu.then_some(("CRIU_BIN", "/bin/criu")))
            .status()?;
        println!("RESULT {name} {status}");
        good &= status.success();
    }
    Ok(good)
}

/// Loads what was packed for this kernel. One that is there in another form is not needed.
fn load_modules() -> io::Result<()> {
    let mut modules: Vec<_> =
        fs::read_dir("/modules")?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    modules.sort();
    for path in modules {
        if let Err(e) = nix::kmod::finit_module(fs::File::open(&path)?, c"", ModuleInitFlags::empty()) {
            println!("kernel-matrix: {}: {e}", path.display());
        }
    }
    Ok(())
}

/// Gives the security module that the kernel was booted with its policy, if it is one of those that need some. Where
/// none was packed, no test is about it.
fn load_policy() -> io::Result<()> {
    let apparmor = Path::new("/sys/kernel/security/apparmor");
    let policy = Path::new("/etc/apparmor.policy");
    if apparmor.exists() && policy.exists() {
        fs::write(apparmor.join(".load"), fs::read(policy)?)?;
    }
    // There to mount on only where SELinux is on.
    let selinux = Path::new("/sys/fs/selinux");
    if selinux.exists() {
        mount(Some("selinuxfs"), selinux, Some("selinuxfs"), MsFlags::empty(), None::<&str>)?;
        // By this libselinux, which CRIU uses, knows that SELinux is in use.
        fs::create_dir_all("/etc/selinux")?;
        fs::write("/etc/selinux/config", "")?;
        fs::write(selinux.join("load"), fs::read("/etc/selinux.policy")?)?;
        fs::write(selinux.join("enforce"), "1")?;
    }
    Ok(())
}
