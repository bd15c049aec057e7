//! Test support: tables of mounts made by hand.

use super::{fstypes, mount::Mount, tree::Tree};
use crate::error::Result;

/// A whole tmpfs of its own, except for the root.
pub(super) fn mount(id: u32, parent: u32, point: &str) -> Mount {
    Mount {
        id,
        parent,
        dev: 100 + id,
        flags: libc::MS_RELATIME as u32,
        sb_flags: 0,
        root: Some(b"/".into()),
        deleted: false,
        point: point.into(),
        kind: if point == "/" { None } else { fstypes::by_name(b"tmpfs") },
        fs_name: Vec::new(),
        by_name: false,
        source: b"none".into(),
        options: Vec::new(),
        shared: 0,
        master: 0,
        outside: None,
        internal_sharing: false,
    }
}

pub(super) fn tree(mounts: Vec<Mount>) -> Result<Tree> {
    Tree::new(vec![(1, mounts)])
}
