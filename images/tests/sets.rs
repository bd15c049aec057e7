//! Looks at real image sets below `IMAGE_SETS`: each is complete and holds together.

use std::{env, fs, path::PathBuf};

use rcriu_images::{
    ImageDir,
    check::check,
    set::{ImageSet, Verdict, census, memory, needs, sockets, tree},
};

#[test]
fn real_sets_hold_together() {
    let Ok(sets) = env::var("IMAGE_SETS") else {
        println!("SKIP: IMAGE_SETS is not set");
        return;
    };
    let mut paths: Vec<PathBuf> = fs::read_dir(sets).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.join("inventory.img").exists());
    paths.sort();
    assert!(!paths.is_empty());
    for path in paths {
        let dir = ImageDir::open(&path).unwrap();
        let set = ImageSet::load(&dir).unwrap();
        assert_eq!(set.verdict(), Verdict::Complete, "{}", path.display());
        println!("{}", path.display());
        for node in tree(&set) {
            println!(
                "{:?} {} {:?} {:?}",
                node.bars,
                node.task.pid,
                node.task.state(),
                node.task.cmdline(&dir).unwrap()
            );
        }
        println!(
            "{:?}\n{:?}\n{:?}\n{:?}",
            memory(&set).unwrap(),
            census(&set, u64::MAX).unwrap(),
            sockets(&set),
            needs(&set).unwrap()
        );
        assert_eq!(check(&dir).unwrap(), [], "{}", path.display());
    }
}
