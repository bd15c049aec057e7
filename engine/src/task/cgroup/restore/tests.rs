use super::*;

#[test]
fn paths_stay_below_the_root() {
    assert_eq!(clean(b"/a//b/").unwrap(), b"a/b");
    assert_eq!(clean(b"/").unwrap(), b".");
    assert!(clean(b"/a/../b").is_err());
    assert!(clean(b"/a\0b").is_err());
}

#[test]
fn without_an_image_nobody_moves() {
    let dir = tempfile::tempdir().unwrap();
    let images = ImageDir::open(dir.path()).unwrap();
    let groups = Groups::prepare(&images, 1, &CgroupOptions::default()).unwrap();
    groups.enter(1, 7).unwrap();
    groups.enter_thread(RealPid(1), 2, 3).unwrap();
}
