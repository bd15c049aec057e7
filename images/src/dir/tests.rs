use std::{fs, io::Write, os::unix::fs::symlink};

use super::*;
use crate::pb;

fn folder() -> (tempfile::TempDir, ImageDir) {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(tmp.path()).unwrap();
    (tmp, dir)
}

fn pipe(id: u32, bytes: u32) -> pb::PipeDataEntry {
    pb::PipeDataEntry { pipe_id: id, bytes, size: None }
}

#[test]
fn entries_and_payloads_come_back() {
    let (tmp, dir) = folder();
    let mut writer = dir.writer(ImageKind::PipesData, 0);
    writer.write(&pipe(1, 3)).unwrap();
    writer.write_raw(b"abc").unwrap();

    writer.write(&pipe(2, 2)).unwrap();
    let mut file = writer.as_file().unwrap();
    file.write_all(b"de").unwrap();
    writer.write(&pipe(3, 0)).unwrap();
    writer.finish().unwrap();

    let mut reader = dir.reader(ImageKind::PipesData, 0).unwrap().unwrap();
    let mut seen = Vec::new();
    while let Some(entry) = reader.next::<pb::PipeDataEntry>().unwrap() {
        seen.push((entry.pipe_id, reader.payload(entry.bytes.into()).unwrap()));
    }
    assert_eq!(seen, [(1, b"abc".to_vec()), (2, b"de".to_vec()), (3, vec![])]);
    assert_eq!(dir.created(), ["pipes-data.img"]);
    assert_eq!(dir.images().unwrap(), [(ImageKind::PipesData, 0)]);
    dir.remove_created().unwrap();
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    dir.check_written().unwrap();
}

#[test]
fn an_image_without_entries_is_no_file_and_removes_a_stale_one() {
    let (tmp, dir) = folder();
    fs::write(tmp.path().join("pipes.img"), "stale").unwrap();
    dir.writer(ImageKind::Pipes, 0).finish().unwrap();
    assert!(dir.reader(ImageKind::Pipes, 0).unwrap().is_none());
    assert!(dir.read_all::<pb::PipeEntry>(ImageKind::Pipes, 0).unwrap().is_empty());
    assert_eq!(
        dir.read_one::<pb::CoreEntry>(ImageKind::Core, 7).unwrap_err().to_string(),
        "core-7.img: there is no such image"
    );
}

#[test]
fn the_inventory_has_one_magic() {
    let (tmp, dir) = folder();
    let mut writer = dir.writer(ImageKind::Inventory, 0);
    writer.write(&pb::InventoryEntry { img_version: 2, ..Default::default() }).unwrap();
    drop(writer);
    dir.check_written().unwrap();
    assert_eq!(
        fs::read(tmp.path().join("inventory.img")).unwrap(),
        [0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 8, 2]
    );
    assert_eq!(dir.read_one::<pb::InventoryEntry>(ImageKind::Inventory, 0).unwrap().img_version, 2);
}

#[test]
fn a_writer_that_fails_when_dropped_is_remembered() {
    let (tmp, dir) = folder();
    symlink("/dev/full", tmp.path().join("pstree.img")).unwrap();
    let mut writer = dir.writer(ImageKind::Pstree, 0);
    writer.write(&pb::PstreeEntry::default()).unwrap();
    drop(writer);
    let error = dir.check_written().unwrap_err();
    assert_eq!(error.errno(), Some(28), "{error}");
    assert!(error.to_string().starts_with("pstree.img: write: "), "{error}");
}

#[test]
fn parents_form_a_chain() {
    let (tmp, _) = folder();
    for name in ["1", "2", "3"] {
        fs::create_dir(tmp.path().join(name)).unwrap();
    }
    let dir = |name: &str| ImageDir::open(tmp.path().join(name)).unwrap();
    dir("2").link_parent(Path::new("../1")).unwrap();
    dir("3").link_parent(Path::new("../1")).unwrap();
    dir("3").link_parent(Path::new("../2")).unwrap();
    dir("3").link_parent(Path::new("../2")).unwrap();
    assert_eq!(dir("3").chain().unwrap().len(), 3);
    assert!(dir("1").parent().unwrap().is_none());
    let gone = dir("1").link_parent(Path::new("../0")).unwrap_err().to_string();
    assert!(gone.starts_with("../0: access parent folder: "), "{gone}");
    dir("1").link_parent(Path::new("../3")).unwrap();
    let round = dir("3").chain().unwrap_err().to_string();
    assert!(round.starts_with("parent: the chain of parents leads back to "), "{round}");
}

#[test]
fn images_that_are_made_behind_are_there_when_anybody_looks() {
    let (tmp, dir) = folder();
    dir.write_behind();
    let text = vec![7u8; 5000];
    // More than the thread is started for.
    for id in 0..200 {
        let mut writer = dir.writer(ImageKind::Core, id);
        writer.write_raw(&text).unwrap();
        writer.finish().unwrap();
    }
    assert_eq!(dir.size(ImageKind::Core, 199).unwrap(), Some(5008));
    dir.writer(ImageKind::Pipes, 0).finish().unwrap();
    let mut nothing = dir.writer(ImageKind::Fdinfo, 2);
    nothing.write_nothing();
    nothing.finish().unwrap();
    assert_eq!(dir.images().unwrap().len(), 201);
    assert!(fs::read(tmp.path().join("core-57.img")).unwrap().ends_with(&text));
    dir.check_written().unwrap();

    symlink("/dev/full", tmp.path().join("mm-1.img")).unwrap();
    for id in 0..100 {
        let mut writer = dir.writer(ImageKind::Mm, id);
        writer.write_raw(&text).unwrap();
        writer.finish().unwrap();
    }
    let error = dir.check_written().unwrap_err().to_string();
    assert!(error.starts_with("mm-1.img: write: "), "{error}");
    dir.remove_created().unwrap();
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}
