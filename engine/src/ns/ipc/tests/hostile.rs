//! Images that say what cannot be.

use super::*;

fn desc(id: u32) -> pb::IpcDescEntry {
    pb::IpcDescEntry { id, mode: 0o600, ..Default::default() }
}

fn vars(folder: &Folder, values: usize) {
    let entry = pb::IpcVarEntry { sem_ctls: vec![1; values], ..Default::default() };
    let mut out = folder.images.writer(ImageKind::IpcVar, 9);
    out.write(&entry).unwrap();
    out.finish().unwrap();
}

/// What reading says of an image of `entries` with bytes behind each.
fn said<M: prost::Message>(kind: ImageKind, entries: &[M], behind: &[u8]) -> String {
    let folder = Folder::new();
    vars(&folder, 4);
    let mut out = folder.images.writer(kind, 9);
    for entry in entries {
        out.write(entry).unwrap();
        out.write_raw(behind).unwrap();
    }
    out.finish().unwrap();
    read(&folder.images, 9).unwrap_err().to_string()
}

#[test]
fn limits_must_be_all_there() {
    let folder = Folder::new();
    assert!(read(&folder.images, 9).unwrap_err().to_string().contains("ipcns-var-9.img"));
    for values in [0, 3, 5] {
        vars(&folder, values);
        assert!(read(&folder.images, 9).unwrap_err().to_string().contains("kernel.sem has"));
    }
    vars(&folder, 4);
    read(&folder.images, 9).unwrap();
}

#[test]
fn segments_must_be_possible() {
    let entry = |id, size| pb::IpcShmEntry { desc: desc(id), size, ..Default::default() };
    let shm = ImageKind::IpcnsShm;
    assert!(said(shm, &[entry(1, 1 << 40)], &[0; 64]).contains("truncated"));
    assert!(said(shm, &[entry(1, 0)], &[]).contains("no segment has 0 bytes"));
    assert!(said(shm, &[entry(u32::MAX, 4)], &[0; 4]).contains("no object can have its number"));
    assert!(
        said(shm, &[entry(1, 4), entry(1, 4)], &[0; 4])
            .contains("ipcns-shm-9.img: System V shared memory 1: there are two")
    );
    let paged =
        |size, flag| pb::IpcShmEntry { desc: desc(1), size, in_pagemaps: Some(true), hugetlb_flag: flag };
    assert!(said(shm, &[paged(u64::MAX, None)], &[]).contains("no segment has"));
    assert!(said(shm, &[paged(1, None)], &[]).contains("its content is missing"));
    for flag in [1, 63 << 26, 40 << 26] {
        assert!(said(shm, &[paged(1, Some(flag))], &[]).contains("no huge pages"), "{flag:x}");
    }
    let folder = Folder::new();
    vars(&folder, 4);
    let mut out = folder.images.writer(shm, 9);
    out.write(&paged(4097, None)).unwrap();
    out.finish().unwrap();
    let mut pages = folder.store.create(ImageKind::ShmemPagemap, 1).unwrap();
    pages.add(0, &[1; 3 * 4096], false).unwrap();
    pages.finish().unwrap();
    assert!(read(&folder.images, 9).unwrap_err().to_string().contains("pages behind its end"));
}

#[test]
fn queues_must_be_possible() {
    let queue = |id, qnum| pb::IpcMsgEntry { desc: desc(id), qbytes: 1, qnum };
    let msg = ImageKind::IpcnsMsg;
    assert!(said(msg, &[queue(1, u32::MAX)], &[]).contains("truncated: 0 of the queue's"));
    assert!(said(msg, &[queue(1, 0), queue(1, 0)], &[]).contains("message queue 1: there are two"));
    for (kind, size, why) in
        [(0, 0, "type 0"), (u64::MAX, 0, "type 18446744073709551615"), (1, u32::MAX, "truncated")]
    {
        let mut head = Vec::new();
        rcriu_images::frame::append_entry(&pb::IpcMsg { mtype: kind, msize: size }, &mut head);
        let said = said(msg, &[queue(1, 1)], &head);
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn semaphores_must_be_possible() {
    let set = |id, nsems| pb::IpcSemEntry { desc: desc(id), nsems };
    let sem = ImageKind::IpcnsSem;
    assert!(said(sem, &[set(1, u32::MAX)], &[0; 8]).contains("truncated"));
    assert!(said(sem, &[set(1, 0)], &[]).contains("semaphores 1: their values are none"));
    assert!(said(sem, &[set(1, 1)], &[0xff; 8]).contains("above 32767"));
    assert!(said(sem, &[set(2, 1), set(2, 1)], &[0; 8]).contains("semaphores 2: there are two"));
}

#[test]
fn what_this_kernel_refuses_is_named() {
    let folder = Folder::new();
    vars(&folder, 4);
    let messages = [IpcMessage { head: pb::IpcMsg { mtype: 1, msize: 3 }, text: b"abc".to_vec() }];
    let mut out = folder.images.writer(ImageKind::IpcnsMsg, 9);
    let entry = pb::IpcMsgEntry { desc: desc(7), qbytes: u32::MAX, qnum: 1 };
    out.write_ipc_messages(&entry, &messages).unwrap();
    out.finish().unwrap();
    let ipc = read(&folder.images, 9).unwrap();
    let Some(said) = apart(|| ipc.restore(&folder.images, false).unwrap_err().to_string()) else { return };
    assert!(said.contains("ipc namespace: write(/proc/sys/kernel/msgmnb) of 4294967295"), "{said}");
}
