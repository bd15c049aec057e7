//! Users, groups, capabilities and security bits of a thread.

use rcriu_images::pb;
use restorer::args;

use crate::{
    error::{Error, Result},
    ns::user::Ids,
    procfs::status::Status,
};

/// The entry of a thread with `status`; `securebits` come from prctl(2) inside it. What security modules say is added
/// by the caller.
pub fn dump(status: &Status, securebits: u32, ids: &Ids) -> Result<pb::CredsEntry> {
    let [uid, euid, suid, fsuid] = status.uid.map(|uid| ids.user(uid));
    let [gid, egid, sgid, fsgid] = status.gid.map(|gid| ids.group(gid));
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
        groups: status.groups.iter().map(|gid| ids.group(*gid)).collect(),
        no_new_privs: status.no_new_privs.then_some(1),
        ..pb::CredsEntry::default()
    })
}

/// A mask as images have it: the low half first.
fn halves(mask: u64) -> Vec<u32> {
    vec![mask as u32, (mask >> 32) as u32]
}

fn mask(halves: &[u32]) -> u64 {
    halves.iter().take(2).enumerate().fold(0, |mask, (i, half)| mask | u64::from(*half) << (32 * i))
}

/// What the restorer does to give a thread these credentials, starting from our own. The groups and labels are left to
/// the caller, who knows where the texts lie.
///
/// # Errors
/// Capabilities that we do not have ourselves.
pub fn restore(entry: &pb::CredsEntry, own: &Status, own_securebits: u32) -> Result<args::Creds> {
    let wanted = args::Creds {
        uid: [entry.uid, entry.euid, entry.suid, entry.fsuid],
        gid: [entry.gid, entry.egid, entry.sgid, entry.fsgid],
        inheritable: mask(&entry.cap_inh),
        permitted: mask(&entry.cap_prm),
        effective: mask(&entry.cap_eff),
        bounding_drop: own.cap_bnd & !mask(&entry.cap_bnd),
        ambient: mask(&entry.cap_amb),
        securebits: entry.secbits,
        no_new_privs: entry.no_new_privs.unwrap_or(0).min(1),
        ..args::Creds::default()
    };
    let lacking = wanted.permitted & !own.cap_prm;
    if lacking != 0 {
        return Err(Error::host(format!("it had capabilities {lacking:#x}, which this process lacks"))
            .remedy("run the restore with the capabilities the dumped program had"));
    }
    let sets = |inh, prm, eff, amb| (inh, prm, eff, amb);
    let same = wanted.uid == own.uid
        && wanted.gid == own.gid
        && entry.groups == own.groups
        && wanted.securebits == own_securebits
        && wanted.bounding_drop == 0
        && sets(wanted.inheritable, wanted.permitted, wanted.effective, wanted.ambient)
            == sets(own.cap_inh, own.cap_prm, own.cap_eff, own.cap_amb);
    Ok(args::Creds { change: u32::from(!same), ..wanted })
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
        let e = dump(&status, 0x2f, &Ids::default()).unwrap();
        assert_eq!((e.uid, e.euid, e.suid, e.fsuid), (1, 2, 3, 4));
        assert_eq!((e.gid, e.egid, e.sgid, e.fsgid), (5, 6, 7, 8));
        assert_eq!((e.cap_prm, e.cap_inh), (vec![2, 1], vec![0, 0]));
        assert_eq!((e.groups, e.secbits, e.no_new_privs), (vec![9, 10], 0x2f, Some(1)));
        let shadow = Status { thread_features: vec!["shstk".into()], ..Status::default() };
        assert!(dump(&shadow, 0, &Ids::default()).is_err());
    }

    #[test]
    fn what_was_dumped_is_asked_for_and_equal_credentials_are_left_alone() {
        let own = Status {
            uid: [0; 4],
            cap_prm: 0xff,
            cap_eff: 0xff,
            cap_bnd: 0x1ff,
            groups: vec![0],
            ..Status::default()
        };
        let mut e = dump(&own, 0, &Ids::default()).unwrap();
        assert_eq!(restore(&e, &own, 0).unwrap().change, 0);
        assert_eq!(restore(&e, &own, 4).unwrap().change, 1);
        e.cap_bnd = vec![0xf, 0];
        e.suid = 7;
        e.cap_eff = vec![3, 0];
        let a = restore(&e, &own, 0).unwrap();
        assert_eq!((a.change, a.bounding_drop, a.effective, a.uid), (1, 0x1f0, 3, [0, 0, 7, 0]));
        e.cap_prm = vec![0, 1];
        assert!(restore(&e, &own, 0).unwrap_err().to_string().contains("0x100000000"));
    }
}
