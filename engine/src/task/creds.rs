//! Users, groups, capabilities and security bits of a thread.

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    procfs::status::Status,
};

/// The entry of a thread with `status`; `securebits` come from prctl(2) inside it.
pub fn dump(status: &Status, securebits: u32) -> Result<pb::CredsEntry> {
    let [uid, euid, suid, fsuid] = status.uid;
    let [gid, egid, sgid, fsgid] = status.gid;
    if status.thread_features.iter().any(|f| f == "shstk") {
        return Err(Error::unsupported("user shadow stacks are not supported")
            .remedy("start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"));
    }
    Ok(pb::CredsEntry {
        uid,
        gid,
        euid,
        egid,
        suid,
        sgid,
        fsuid,
        fsgid,
        cap_inh: halves(status.cap_inh),
        cap_prm: halves(status.cap_prm),
        cap_eff: halves(status.cap_eff),
        cap_bnd: halves(status.cap_bnd),
        cap_amb: halves(status.cap_amb),
        secbits: securebits,
        groups: status.groups.clone(),
        no_new_privs: status.no_new_privs.then_some(1),
        ..pb::CredsEntry::default()
    })
}

/// A mask as images have it: the low half first.
fn halves(mask: u64) -> Vec<u32> {
    vec![mask as u32, (mask >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_and_mask_has_its_field() {
        let status = Status {
            uid: [1, 2, 3, 4],
            gid: [5, 6, 7, 8],
            groups: vec![9, 10],
            cap_prm: 0x1_0000_0002,
            no_new_privs: true,
            ..Status::default()
        };
        let e = dump(&status, 0x2f).unwrap();
        assert_eq!((e.uid, e.euid, e.suid, e.fsuid), (1, 2, 3, 4));
        assert_eq!((e.gid, e.egid, e.sgid, e.fsgid), (5, 6, 7, 8));
        assert_eq!((e.cap_prm, e.cap_inh), (vec![2, 1], vec![0, 0]));
        assert_eq!((e.groups, e.secbits, e.no_new_privs), (vec![9, 10], 0x2f, Some(1)));
        let shadow = Status { thread_features: vec!["shstk".into()], ..Status::default() };
        assert!(dump(&shadow, 0).is_err());
    }
}
