//! `--cgroup-root` at a restore: groups come back below another folder than they were in.

use std::os::unix::ffi::OsStrExt;

use rcriu_images::pb;

use super::sets::new_root;
use crate::{error::Result, options::CgroupOptions};

/// A folder that comes back under another name.
#[derive(Debug, PartialEq, Eq)]
pub struct Moved {
    /// As in `/proc/PID/cgroup`.
    pub controllers: String,
    /// What paths of groups began with, and what they begin with now; with a slash in front.
    pub from: Vec<u8>,
    pub to: Vec<u8>,
}

/// Replaces the topmost folder of each hierarchy that has a new root, and the beginning of every path below it.
///
/// A set that is in a cgroup namespace (its prefix is in the image) keeps what comes after the prefix; other paths
/// keep what comes after the topmost folder.
pub fn replace(entry: &mut pb::CgroupEntry, opts: &CgroupOptions) -> Result<Vec<Moved>> {
    let mut moved = Vec::new();
    for controller in &mut entry.controllers {
        let name = controller.cnames.join(",");
        let Some(root) = new_root(opts, &name) else { continue };
        let root = root.as_os_str().as_bytes();
        for folder in &mut controller.dirs {
            let top = folder.dir_name.clone();
            let mut renamed = None;
            for member in entry.sets.iter_mut().flat_map(|s| &mut s.ctls) {
                let inside = member.path.strip_prefix(b"/").and_then(|p| p.strip_prefix(top.as_slice()));
                let Some(rest) = inside.filter(|_| member.name == name.as_bytes()) else { continue };
                match member.cgns_prefix.map(|n| n as usize).filter(|n| (1..=member.path.len()).contains(n)) {
                    Some(prefix) => {
                        let below = top.get(prefix - 1..).unwrap_or(&[]);
                        renamed.get_or_insert_with(|| [root, below].concat());
                        member.path = [root, &member.path[prefix..]].concat();
                        member.cgns_prefix = u32::try_from(root.len()).ok();
                    }
                    None => {
                        member.path = [root, rest].concat();
                        renamed.get_or_insert_with(|| root.to_vec());
                    }
                }
            }
            if let Some(renamed) = renamed {
                log::info!("rewriting {} to {}", show(&top), show(&renamed));
                let from = [b"/", top.as_slice()].concat();
                moved.push(Moved { controllers: name.clone(), from, to: renamed.clone() });
                folder.dir_name = renamed;
            }
        }
    }
    Ok(moved)
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::CgroupRoot;

    #[test]
    fn paths_below_the_old_folder_come_below_the_new_root() {
        let member = |path: &str| pb::CgMemberEntry {
            name: b"cpu".to_vec(),
            path: path.as_bytes().to_vec(),
            cgns_prefix: None,
        };
        let mut entry = pb::CgroupEntry {
            sets: vec![pb::CgSetEntry { id: 2, ctls: vec![member("/old/a"), member("/old")] }],
            controllers: vec![pb::CgControllerEntry {
                cnames: vec!["cpu".into()],
                dirs: vec![pb::CgroupDirEntry { dir_name: b"old".to_vec(), ..Default::default() }],
                is_threaded: None,
            }],
        };
        let roots = vec![CgroupRoot { controllers: None, path: "/new".into() }];
        let moved = replace(&mut entry, &CgroupOptions { roots, ..CgroupOptions::default() }).unwrap();
        assert_eq!(moved, [Moved { controllers: "cpu".into(), from: b"/old".into(), to: b"/new".into() }]);
        assert_eq!(entry.sets[0].ctls[0].path, b"/new/a");
        assert_eq!(entry.sets[0].ctls[1].path, b"/new");
        assert_eq!(entry.controllers[0].dirs[0].dir_name, b"/new");
    }
}
