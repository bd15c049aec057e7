//! Extended attributes of groups, in which systemd notes whose they are.

use std::{
    ffi::CString,
    os::fd::{AsRawFd, BorrowedFd},
};

use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result},
    sys::xattr,
};

/// Names that anybody gives; others are those of security modules.
const KEPT: [&[u8]; 2] = [b"trusted.", b"user."];

/// A path of the group at `path` below the folder `root`, whose links are not followed.
fn path_of(root: BorrowedFd<'_>, path: &[u8]) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", root.as_raw_fd()).as_bytes(), path].concat()
}

/// All that are kept, of the group whose folder is open.
pub(super) fn read(folder: BorrowedFd<'_>) -> Result<Vec<pb::RcriuAttribute>> {
    let path = path_of(folder, b".");
    let names = xattr::list(&path)?;
    let kept = names.into_iter().filter(|name| KEPT.iter().any(|kept| name.as_bytes().starts_with(kept)));
    let read = |name: CString| match xattr::get(&path, &name) {
        // Gone meanwhile.
        Err(e) if e.errno() == Some(libc::ENODATA) => Ok(None),
        Err(e) => Err(e.during(format!("attribute {}", name.to_string_lossy()))),
        Ok(value) => Ok(Some(pb::RcriuAttribute { name: name.into_bytes(), value })),
    };
    kept.filter_map(|name| read(name).transpose()).collect()
}

/// Sets them, of the group at `path` below `root`.
pub(super) fn set(root: BorrowedFd<'_>, path: &[u8], attributes: &[pb::RcriuAttribute]) -> Result<()> {
    for attribute in attributes {
        let text = || String::from_utf8_lossy(&attribute.name).escape_debug().to_string();
        if !KEPT.iter().any(|kept| attribute.name.starts_with(kept)) {
            return Err(Error::image(format!("cgroup.img: attribute {}", text())));
        }
        let name = CString::new(attribute.name.clone())
            .map_err(|_| Error::image("cgroup.img: an attribute with a zero byte in its name"))?;
        match xattr::set(&path_of(root, path), &name, &attribute.value) {
            // Hierarchies of version 1 and old kernels have only some.
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => {
                log::warn!("Attribute {} is not set: {e}", text())
            }
            other => other.during(|| format!("attribute {}", text()))?,
        }
    }
    Ok(())
}
