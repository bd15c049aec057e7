//! Compiles `proto/*.proto` without a protoc binary: protox parses, prost-build generates, and the
//! descriptor set is kept for reflection (human form, required fields).
//!
//! File names, command names and the like are `string` in the schema, but Linux lets them hold any
//! byte, and so do images. On the wire `string` and `bytes` are the same, so the generated Rust types
//! of the fields in [`OS_STRINGS`] are `Vec<u8>`; the kept descriptors still say `string`.

use std::{env, fs, path::PathBuf};

use std::fmt::Write as _;

use prost_types::{
    DescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// `message.field` pairs whose value comes from the kernel as arbitrary bytes.
const OS_STRINGS: &[(&str, &str)] = &[
    ("reg_file_entry", "name"),
    ("memfd_inode_entry", "name"),
    ("ghost_file_entry", "symlnk_target"),
    ("unix_sk_entry", "name_dir"),
    ("fh_entry", "path"),
    ("irmap_cache_entry", "path"),
    ("fanotify_mount_mark_entry", "path"),
    ("task_core_entry", "comm"),
    ("thread_core_entry", "comm"),
    ("mnt_entry", "root"),
    ("mnt_entry", "mountpoint"),
    ("mnt_entry", "source"),
    ("mnt_entry", "options"),
    ("mnt_entry", "fsname"),
    ("cgroup_prop_entry", "value"),
    ("cgroup_dir_entry", "dir_name"),
    ("cg_member_entry", "name"),
    ("cg_member_entry", "path"),
    ("utsns_entry", "nodename"),
    ("utsns_entry", "domainname"),
    ("sysctl_entry", "sarg"),
];

/// Registers of these are decoded but hardly ever there: boxed, to keep a core small.
const OTHER_ARCHITECTURES: &[&str] = &["arm", "aarch64", "ppc64", "s390", "mips", "loongarch64", "riscv64"];

/// What files.img may say of an open file that is none of a path: boxed, since an entry has one of them at most and
/// there may be very many entries.
const OTHER_FILES: &[&str] = &[
    "isk", "nsf", "psk", "nlsk", "efd", "epfd", "sgfd", "tunf", "tfd", "ify", "ffy", "ext", "usk", "fifo",
    "pipe", "tty", "memfd", "bpf", "pidfd", "program", "uring",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    let mut files: Vec<PathBuf> =
        fs::read_dir("proto")?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(&files)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Encoded by the compiler itself: the plain types of the set do not hold the show hints.
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    let mut set = compiler.file_descriptor_set();
    fs::write(out.join("required.rs"), required(&set)?)?;
    let changed = os_strings_to_bytes(&mut set);
    assert!(changed.is_empty(), "OS_STRINGS names fields that are not in the schema: {changed:?}");
    let mut config = prost_build::Config::new();
    config.out_dir(&out).enable_type_names();
    for arch in OTHER_ARCHITECTURES {
        config.boxed(format!(".criu.core_entry.ti_{arch}"));
    }
    for file in OTHER_FILES {
        config.boxed(format!(".criu.file_entry.{file}"));
    }
    config.compile_fds(set)?;
    Ok(())
}

/// A table of what `required.rs` needs to know: loading the descriptors would take longer than reading the images of
/// a small process.
fn required(set: &FileDescriptorSet) -> Result<String, std::fmt::Error> {
    fn collect<'a>(messages: &'a [DescriptorProto], all: &mut Vec<&'a DescriptorProto>) {
        for message in messages {
            all.push(message);
            collect(&message.nested_type, all);
        }
    }
    let mut all = Vec::new();
    for file in set.file.iter().filter(|f| f.package() == "criu") {
        collect(&file.message_type, &mut all);
    }
    all.sort_by_key(|m| m.name().to_owned());
    let place = |name: &str| {
        let name = name.rsplit('.').next().unwrap_or(name);
        all.binary_search_by(|m| m.name().cmp(name)).expect("a message of the schema")
    };
    let mut code = String::from("static MESSAGES: &[Message] = &[\n");
    for message in &all {
        let mut fields: Vec<_> = message.field.iter().collect();
        fields.sort_by_key(|f| f.number());
        let (mut bit, mut rows, mut numbers) = (0, String::new(), 0u128);
        for field in fields {
            // Numbers without a bit have a row.
            let has_bit = field.number() < 128;
            if has_bit {
                numbers |= 1 << field.number();
            }
            let mask = if field.label() == Label::Required { 1u64 << bit } else { 0 };
            bit += u32::from(mask != 0);
            let inner = (field.r#type() == Type::Message).then(|| place(field.type_name()));
            if mask != 0 || inner.is_some() || !has_bit {
                let (number, name) = (field.number(), field.name());
                writeln!(
                    rows,
                    "        Field {{ number: {number}, name: {name:?}, mask: {mask:#x}, inner: {inner:?} }},"
                )?;
            }
        }
        let name = message.name();
        assert!(bit <= 64, "{name} has more required fields than bits");
        let mask = (1u128 << bit) - 1;
        writeln!(
            code,
            "    Message {{ name: {name:?}, mask: {mask:#x}, numbers: {numbers:#x}, fields: &[\n{rows}    ] }},"
        )?;
    }
    code.push_str("];\n");
    Ok(code)
}

/// Turns the listed `string` fields into `bytes`; returns the pairs that were not found.
fn os_strings_to_bytes(set: &mut FileDescriptorSet) -> Vec<(&'static str, &'static str)> {
    let mut missing = OS_STRINGS.to_vec();
    for message in set.file.iter_mut().flat_map(|f| &mut f.message_type) {
        let name = message.name().to_owned();
        for field in &mut message.field {
            let Some(at) = missing.iter().position(|(m, f)| *m == name && *f == field.name()) else {
                continue;
            };
            if field.r#type() == Type::String {
                field.set_type(Type::Bytes);
                missing.swap_remove(at);
            }
        }
    }
    missing
}
