//! Kernels from Debian packages: found in a suite's index on the archive this machine's own package
//! sources name, fetched with curl, unpacked with dpkg-deb, some of their modules with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::Kernel;

/// A kernel ready to boot.
pub(crate) struct Image {
    /// The bzImage.
    pub path: PathBuf,
    /// Its release, as in the package's name.
    pub release: String,
    /// Modules that the guest loads, in the order of their names.
    pub modules: Vec<PathBuf>,
}

/// What tests need of the kernel that distributions build as modules; names that are built in are none.
const MODULES: &[&str] = &[
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "netlink_diag",
    "af_packet",
    "af_packet_diag",
    "tun",
    "veth",
    "dummy",
    "bridge",
    "macvlan",
    "nf_tables",
    "nft_ct",
    "nft_counter",
    "nft_compat",
    "ip_tables",
    "iptable_filter",
    "ip_set",
    "xt_mark",
    "xt_CONNMARK",
    "sch_fq_codel",
    "overlay",
    "fuse",
    "autofs4",
];

/// Fetches the kernel of a row, once; later calls find it in `cache`.
pub(crate) fn fetch(kernel: &Kernel, cache: &Path) -> Result<Image> {
    // Rows may share a kernel.
    let dir = cache.join(format!("linux-{}-{}", kernel.suite, kernel.version.trim_end_matches('.')));
    if let Some(image) = find(&dir)? {
        return Ok(image);
    }
    let archive = archive()?;
    let index = output(
        Command::new("sh")
            .arg("-c")
            .arg("curl -sSfL \"$1/dists/$2/main/binary-amd64/Packages.xz\" | xz -dc")
            .args(["sh", &archive, &kernel.suite]),
    )?;
    let path = newest(&index, &kernel.version)
        .with_context(|| format!("suite {} has no cloud kernel {}*", kernel.suite, kernel.version))?;
    let scratch = tempfile::tempdir_in(cache)?;
    let deb = scratch.path().join("kernel.deb");
    run(Command::new("curl").args(["-sSfL", "-o"]).arg(&deb).arg(format!("{archive}/{path}")))?;
    let tree = scratch.path().join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(dir.join("modules"))?;
    // boot/vmlinuz-RELEASE up to 6.x, usr/lib/modules/RELEASE/vmlinuz since.
    for entry in std::fs::read_dir(tree.join("boot")).into_iter().flatten() {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("vmlinuz-") {
            std::fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    for base in [tree.clone(), tree.join("usr")] {
        for entry in std::fs::read_dir(base.join("lib/modules")).into_iter().flatten() {
            let entry = entry?;
            let release = entry.file_name().to_string_lossy().into_owned();
            let kernel = entry.path().join("vmlinuz");
            if kernel.exists() {
                std::fs::copy(kernel, dir.join(format!("vmlinuz-{release}")))?;
            }
            modules(&base, &release, &dir.join("modules"))?;
        }
    }
    find(&dir)?.context("the package has no vmlinuz")
}

/// Puts [`MODULES`] and what they need into `to`, named so that each comes after what it needs.
fn modules(base: &Path, release: &str, to: &Path) -> Result<()> {
    run(Command::new("depmod").arg("-b").arg(base).arg(release)).context("install it: package kmod")?;
    let folder = base.join("lib/modules").join(release);
    let needs = std::fs::read_to_string(folder.join("modules.dep")).context("modules.dep")?;
    for (at, path) in in_order(&needs, MODULES).iter().enumerate() {
        let name = path.rsplit('/').next().unwrap_or(path);
        let packed = name.ends_with(".xz");
        let to = to.join(format!("{at:03}-{}", name.trim_end_matches(".xz")));
        let from = folder.join(path);
        match packed {
            true => run(Command::new("xz").arg("-dc").arg(from).stdout(std::fs::File::create(to)?))?,
            false => drop(std::fs::copy(from, to)?),
        }
    }
    Ok(())
}

/// Paths of the modules `wanted` and of all that they need, from the lines of modules.dep: the last of a line is needed
/// by all others.
fn in_order<'a>(needs: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let is_it =
            |path: &str| path.rsplit('/').next().and_then(|file| file.split('.').next()) == Some(name);
        let Some((path, others)) = needs.lines().filter_map(|l| l.split_once(':')).find(|l| is_it(l.0))
        else {
            continue;
        };
        for path in others.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    order
}

fn find(dir: &Path) -> Result<Option<Image>> {
    let Ok(modules) = std::fs::read_dir(dir.join("modules")) else { return Ok(None) };
    let mut modules = modules.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    modules.sort();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if let Some(release) = entry.file_name().to_string_lossy().strip_prefix("vmlinuz-") {
            return Ok(Some(Image { path: entry.path(), release: release.to_owned(), modules }));
        }
    }
    Ok(None)
}

/// Base address of the Debian archive that this machine installs from.
fn archive() -> Result<String> {
    let list = output(Command::new("apt-get").args([
        "indextargets",
        "Created-By: Packages",
        "Origin: Debian",
        "--format",
        "$(REPO_URI)",
    ]))?;
    list.lines()
        .map(|l| l.trim_end_matches('/'))
        .find(|l| l.ends_with("/debian"))
        .map(str::to_owned)
        .context("apt knows no Debian archive (run apt-get update first)")
}

/// File name of the newest signed cloud kernel with a version that starts with `version`.
fn newest(index: &str, version: &str) -> Option<String> {
    let mut best: Option<((Vec<u64>, bool), String)> = None;
    for stanza in index.split("\n\n") {
        let field = |name: &str| stanza.lines().find_map(|l| l.strip_prefix(name));
        let Some(package) = field("Package: ") else { continue };
        // Since 7.x the image package only depends on the one that holds the kernel.
        let Some((binary, release)) = ["linux-binary-", "linux-image-"]
            .iter()
            .find_map(|p| package.strip_prefix(p).map(|release| (*p == "linux-binary-", release)))
        else {
            continue;
        };
        if !release.starts_with(version) || !release.ends_with("-cloud-amd64") {
            continue;
        }
        let key: (Vec<u64>, bool) =
            (release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect(), binary);
        let Some(file) = field("Filename: ") else { continue };
        if best.as_ref().is_none_or(|(k, _)| *k < key) {
            best = Some((key, file.to_owned()));
        }
    }
    best.map(|(_, file)| file)
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Standard output of a command that must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::{in_order, newest};

    #[test]
    fn the_newest_signed_cloud_kernel_of_a_version_is_taken() {
        let index = "Package: linux-image-6.1.0-9-cloud-amd64\nFilename: a\n\n\
                     Package: linux-image-6.1.0-30-cloud-amd64\nFilename: b\n\n\
                     Package: linux-image-6.1.0-31-cloud-amd64-unsigned\nFilename: c\n\n\
                     Package: linux-image-6.12.1-cloud-amd64\nFilename: d\n\n\
                     Package: linux-image-7.3.4-cloud-amd64\nFilename: e\n\n\
                     Package: linux-binary-7.3.4-cloud-amd64\nFilename: f\n";
        assert_eq!(newest(index, "6.1.").as_deref(), Some("b"));
        assert_eq!(newest(index, "7.3.").as_deref(), Some("f"));
        assert_eq!(newest(index, "5.10."), None);
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let needs = "kernel/a/tcp_diag.ko.xz: kernel/b/inet_diag.ko.xz\nkernel/b/inet_diag.ko.xz:\n\
                     kernel/c/x.ko: kernel/b/y.ko kernel/b/inet_diag.ko.xz\n";
        let order = in_order(needs, &["x", "tcp_diag", "built_in"]);
        assert_eq!(
            order,
            ["kernel/b/inet_diag.ko.xz", "kernel/b/y.ko", "kernel/c/x.ko", "kernel/a/tcp_diag.ko.xz"]
        );
    }
}
