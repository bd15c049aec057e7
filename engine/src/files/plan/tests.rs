//! Plans from made-up files, compared as text. Neither root nor a kernel is needed.

use std::os::fd::OwnedFd;

use super::{build::plan, *};
use crate::files::{FilesTask, Needs};

#[derive(Debug, Clone, Default)]
struct Fake {
    name: &'static str,
    needs: Needs,
}

impl RestoredFile for Fake {
    fn name(&self) -> String {
        self.name.into()
    }
    fn needs(&self) -> Needs {
        self.needs.clone()
    }
    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        Err(Error::bug("plans are not carried out here"))
    }
}

fn lone(name: &'static str) -> Fake {
    Fake { name, needs: Needs::default() }
}

fn pipe_end(name: &'static str, number: u64) -> Fake {
    Fake { name, needs: Needs { group: Some(GroupKey { kind: FdType::Pipe, number }), ..Needs::default() } }
}

fn fd(fd: u32, id: u32, cloexec: bool) -> pb::FdinfoEntry {
    pb::FdinfoEntry { id, flags: cloexec.into(), fd, ..pb::FdinfoEntry::default() }
}

fn table(task: i32, fds: &[pb::FdinfoEntry]) -> Table<'_> {
    Table { task: VirtPid(task), sharers: Vec::new(), fds }
}

fn run(files: &[(u32, Fake)], tables: &[Table<'_>]) -> Result<FilesPlan> {
    let mut files: Vec<_> = files
        .iter()
        .map(|(id, file)| (FileId(*id), Box::new(file.clone()) as Box<dyn RestoredFile>))
        .collect();
    files.sort_by_key(|(id, _)| *id);
    let (ids, files) = files.into_iter().unzip();
    let files = ById::of_sorted(ids, files).unwrap();
    plan(files, tables, |id| Error::image(format!("files.img has no file {id}")))
}

#[test]
fn the_lowest_user_opens_and_the_others_receive() {
    let files = [(1, lone("tty")), (2, lone("log"))];
    let a = [fd(0, 1, false), fd(1, 1, true), fd(5, 2, false)];
    let b = [fd(0, 1, false), fd(3, 2, false)];
    // The order tables come in does not matter, the lower pid does.
    let plan = run(&files, &[table(20, &b), table(10, &a)]).unwrap();
    assert_eq!(
        plan.text(),
        "task 20:\n  receive 0x1 tty -> 0 from 10\n  receive 0x2 log -> 3 from 10\n\
         task 10:\n  open 0x1 tty -> 0 -> 1\n  open 0x2 log -> 5\n  finish 0x1 tty\n  finish 0x2 log\n"
    );
    assert_eq!(plan.nodes[FileId(1)].slot, Some(Slot { number: 0, receivers: 1 }));
}

#[test]
fn both_ends_of_a_pipe_are_opened_by_one_task() {
    let files = [(7, pipe_end("read", 4)), (9, pipe_end("write", 4)), (8, lone("x"))];
    let a = [fd(3, 9, false), fd(4, 8, false)];
    let b = [fd(0, 7, false)];
    let plan = run(&files, &[table(1, &a), table(2, &b)]).unwrap();
    assert_eq!(
        plan.text(),
        "task 1:\n  open 0x7 read\n  open 0x9 write -> 3\n  open 0x8 x -> 4\n  finish 0x7 read\n  \
         finish 0x9 write\n  finish 0x8 x\ntask 2:\n  receive 0x7 read -> 0 from 1\n"
    );
}

#[test]
fn what_is_needed_comes_first_even_with_a_higher_number() {
    let early = Fake { name: "client", needs: Needs { opened: vec![FileId(5)], ..Needs::default() } };
    let files = [(1, early), (5, lone("listener"))];
    let a = [fd(3, 1, false)];
    let b = [fd(3, 5, false)];
    let plan = run(&files, &[table(1, &a), table(2, &b)]).unwrap();
    assert_eq!(
        plan.text(),
        "task 1:\n  receive 0x5 listener from 2\n  open 0x1 client -> 3\n  finish 0x1 client\n\
         task 2:\n  open 0x5 listener -> 3\n  finish 0x5 listener\n"
    );
}

#[test]
fn files_without_a_descriptor_go_to_whoever_needs_them() {
    let epoll =
        Fake { name: "epoll", needs: Needs { at_hand: vec![FileId(4), FileId(3)], ..Needs::default() } };
    // 3 is open in another task, 4 nowhere.
    let files = [(2, epoll), (3, lone("socket")), (4, lone("closed"))];
    let a = [fd(3, 3, false)];
    let b = [fd(6, 2, false)];
    let plan = run(&files, &[table(1, &a), table(2, &b)]).unwrap();
    assert_eq!(
        plan.text(),
        "task 1:\n  open 0x3 socket -> 3\n  finish 0x3 socket\n\
         task 2:\n  open 0x2 epoll -> 6\n  receive 0x3 socket from 1\n  open 0x4 closed\n  \
         finish 0x2 epoll\n  finish 0x4 closed\n"
    );
    assert_eq!(plan.tables[1].keep.iter().copied().collect::<Vec<_>>(), [FileId(3), FileId(4)]);
}

#[test]
fn a_circle_is_an_error_that_names_its_files() {
    let after = |name, id| Fake { name, needs: Needs { opened: vec![FileId(id)], ..Needs::default() } };
    let files = [(1, after("a", 2)), (2, after("b", 3)), (3, after("c", 2))];
    let fds = [fd(0, 1, false)];
    let e = run(&files, &[table(1, &fds)]).unwrap_err().to_string();
    assert_eq!(e, "files wait for each other: 0x2 b <- 0x3 c <- 0x2 b");
}

#[test]
fn damaged_tables_are_refused() {
    let files = [(1, lone("x"))];
    for (fds, text) in [
        (vec![fd(0, 2, false)], "fd 0 of task 1: files.img has no file 0x2"),
        (vec![fd(0, 1, false), fd(0, 1, false)], "task 1: descriptor 0 is there twice"),
        (vec![fd(u32::MAX, 1, false)], "task 1: descriptor 4294967295 is too large"),
    ] {
        assert_eq!(run(&files, &[table(1, &fds)]).unwrap_err().to_string(), text);
    }
}

#[test]
fn many_tasks_and_files_are_planned_in_linear_time() {
    let files: Vec<_> = (0..10_000).map(|n| (n + 1, lone("f"))).collect();
    let fds: Vec<_> = (0..10_000).map(|n| fd(n, n + 1, false)).collect();
    let few: Vec<_> = (0..10).map(|n| fd(n, n + 1, false)).collect();
    let mut tables = vec![table(1, &fds)];
    tables.extend((2..1000).map(|pid| table(pid, &few)));
    let plan = run(&files, &tables).unwrap();
    assert_eq!(plan.tables[0].steps.len(), 20_000);
    assert_eq!(plan.tables[500].steps.len(), 10);
    assert_eq!(plan.slots, 10);
}

#[test]
fn room_is_found_above_the_tables_or_in_a_gap() {
    let files = [(1, lone("x"))];
    let low = [fd(0, 1, false), fd(7, 1, false)];
    let high = [fd(1023, 1, false)];
    let plan = run(&files, &[table(1, &low)]).unwrap();
    assert_eq!(plan.zone(1024, 64).unwrap(), Zone { base: 8, end: 1024 });
    let plan = run(&files, &[table(1, &low), table(2, &high)]).unwrap();
    assert_eq!(plan.zone(1024, 64).unwrap(), Zone { base: 8, end: 1023 });
    assert_eq!(plan.zone(4096, 64).unwrap(), Zone { base: 1024, end: 4096 });
    let e = plan.zone(512, 64).unwrap_err().to_string();
    assert!(e.contains("descriptor 1023") && e.contains("ulimit -n 1024"), "{e}");
    assert!(plan.zone(1024, 2000).unwrap_err().to_string().contains("ulimit -n 3024"));
    assert_eq!(run(&files, &[]).unwrap().zone(1024, 64).unwrap().base, 0);
}
