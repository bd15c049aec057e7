//! Files of the program's own namespaces: each is that of where it is.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::Context;

use crate::kit::{Check, rest, same};

pub fn run(_: &[String]) -> Check {
    let kinds = ["net", "mnt", "uts", "ipc", "user", "cgroup"];
    let open = |kind: &str| File::open(format!("/proc/self/ns/{kind}")).context(kind.to_owned());
    let files = kinds.iter().map(|kind| open(kind)).collect::<anyhow::Result<Vec<_>>>()?;
    rest()?;
    for (kind, file) in kinds.iter().zip(&files) {
        let link = |path: String| std::fs::read_link(&path).context(path);
        let (found, own) =
            (link(format!("/proc/self/fd/{}", file.as_raw_fd()))?, link(format!("/proc/self/ns/{kind}"))?);
        same(kind, found, own)?;
    }
    Ok(())
}
