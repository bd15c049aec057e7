//! Classes of mappings, from lines of smaps to entries.

use super::*;
use crate::{
    procfs::{ProcDir, maps},
    pstree::RealPid,
};

const RULES: VmaRules = VmaRules { allow_uprobes: false, shmem_dev: 1 };

fn map(line: &str, flags: &str) -> Map {
    let text = format!("{line}\nVmFlags: {flags}\n");
    maps::parse(text.as_bytes(), "smaps", true).unwrap().remove(0)
}

fn entry(line: &str, flags: &str, file: Option<Backing>) -> pb::VmaEntry {
    classify(&map(line, flags), file, file.map(|_| 0), RULES).unwrap().unwrap().entry
}

fn refusal(line: &str, flags: &str) -> String {
    classify(&map(line, flags), None, None, RULES).unwrap_err().to_string()
}

const ANON: &str = "7000-9000 rw-p 00000000 00:00 0";
const FILE: Option<Backing> = Some(Backing::File(FileId(5)));
const SHMEM: Option<Backing> = Some(Backing::Memfd(FileId(6)));

#[test]
fn every_class_has_its_status() {
    let anon = entry(ANON, "rd wr mr mw me ac", None);
    assert_eq!((anon.start, anon.end, anon.prot, anon.fd), (0x7000, 0x9000, 3, -1));
    assert_eq!((anon.status, anon.flags, anon.madv), (st::REGULAR | st::ANON_PRIVATE, 0x22, None));
    assert_eq!(anon.fdflags, None);
    let file = entry("7000-9000 r-xp 00002000 fe:01 9 /bin/x", "rd ex mr mw me", FILE);
    assert_eq!(
        (file.status, file.flags, file.shmid, file.pgoff),
        (st::REGULAR | st::FILE_PRIVATE, 2, 5, 0x2000)
    );
    assert_eq!(file.fdflags, Some(0));
    let memfd = entry("7000-9000 rw-s 0 00:01 9 /memfd:x (deleted)", "rd wr sh", SHMEM);
    assert_eq!((memfd.status, memfd.flags), (st::REGULAR | st::FILE_SHARED | st::MEMFD, 1));
    let shared =
        entry("7000-9000 rw-s 2000 00:01 9 /dev/zero (deleted)", "rd wr sh", Some(Backing::Shared(9)));
    assert_eq!((shared.status, shared.flags, shared.shmid), (st::REGULAR | st::ANON_SHARED, 0x21, 9));
    let vdso = entry("7000-9000 r-xp 0 00:00 0 [vdso]", "rd ex mr mw me de sd", None);
    assert_eq!(vdso.status, st::REGULAR | st::VDSO | st::ANON_PRIVATE);
    let vvar = entry("7000-9000 r--p 0 00:00 0 [vvar]", "rd mr pf io de dd", None);
    assert_eq!((vvar.status, vvar.madv), (st::REGULAR | st::VVAR | st::ANON_PRIVATE, Some(1 << 16)));
    let heap = entry("7000-9000 rw-p 0 00:00 0 [heap]", "rd wr", None);
    assert_eq!(heap.status, st::REGULAR | st::HEAP | st::ANON_PRIVATE);
    let vsyscall = entry("ffffffffff600000-ffffffffff601000 --xp 0 00:00 0 [vsyscall]", "ex", None);
    assert_eq!((vsyscall.status, vsyscall.prot), (st::VSYSCALL | st::ANON_PRIVATE, 4));
}

#[test]
fn flags_become_mmap_and_madvise_bits() {
    let stack = entry(ANON, "rd wr mr mw me gd ac", None);
    assert_eq!(stack.flags, 0x122);
    let all = entry(ANON, "rd lo nr sr rr dc dd mg hg nh wf", None);
    assert_eq!(all.flags, 0x22 | 0x2000 | 0x4000);
    assert_eq!(all.madv, Some(1 << 2 | 1 << 1 | 1 << 10 | 1 << 16 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 18));
    let droppable = classify(&map(ANON, "rd wr wf dp"), None, None, RULES).unwrap().unwrap();
    assert_eq!(droppable.entry.flags, 0x20 | 0x08);
    assert!(droppable.is_private() && !droppable.has_pages());
}

#[test]
fn a_name_given_by_the_program_is_kept_aside() {
    let named = classify(&map("7000-9000 rw-p 0 00:00 0 [anon:my [heap]]", "rd wr"), None, None, RULES);
    let named = named.unwrap().unwrap();
    assert_eq!(named.name.as_deref(), Some(&b"my [heap]"[..]));
    assert_eq!(named.entry.status, st::REGULAR | st::ANON_PRIVATE);
}

#[test]
fn what_cannot_be_kept_is_refused_by_name() {
    assert!(refusal(ANON, "rd wr io pf").contains("memory of a device"));
    assert!(refusal(ANON, "rd wr um").contains("userfaultfd"));
    assert!(refusal(ANON, "rd wr ss").contains("shadow stack"));
    assert!(refusal(ANON, "rd wr nl").contains("non-linear"));
    assert!(refusal(ANON, "rd wr sf").contains("MAP_SYNC"));
    assert!(refusal(ANON, "rd wr qq").contains("\"qq\""));
    assert!(refusal("7000-9000 --xp 0 00:00 0 [uprobes]", "ex io").contains("--allow-uprobes"));
    assert!(refusal("7000-9000 rw-s 0 00:00 0", "rd wr sh").contains("without a file"));
    let allowed = VmaRules { allow_uprobes: true, ..RULES };
    assert_eq!(
        classify(&map("7000-9000 --xp 0 00:00 0 [uprobes]", "ex io"), None, None, allowed).unwrap(),
        None
    );
}

#[test]
fn our_own_mappings_have_classes_and_each_file_is_opened_once() {
    struct Count(Vec<(u64, u64)>);
    impl MappedFiles for Count {
        fn mapped(&mut self, fd: OwnedFd) -> Result<FileId> {
            let stat = nix::sys::stat::fstat(&fd).unwrap();
            self.0.push((stat.st_dev, stat.st_ino));
            Ok(FileId(self.0.len() as u32))
        }
        fn segment(&mut self, _: OwnedFd, id: i32) {
            panic!("we have no System V shared memory {id}");
        }
        fn shared(&mut self, fd: OwnedFd, ino: u64) {
            let stat = nix::sys::stat::fstat(&fd).unwrap();
            assert_eq!(stat.st_ino, ino);
            self.0.push((stat.st_dev, stat.st_ino));
        }
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: map_files can only be read as root");
        return;
    }
    let dir = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
    let maps = maps::smaps(&dir).unwrap();
    let mut files = Count(Vec::new());
    let vmas = collect(&dir, &maps, RULES, &mut files, &mut SeenFiles::default()).unwrap();
    let mut unique = files.0.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), files.0.len());
    assert_eq!(vmas.iter().filter(|v| v.is(st::VVAR)).count(), 1);
    assert_eq!(vmas.iter().filter(|v| v.is(st::VDSO)).count(), 1);
    assert!(vmas.iter().any(|v| v.is(st::HEAP)));
    assert!(vmas.iter().filter(|v| v.is(st::FILE_PRIVATE)).all(|v| v.entry.fdflags == Some(0)));
}
