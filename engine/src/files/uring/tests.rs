use std::os::fd::AsRawFd;

use super::*;
use crate::{
    files::roundtrip::{FREE, Trip, at, get, same},
    sys::uring::{self, Layout, Part, View},
};

const SHAPE: Shape = Shape { sq_entries: 8, cq_entries: 16, flags: 0 };

fn here() -> bool {
    let made = uring::setup(&SHAPE);
    if let Err(e) = &made {
        eprintln!("skipped: no io_uring can be made: {e}");
    }
    made.is_ok()
}

fn entry() -> pb::RcriuUring {
    let (_, layout) = uring::setup(&SHAPE).unwrap();
    let mut rings = vec![0; 4096];
    let mut set =
        |at: u32, word: u32| rings[at as usize..at as usize + 4].copy_from_slice(&word.to_ne_bytes());
    set(layout.sq_head(), 1_000);
    set(layout.sq_tail(), 1_001);
    set(layout.cq_tail(), 1_000);
    set(layout.cq_head(), 998);
    set(layout.sq_entries(), 8);
    set(layout.cq_entries(), 16);
    pb::RcriuUring {
        sq_entries: 8,
        cq_entries: 16,
        taken: 1_000,
        given: 1_000,
        offset: layout.words(),
        rings,
        ..Default::default()
    }
}

#[test]
fn hostile_images_are_refused() {
    if !here() {
        return;
    }
    let good = entry();
    check(&good).unwrap();
    make::ring(&good).unwrap();
    for bad in [
        pb::RcriuUring { setup: 2, ..good.clone() },
        pb::RcriuUring { sq_entries: 0, ..good.clone() },
        pb::RcriuUring { sq_entries: 6, ..good.clone() },
        pb::RcriuUring { sq_entries: 65_536, cq_entries: 65_536, ..good.clone() },
        pb::RcriuUring { cq_entries: 1 << 31, ..good.clone() },
        pb::RcriuUring { cq_entries: 4, ..good.clone() },
        pb::RcriuUring { taken: u32::MAX, given: u32::MAX, ..good.clone() },
        pb::RcriuUring { given: 1_001, ..good.clone() },
    ] {
        assert!(check(&bad).is_err(), "{bad:?}");
    }
    for bad in [
        pb::RcriuUring { taken: 999, ..good.clone() },
        pb::RcriuUring { given: 999, ..good.clone() },
        pb::RcriuUring { offset: Vec::new(), ..good.clone() },
        pb::RcriuUring { offset: vec![u32::MAX; 14], ..good.clone() },
        pb::RcriuUring { rings: Vec::new(), ..good.clone() },
        pb::RcriuUring { rings: vec![0; 1 << 20], ..good.clone() },
        pb::RcriuUring { requests: vec![0; 1 << 20], ..good.clone() },
    ] {
        assert!(make::ring(&bad).is_err(), "{bad:?}");
    }
}

#[test]
fn the_kernel_goes_on_where_it_was() {
    if !here() {
        return;
    }
    // Some without an event; the numbers go round many times.
    for (taken, given) in [(0, 0), (1, 1), (7, 7), (1_000, 1_000), (1_000, 993), (40_000, 40_000)] {
        let mut old = entry();
        let layout = uring::setup(&SHAPE).unwrap().1;
        let mut set = |at: u32, word: u32| {
            old.rings[at as usize..at as usize + 4].copy_from_slice(&word.to_ne_bytes());
        };
        set(layout.sq_head(), taken);
        set(layout.sq_tail(), taken);
        set(layout.cq_tail(), given);
        set(layout.cq_head(), given);
        let ring = make::ring(&pb::RcriuUring { taken, given, ..old }).unwrap();
        let view = View::of(ring.as_fd(), Part::Rings, 4096).unwrap();
        view.set(layout.sq_tail(), taken + 1).unwrap();
        assert_eq!(uring::submit(ring.as_fd(), 1).unwrap(), 1);
        assert_eq!(view.word(layout.sq_head()).unwrap(), taken + 1);
        assert_eq!(view.word(layout.cq_tail()).unwrap(), given + 1);
    }
}

#[test]
fn shapes_are_told_apart() {
    if !here() {
        return;
    }
    for sq_entries in [1, 2, 8, 64, 512] {
        for flags in [0, SQE128, CQE32, NO_SQARRAY, SQE128 | CQE32, SQE128 | CQE32 | NO_SQARRAY] {
            let shape = Shape { sq_entries, cq_entries: 2 * sq_entries, flags };
            let Ok((ring, layout)) = uring::setup(&shape) else { continue };
            let requests = View::of(ring.as_fd(), Part::Requests, shape.requests()).unwrap();
            let rings = View::of(ring.as_fd(), Part::Rings, shape.rings(&layout)).unwrap();
            let hidden = flags & NO_SQARRAY != 0 && sq_entries < 64;
            if hidden {
                let found = super::shape::find(ring.as_fd(), sq_entries, 2 * sq_entries);
                assert!(found.unwrap_err().to_string().contains("hardly any"));
                for n in 0..sq_entries {
                    requests.write(u64::from(n) * shape.sizes().0 + 32, &[1]).unwrap();
                }
                rings.set(layout.sq_tail(), sq_entries).unwrap();
                assert_eq!(uring::submit(ring.as_fd(), sq_entries).unwrap(), sq_entries);
            }
            if hidden && sq_entries == 1 {
                continue;
            }
            let before = all(&ring, &shape, &layout);
            let found = super::shape::find(ring.as_fd(), sq_entries, 2 * sq_entries).unwrap();
            assert_eq!(found.0, shape);
            assert_eq!(all(&ring, &shape, &layout), before, "words were not put back");
        }
    }
}

fn all(ring: &OwnedFd, shape: &Shape, layout: &Layout) -> Vec<u8> {
    View::of(ring.as_fd(), Part::Rings, shape.rings(layout)).unwrap().bytes()
}

#[test]
fn what_waits_is_named() {
    let told = ask::told(
        b"pos:\t0\nflags:\t02\nSqMask:\t0x7\nSQEs:\t1\n    0: opcode:NOP, fd:0\nCQEs:\t2\n    0: user_data:0, res:0, flag:0\n\
          \x20   1: user_data:0, extra1:0\nSqThread:\t-1\nUserFiles:\t0\nUserBufs:\t0\nPollList:\n  op=6, task_works=0\n\
          \x20 op=27, task_works=0\n  op=6, task_works=0\n  op=99, task_works=0\nCqOverflowList:\n",
    );
    assert_eq!((told.shown().count(), told.large_event()), (1, Some(false)));
    let said = told.refuse().unwrap_err().to_string();
    assert!(said.contains("POLL_ADD, RECV, number 99"), "{said}");
}

#[test]
fn descriptors_of_a_ring_stay_one() {
    if !here() {
        return;
    }
    Trip::new(
        concat!(module_path!(), "::descriptors_of_a_ring_stay_one"),
        |_| {
            let (ring, layout) = uring::setup(&SHAPE).unwrap();
            let view = View::of(ring.as_fd(), Part::Rings, 4096).unwrap();
            for n in 0..20 {
                view.set(layout.sq_tail(), n + 1).unwrap();
                assert_eq!(uring::submit(ring.as_fd(), 1).unwrap(), 1);
                view.set(layout.cq_head(), n).unwrap();
            }
            at(ring.try_clone().unwrap(), FREE, false);
            at(ring, FREE + 1, true);
        },
        |_| {
            assert!(same(FREE, FREE + 1));
            let told =
                std::fs::read_to_string(format!("/proc/self/fdinfo/{}", get(FREE).as_raw_fd())).unwrap();
            for line in ["SqHead:\t20", "CachedSqHead:\t20", "CqHead:\t19", "CachedCqTail:\t20", "SQEs:\t0"] {
                assert!(told.contains(line), "{told}");
            }
        },
    )
    .run();
}
