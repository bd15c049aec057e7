//! Segments in huge pages.

use super::*;

#[test]
fn huge_pages_stay_huge() {
    let pool = "/proc/sys/vm/nr_hugepages";
    let Some(pages) = std::fs::read_to_string(pool).ok().and_then(|t| t.trim().parse::<u32>().ok()) else {
        eprintln!("skipped: no huge pages on this kernel");
        return;
    };
    if std::fs::write(pool, (pages + 4).to_string()).is_err() {
        eprintln!("skipped: no huge pages can be reserved");
        return;
    }
    let folder = Folder::new();
    let size = (2 << 20) + 5000;
    let made = apart(|| {
        let id = shm::create_any(&perm(0), size, 0o4000 | 21 << 26).ok()?;
        let attached = Attached::new(id, size, 2 << 20, false).unwrap();
        let start = attached.region().start();
        attached.region().write(start + (2 << 20) + 4000, b"far").unwrap();
        dump(&folder.cx()).unwrap();
        attached.region().write(start + (2 << 20) + 8192, b"too far").unwrap();
        let said = dump(&Folder::new().cx()).unwrap_err().to_string();
        assert!(said.contains("its last huge page is used"), "{said}");
        attached.detach().unwrap();
        sysv::remove(id).unwrap();
        Some(())
    });
    if let Some(Some(())) = made {
        let ipc = read(&folder.images, 9).unwrap();
        assert_eq!(ipc.segments[0].hugetlb_flag, Some(0o4000 | 21 << 26));
        apart(|| {
            ipc.restore(&folder.images, false).unwrap();
            let attached = Attached::new(ipc.segments[0].desc.id as i32, size, 2 << 20, true).unwrap();
            let mut bytes = [0; 4];
            attached.region().read(attached.region().start() + (2 << 20) + 4000, &mut bytes).unwrap();
            assert_eq!(&bytes, b"far\0");
            assert!(attached.file().unwrap().metadata().unwrap().len() == 4 << 20);
        });
    } else {
        eprintln!("skipped: no huge pages can be had");
    }
    std::fs::write(pool, pages.to_string()).unwrap();
}
