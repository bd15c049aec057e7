use super::{
    super::{forced::FORCED, units::UNIT},
    *,
};

#[test]
fn threads_read_what_one_reads() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..(3 * UNIT + 4096) / 4).flat_map(|n: u64| (n as u32).to_ne_bytes()).collect();
    file.write_all_at(&bytes, 0).unwrap();
    let at = 0x1700_0010_0000;
    let anon = crate::sys::map::Mapping {
        prot: super::super::READ_WRITE,
        flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
        file: None,
    };
    let len = bytes.len() as u64;
    let stored = Stored::Plain(file);
    let region = Region::map(at, len, anon).unwrap();
    let blocks = Blocks::inside(std::iter::once((at, at + len)), super::super::huge::SIZE);
    let to = To::Writable(blocks);
    let bulk = Bulk { threads: 3, huge: Huge::if_allowed(Huge::are_allowed()), uncached: UNCACHED };
    let read = bulk.read(&region, &stored, 0, &[(at, len)], &to).unwrap();
    assert_eq!(read, len);
    let mut seen = vec![0; bytes.len()];
    region.read(at, &mut seen).unwrap();
    assert!(seen == bytes);
    // A file that ends early is told, not filled up.
    let short = bulk.read(&region, &stored, 4096, &[(at, len)], &to).unwrap();
    assert!(short < len);
    region.unmap().unwrap();
}

/// Half of a file is in the page cache, and what is not is read past it, into huge pages and small ones.
#[test]
fn what_is_not_cached_is_read_too() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let bytes: Vec<u8> = (0..(2 * UNIT + 4096) / 4).flat_map(|n: u64| (n as u32).to_ne_bytes()).collect();
    file.write_all_at(&bytes, 0).unwrap();
    file.sync_all().unwrap();
    let drop = |from: u64, len: u64| {
        posix_fadvise(&file, from as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    };
    drop(UNIT / 2 - 8192, UNIT);
    let at = 0x1800_0010_0000;
    let anon = crate::sys::map::Mapping {
        prot: super::super::READ_WRITE,
        flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
        file: None,
    };
    let len = bytes.len() as u64;
    let pieces = [(at, UNIT), (at + UNIT + 4096, len - UNIT - 8192), (at + len + 4096, 8192)];
    for (uncached, huge) in
        [(0, Huge::if_allowed(Huge::are_allowed())), (0, Huge::never()), (u64::MAX, Huge::never())]
    {
        let region = Region::map(at, len + (1 << 20), anon).unwrap();
        let blocks = Blocks::inside(pieces.iter().map(|p| (p.0, p.0 + p.1)), super::super::huge::SIZE);
        let to = To::Writable(blocks);
        let bulk = Bulk { threads: 2, huge, uncached };
        let stored = Stored::Plain(file.try_clone().unwrap());
        assert_eq!(bulk.read(&region, &stored, 0, &pieces, &to).unwrap(), len);
        let mut from = 0;
        for (at, len) in pieces {
            let mut seen = vec![0; len as usize];
            region.read(at, &mut seen).unwrap();
            assert!(seen == bytes[from..from + len as usize], "{uncached} {at:x}");
            from += len as usize;
        }
        // A file that ends early is told.
        assert!(bulk.read(&region, &stored, len - 8192, &pieces[1..2], &to).unwrap() <= 8192);
        region.unmap().unwrap();
        drop(0, 0);
    }
}

/// Memory that may not be written is filled all the same, and a file that ends early is told.
#[test]
fn protected_memory_is_filled() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..3 * FORCED / 2).map(|n| (n / 7) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    let (at, len) = (0x1700_4000_0000, bytes.len() as u64);
    let anon = crate::sys::map::Mapping {
        prot: libc::PROT_READ as u32,
        flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
        file: None,
    };
    let region = Region::map(at, 2 * len, anon).unwrap();
    if region.force(at, &[0]).is_err() {
        eprintln!("SKIP: this system forbids to write memory against its protection");
        return region.unmap().unwrap();
    }
    let bulk = Bulk { threads: 2, huge: Huge::never(), uncached: UNCACHED };
    let stored = Stored::Plain(file);
    let pieces = [(at, 4096), (at + 8192, len - 4096)];
    assert_eq!(bulk.read(&region, &stored, 0, &pieces, &To::Protected).unwrap(), len);
    let mut seen = vec![0; len as usize + 4096];
    region.read(at, &mut seen).unwrap();
    assert!(seen[..4096] == bytes[..4096] && seen[8192..] == bytes[4096..]);
    assert!(bulk.read(&region, &stored, 4096, &pieces, &To::Protected).unwrap() < len);
    region.unmap().unwrap();
}
