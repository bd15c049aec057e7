//! Bytes from anywhere: no decoder panics, none takes more memory than its input justifies, and what
//! decodes comes back as it was.

mod common;
#[path = "../fuzz/targets.rs"]
mod targets;

use proptest::prelude::*;

/// Peak of the address space of this process in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Runs every target on `data` with each first byte that some target may take for a choice.
fn all(data: &[u8]) {
    for (_, target) in targets::TARGETS {
        target(data);
    }
}

/// An image of any kind, then damaged.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    (
        any::<prop::sample::Index>(),
        any::<u64>(),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(kind, seed, edits, cut)| {
            let rows: Vec<_> = common::kinds().collect();
            let at = kind.index(rows.len());
            let row = rows[at];
            let which = rcriu_images::catalog::CATALOG.iter().position(|r| r.kind == row.kind).unwrap();
            let image = common::image(row.kind, 3, &mut common::Random::new(seed));
            let header = rcriu_images::frame::header_bytes(row.kind).len();
            let mut data = vec![which as u8];
            data.extend_from_slice(&image[header..]);
            for (at, byte) in &edits {
                let at = at.index(data.len());
                if at > 0 {
                    data[at] = *byte;
                }
            }
            if edits.len() == 3 {
                data.truncate(cut.index(data.len()) + 1);
            }
            data
        })
}

/// `PROPTEST_CASES` sets the number of cases, as usual; more than usual if it does not.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => default,
        None => ProptestConfig { cases: 2000, ..default },
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn damaged_images_end_in_errors(data in damaged()) {
        all(&data);
    }

    #[test]
    fn noise_ends_in_errors(data in prop::collection::vec(any::<u8>(), 0..200)) {
        all(&data);
    }
}

#[test]
fn every_kind_comes_back_from_its_human_form() {
    for row in common::kinds() {
        for seed in 0..20 {
            let image = common::image(row.kind, 4, &mut common::Random::new(seed));
            let header = rcriu_images::frame::header_bytes(row.kind).len();
            let which = rcriu_images::catalog::CATALOG.iter().position(|r| r.kind == row.kind).unwrap();
            let data = [&[which as u8], &image[header..]].concat();
            targets::json_decode(&data);
        }
    }
}

#[test]
fn lengths_are_not_believed() {
    let before = peak();
    for row in common::kinds() {
        let which = rcriu_images::catalog::CATALOG.iter().position(|r| r.kind == row.kind).unwrap() as u8;
        for len in [u32::MAX, i32::MAX as u32, 1 << 28] {
            let mut data = vec![which];
            data.extend(len.to_le_bytes());
            data.extend([0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]);
            all(&data);
        }
        // Every number of the first message huge: payload lengths among them.
        let name = if row.message == "pagemap_entry" { "pagemap_head" } else { row.message };
        let shape = rcriu_images::schema::shape(name).unwrap();
        let mut message: Vec<u8> = Vec::new();
        for field in shape.fields.iter().filter(|f| f.number < 16) {
            if let rcriu_images::schema::Type::Uint { .. } = field.ty {
                message.extend([field.number as u8 * 8, 0xff, 0xff, 0xff, 0xff, 0x7f]);
            }
        }
        let mut data = vec![which];
        data.extend((message.len() as u32).to_le_bytes());
        data.extend(message);
        all(&data);
    }
    let grown = peak() - before;
    assert!(grown < 64 << 20, "the address space grew by {grown} bytes");
}
