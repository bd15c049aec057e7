//! Types of file systems that can be mounted again, with their numbers in images, and what each needs.

/// How a file system of a type comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Mounting shows the same content: the kernel or a disk has it.
    Mounted,
    /// It has content of its own, which goes into the images.
    Content,
    /// It may have content that cannot be read, so it must be empty.
    Empty,
    /// An instance of its own, whose entries come with the files that use them.
    Terminals,
    /// Not at all, for the reason given.
    Never(&'static str),
}

/// One type.
#[derive(Debug, PartialEq, Eq)]
pub struct FsType {
    /// The kernel's name.
    pub name: &'static str,
    /// Number in images.
    pub code: u32,
    pub again: Again,
    /// Only one instance of it can be seen in a namespace, however often it is mounted.
    pub single: bool,
}

const fn row(name: &'static str, code: u32, again: Again, single: bool) -> FsType {
    FsType { name, code, again, single }
}

/// Types that are asked for with `--enable-fs`.
pub const AUTO: u32 = 16;

const OF_A_SERVER: Again = Again::Never("a program of its own serves it");

/// All that are known; `unsupported` is not among them.
const TABLE: &[FsType] = &[
    row("proc", 1, Again::Mounted, true),
    row("sysfs", 2, Again::Mounted, true),
    row("devtmpfs", 3, Again::Mounted, true),
    row("binfmt_misc", 4, Again::Mounted, true),
    row("tmpfs", 5, Again::Content, false),
    row("devpts", 6, Again::Terminals, false),
    row("simfs", 7, Again::Mounted, false),
    row("pstore", 8, Again::Empty, true),
    row("securityfs", 9, Again::Mounted, true),
    row("fusectl", 10, Again::Mounted, true),
    row("debugfs", 11, Again::Mounted, true),
    row("cgroup", 12, Again::Mounted, true),
    row("aufs", 13, Again::Never("its branches are not told"), false),
    row("mqueue", 14, Again::Empty, true),
    row("fuse", 15, OF_A_SERVER, false),
    row("overlay", 17, Again::Mounted, false),
    row("autofs", 18, Again::Never("its requests go to a daemon"), false),
    row("tracefs", 19, Again::Mounted, true),
    row("cgroup2", 23, Again::Mounted, true),
    // No number of its own: as if asked for by name, which CRIU mounts empty.
    row("ramfs", AUTO, Again::Content, false),
];

/// The type the kernel calls `name`; what follows a dot is a subtype, which does not matter.
pub fn by_name(name: &[u8]) -> Option<&'static FsType> {
    let main = name.split(|c| *c == b'.').next().unwrap_or(name);
    TABLE.iter().find(|t| t.name.as_bytes() == main)
}

/// The type with this number in images; `name` is what they have beside [`AUTO`].
pub fn by_code(code: u32, name: &[u8]) -> Option<&'static FsType> {
    TABLE.iter().find(|t| t.code == code && (code != AUTO || t.name.as_bytes() == name))
}

#[cfg(test)]
mod tests {
    use rcriu_images::pb;

    use super::*;

    #[test]
    fn names_and_numbers_are_those_of_the_images() {
        for kind in TABLE {
            assert_eq!(by_name(kind.name.as_bytes()), Some(kind));
            let code = pb::Fstype::try_from(kind.code as i32).unwrap();
            let name = code.as_str_name().to_lowercase().replace("overlayfs", "overlay");
            assert_eq!(name, if kind.name == "ramfs" { "auto" } else { kind.name });
            assert_eq!(by_code(kind.code, kind.name.as_bytes()), Some(kind));
        }
        assert_eq!(by_name(b"fuse.sshfs").map(|t| t.name), Some("fuse"));
        assert_eq!(by_name(b"ext4"), None);
        assert_eq!((by_code(0, b""), by_code(AUTO, b"hugetlbfs")), (None, None));
        assert_eq!(AUTO, pb::Fstype::Auto as u32);
    }
}
