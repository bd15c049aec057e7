//! Images that are cut off or hold what no dump writes.

use super::*;

#[test]
fn damaged_images_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let done = fresh(|| {
        sh("ip link set lo up; ip route add 10.0.0.0/8 dev lo; ip link add v0 type veth peer name v1")?;
        dump_here(folder.path()).map_err(|e| e.to_string())
    });
    match done {
        None => return,
        Some(Err(e)) => return eprintln!("skipped: {e}"),
        Some(Ok(())) => {}
    }
    read_here(folder.path(), &[]).unwrap();
    for name in ["ifaddr-9.img", "route-9.img", "rule-9.img"] {
        let path = folder.path().join(name);
        let good = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for cut in 1..good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            refused += usize::from(read_here(folder.path(), &[]).is_err());
        }
        // Only a cut between messages leaves a whole image.
        assert!(refused > good.len() / 2, "{name}: {refused} of {}", good.len());
        for (at, value) in [(4, 0u32), (4, 15), (4, 17), (4, u32::MAX), (0, 1)] {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            std::fs::write(&path, &bad).unwrap();
            assert!(read_here(folder.path(), &[]).is_err(), "{name} {at} {value}");
        }
        std::fs::write(&path, &good).unwrap();
    }
    std::fs::write(
        folder.path().join("netns-ct-9.img"),
        [20, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0],
    )
    .unwrap();
    assert!(read_here(folder.path(), &[]).is_err());
}
