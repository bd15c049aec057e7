use std::path::Path;

use super::*;
use crate::{
    files::roundtrip::{FREE, Trip, at},
    sys::{bpfprog::Insn, fd},
};

/// As systemd 252 has it for a service without any addresses: reads the protocol and lets nothing pass.
const PACKETS: [Insn; 8] = [
    [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
    [0x61, 0x67, 16, 0, 0, 0, 0, 0],
    [0xb4, 8, 0, 0, 0, 0, 0, 0],
    [0x44, 8, 0, 0, 2, 0, 0, 0],
    [0xb7, 0, 0, 0, 1, 0, 0, 0],
    [0x55, 8, 1, 0, 2, 0, 0, 0],
    [0xb7, 0, 0, 0, 0, 0, 0, 0],
    [0x95, 0, 0, 0, 0, 0, 0, 0],
];

/// Allows character devices only.
const DEVICES: [Insn; 6] = [
    [0x69, 0x12, 0, 0, 0, 0, 0, 0],
    [0xb7, 0, 0, 0, 1, 0, 0, 0],
    [0x55, 2, 1, 0, 2, 0, 0, 0],
    [0x95, 0, 0, 0, 0, 0, 0, 0],
    [0xb7, 0, 0, 0, 0, 0, 0, 0],
    [0x95, 0, 0, 0, 0, 0, 0, 0],
];

fn may_load() -> bool {
    let loaded = bpfprog::load(original::CGROUP_DEVICE, &DEVICES, true, b"rcriu_test");
    if let Err(e) = &loaded {
        eprintln!("skipped: no BPF program can be loaded: {e}");
    }
    loaded.is_ok()
}

fn load(kind: u32, insns: &[Insn], name: &[u8], number: i32) {
    at(bpfprog::load(kind, insns, true, name).unwrap(), number, number == FREE);
}

fn info(number: i32) -> bpfprog::Info {
    bpfprog::info(fd::borrow(number).unwrap()).unwrap()
}

#[test]
fn programs_come_back_as_they_were_loaded() {
    if !may_load() {
        return;
    }
    fn tags(folder: &Path) -> std::path::PathBuf {
        folder.join("tags")
    }
    Trip::new(
        concat!(module_path!(), "::programs_come_back_as_they_were_loaded"),
        |folder| {
            load(original::CGROUP_SKB, &PACKETS, b"sd_fw_egress", FREE);
            load(original::CGROUP_DEVICE, &DEVICES, b"sd_devices", FREE + 1);
            std::fs::write(tags(folder), [info(FREE).tag, info(FREE + 1).tag].concat()).unwrap();
        },
        |folder| {
            let (packets, devices) = (info(FREE), info(FREE + 1));
            assert_eq!(std::fs::read(tags(folder)).unwrap(), [packets.tag, devices.tag].concat());
            assert_eq!((&packets.name[..], packets.kind, packets.gpl), (&b"sd_fw_egress"[..], 8, true));
            assert_eq!((&devices.name[..], devices.insns.as_slice()), (&b"sd_devices"[..], &DEVICES[..]));
        },
    )
    .run();
}

#[test]
fn programs_that_use_more_than_their_context_are_refused() {
    if !may_load() {
        return;
    }
    let trip = Trip::new(
        concat!(module_path!(), "::programs_that_use_more_than_their_context_are_refused"),
        |_| {
            // It asks for the time.
            let call = [0x85, 0, 0, 0, 5, 0, 0, 0];
            let constant = [0xb7, 0, 0, 0, 1, 0, 0, 0];
            load(original::CGROUP_SKB, &[call, constant, DEVICES[5]], b"", FREE);
        },
        |_| {},
    );
    if let Some(e) = trip.refusal() {
        assert!(e.contains("calls functions"), "{e}");
    }
}

#[test]
fn programs_of_other_kinds_are_refused() {
    if !may_load() {
        return;
    }
    let trip = Trip::new(
        concat!(module_path!(), "::programs_of_other_kinds_are_refused"),
        |_| load(1, &DEVICES[4..], b"", FREE),
        |_| {},
    );
    if let Some(e) = trip.refusal() {
        assert!(e.contains("a BPF program of type 1 cannot be dumped"), "{e}");
    }
}

#[test]
fn one_that_was_opened_twice_is_refused() {
    let mut attached = Attached::default();
    attached.of(1, None).unwrap();
    assert!(attached.of(1, None).unwrap_err().to_string().contains("more than once"));
}
