//! Descriptors that belong to nobody.

use std::os::fd::RawFd;

use super::FilesTask;
use crate::{
    error::{Result, SysContext},
    sys::fd,
};

/// Numbers of all open descriptors of this process, and one that is closed again.
fn open_numbers() -> Result<Vec<RawFd>> {
    let list = std::fs::read_dir("/proc/self/fd").call("open(/proc/self/fd)")?;
    Ok(list.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

impl FilesTask<'_> {
    pub(super) fn close_strays(&self) -> Result<()> {
        open_numbers()?.into_iter().filter(|fd| !self.shared.zone.contains(*fd)).try_for_each(fd::close)
    }
}
