use super::*;
use crate::{Entry, pb::FdTypes};

fn folder() -> (tempfile::TempDir, ImageDir) {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    (tmp, dir)
}

fn write<M: Entry>(dir: &ImageDir, kind: ImageKind, id: u64, entries: &[M]) {
    let mut out = dir.writer(kind, id);
    entries.iter().for_each(|e| out.write(e).unwrap());
    out.finish().unwrap();
}

#[test]
fn files_of_the_older_layout_look_like_todays() {
    let (_tmp, dir) = folder();
    write(
        &dir,
        ImageKind::RegFiles,
        0,
        &[pb::RegFileEntry { id: 1, name: b"/a".into(), ..Default::default() }],
    );
    write(&dir, ImageKind::Pipes, 0, &[pb::PipeEntry { id: 2, pipe_id: 7, ..Default::default() }]);
    write(
        &dir,
        ImageKind::EventpollFile,
        0,
        &[3, 4].map(|id| pb::EventpollFileEntry { id, ..Default::default() }),
    );
    let target = |id, tfd| pb::EventpollTfdEntry { id, tfd, ..Default::default() };
    write(&dir, ImageKind::EventpollTfd, 0, &[target(4, 10), target(3, 11), target(4, 12)]);
    write(&dir, ImageKind::InotifyFile, 0, &[pb::InotifyFileEntry { id: 5, ..Default::default() }]);
    let watch = pb::InotifyWdEntry { id: 5, wd: 1, mask: 0x0800_0002, ..Default::default() };
    write(&dir, ImageKind::InotifyWd, 0, &[watch]);
    write(&dir, ImageKind::TtyFiles, 0, &[pb::TtyFileEntry { id: 6, ..Default::default() }]);

    let files = files(&dir).unwrap();
    let kinds: Vec<_> = files.iter().map(|f| (f.id, f.r#type())).collect();
    assert_eq!(
        kinds,
        [
            (1, FdTypes::Reg),
            (2, FdTypes::Pipe),
            (3, FdTypes::Eventpoll),
            (4, FdTypes::Eventpoll),
            (5, FdTypes::Inotify),
            (6, FdTypes::Tty)
        ]
    );
    assert_eq!(files[0].reg.as_ref().unwrap().name, b"/a");
    let targets =
        |at: usize| -> Vec<u32> { files[at].epfd.as_ref().unwrap().tfd.iter().map(|t| t.tfd).collect() };
    assert_eq!((targets(2), targets(3)), (vec![11], vec![10, 12]));
    assert_eq!(files[4].ify.as_ref().unwrap().wd[0].mask, 2);
}

#[test]
fn a_watch_of_no_file_is_an_error() {
    let (_tmp, dir) = folder();
    write(&dir, ImageKind::InotifyWd, 0, &[pb::InotifyWdEntry { id: 0x55, ..Default::default() }]);
    assert_eq!(files(&dir).unwrap_err().to_string(), "inotify-wd.img: there is no file with id 0x55");
}

#[test]
fn cores_of_the_older_layout_are_completed() {
    let (_tmp, dir) = folder();
    let core = |tc: Option<pb::TaskCoreEntry>| pb::CoreEntry {
        mtype: 1,
        tc,
        thread_core: Some(Default::default()),
        ..Default::default()
    };
    write(&dir, ImageKind::Core, 5, &[core(Some(Default::default()))]);
    write(&dir, ImageKind::Core, 6, &[core(None)]);
    write(&dir, ImageKind::Sigact, 5, &vec![pb::SaEntry::default(); 62]);
    let timer = |vsec| pb::ItimerEntry { vsec, ..Default::default() };
    write(&dir, ImageKind::Itimers, 5, &[timer(1), timer(2), timer(3)]);
    write(&dir, ImageKind::PosixTimers, 5, &[pb::PosixTimerEntry { it_id: 9, ..Default::default() }]);
    write(&dir, ImageKind::Rlimit, 5, &[pb::RlimitEntry { cur: 1, max: 2 }]);
    write(&dir, ImageKind::Signal, 5, &[pb::SiginfoEntry { siginfo: vec![1; 128] }]);
    write(&dir, ImageKind::Psignal, 6, &[pb::SiginfoEntry { siginfo: vec![2; 128] }]);
    write(&dir, ImageKind::Creds, 5, &[pb::CredsEntry { uid: 33, ..Default::default() }]);
    write(&dir, ImageKind::Mm, 5, &[pb::MmEntry::default()]);
    write(&dir, ImageKind::Vmas, 5, &[pb::VmaEntry { start: 4096, ..Default::default() }]);
    write(&dir, ImageKind::Ids, 5, &[pb::TaskKobjIdsEntry { files_id: 4, ..Default::default() }]);

    let leader = super::core(&dir, 5).unwrap();
    let tc = leader.tc.unwrap();
    assert_eq!(tc.sigactions.len(), 62);
    let timers = tc.timers.unwrap();
    assert_eq!((timers.real.vsec, timers.prof.vsec, timers.posix[0].it_id), (1, 3, 9));
    assert_eq!(tc.rlimits.unwrap().rlimits[0].max, 2);
    assert_eq!(tc.signals_s.unwrap().signals[0].siginfo, [1; 128]);
    let thread = thread_core(&dir, 5, 6).unwrap().thread_core.unwrap();
    assert_eq!(thread.creds.unwrap().uid, 33);
    assert_eq!(thread.signals_p.unwrap().signals[0].siginfo, [2; 128]);
    assert_eq!(mm(&dir, 5).unwrap().unwrap().vmas[0].start, 4096);
    assert!(mm(&dir, 6).unwrap().is_none());
    assert_eq!(ids(&dir, 5).unwrap().unwrap().files_id, 4);
    assert!(ids(&dir, 6).unwrap().is_none());
}

#[test]
fn todays_fields_win_and_nothing_is_invented() {
    let (_tmp, dir) = folder();
    let tc = pb::TaskCoreEntry { rlimits: Some(pb::TaskRlimitsEntry::default()), ..Default::default() };
    write(&dir, ImageKind::Core, 5, &[pb::CoreEntry { mtype: 1, tc: Some(tc), ..Default::default() }]);
    write(&dir, ImageKind::Rlimit, 5, &[pb::RlimitEntry { cur: 1, max: 2 }]);
    let tc = super::core(&dir, 5).unwrap().tc.unwrap();
    assert!(tc.rlimits.unwrap().rlimits.is_empty());
    assert!(tc.timers.is_none() && tc.signals_s.is_none());
}

#[test]
fn inventories_that_cannot_be_read_are_refused() {
    let (_tmp, dir) = folder();
    let put = |img_version, fdinfo_per_id| {
        write(
            &dir,
            ImageKind::Inventory,
            0,
            &[pb::InventoryEntry { img_version, fdinfo_per_id, ..Default::default() }],
        );
        inventory(&dir).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(put(1, Some(true)), Ok(()));
    assert_eq!(put(2, Some(true)), Ok(()));
    assert_eq!(put(3, Some(true)), Ok(()));
    assert!(put(4, Some(true)).unwrap_err().contains("image version 4"));
    assert!(put(2, None).unwrap_err().contains("per task"));
}

#[test]
fn older_remaps_tell_ghosts_by_a_bit() {
    let (_tmp, dir) = folder();
    let remap = |remap_id, remap_type| pb::RemapFilePathEntry { orig_id: 1, remap_id, remap_type };
    write(&dir, ImageKind::RemapFpath, 0, &[remap(5, None), remap(5 | 1 << 31, None), remap(5, Some(2))]);
    let seen: Vec<_> = remaps(&dir).unwrap().iter().map(|r| (r.remap_id, r.remap_type())).collect();
    use pb::RemapType::{Ghost, Linked, Procfs};
    assert_eq!(seen, [(5, Linked), (5, Ghost), (5, Procfs)]);
}
