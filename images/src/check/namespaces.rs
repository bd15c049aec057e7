//! Namespaces that differ from the ones the dump ran in must have their images.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::Check;
use crate::{catalog::ImageKind, pb};

impl Check<'_> {
    pub(super) fn namespaces(&mut self) {
        let host = self.set.inventory.as_ref().and_then(|i| i.root_ids).unwrap_or_default();
        let mut wanted = BTreeSet::new();
        for ids in self.set.tasks.iter().filter_map(|t| t.ids.as_ref()) {
            let pairs = [
                (ids.uts_ns_id, host.uts_ns_id, ImageKind::Utsns),
                (ids.ipc_ns_id, host.ipc_ns_id, ImageKind::IpcVar),
                (ids.mnt_ns_id, host.mnt_ns_id, ImageKind::Mnts),
                (ids.net_ns_id, host.net_ns_id, ImageKind::Netns),
                (ids.user_ns_id, host.user_ns_id, ImageKind::Userns),
            ];
            wanted.extend(
                pairs.into_iter().filter_map(|(id, host, kind)| Some((kind, id?)).filter(|_| id != host)),
            );
        }
        for (kind, id) in wanted {
            // Sets from before namespaces had numbers name these images by the root's pid.
            let per_id = self.set.inventory.as_ref().is_some_and(|i| i.ns_per_id());
            if per_id {
                self.expect((ImageKind::Inventory, 0), (kind, id.into()), "a namespace of the tasks");
            }
        }
        self.mounts();
    }

    fn mounts(&mut self) {
        let mut known: HashSet<i64> = HashSet::new();
        let mut trees: Vec<u64> =
            self.images.iter().filter(|(kind, _)| *kind == ImageKind::Mnts).map(|(_, id)| *id).collect();
        trees.sort_unstable();
        for &id in &trees {
            let mounts =
                self.note(self.set.dir.read_all::<pb::MntEntry>(ImageKind::Mnts, id)).unwrap_or_default();
            let numbers: HashMap<u32, u32> = mounts.iter().map(|m| (m.mnt_id, m.parent_mnt_id)).collect();
            if numbers.len() < mounts.len() {
                self.error(ImageKind::Mnts, id, "two mounts have the same number");
            }
            let roots = mounts
                .iter()
                .filter(|m| !numbers.contains_key(&m.parent_mnt_id) || m.parent_mnt_id == m.mnt_id);
            let count = roots.count();
            if count != 1 {
                self.error(ImageKind::Mnts, id, format!("{count} mounts have no parent, one may"));
            }
            known.extend(numbers.keys().map(|&n| i64::from(n)));
        }
        if trees.is_empty() {
            return;
        }
        let mut files: Vec<_> = self.set.files.values().filter_map(|f| f.reg.as_ref()).collect();
        files.sort_by_key(|reg| reg.id);
        for reg in files {
            let mount = i64::from(reg.mnt_id());
            if mount >= 0 && !reg.ext() && !known.contains(&mount) {
                let path = String::from_utf8_lossy(&reg.name);
                self.error(ImageKind::Files, 0, format!("mount {mount} of {path} is not in the set"));
            }
        }
    }
}
