//! Values as people write them: bytes in base64 or quoted-printable, device numbers, addresses, names
//! for flags and for socket states.

mod bytes;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use self::bytes::{base64, from_base64, from_quoted, quoted};

/// `MAJOR:MINOR`; `old` is the encoding user space has in `dev_t`, otherwise the kernel's own.
pub fn device(value: u64, old: bool) -> String {
    if old {
        let major = (value >> 8 & 0xfff) | (value >> 32 & !0xfff);
        let minor = (value & 0xff) | (value >> 12 & 0xffff_ff00);
        format!("{major}:{minor}")
    } else {
        format!("{}:{}", value >> 20, value & 0xfffff)
    }
}

/// The number of `MAJOR:MINOR`.
pub fn from_device(text: &str, old: bool) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let (major, minor): (u64, u64) = (major.trim().parse().ok()?, minor.trim().parse().ok()?);
    if old {
        Some(
            (major & 0xfff) << 8 | (major & 0xffff_f000) << 32 | (minor & 0xff) | (minor & 0xffff_ff00) << 12,
        )
    } else {
        Some(major.checked_mul(1 << 20)? | minor)
    }
}

/// An address of one word (IPv4) or four (IPv6), each in network byte order; `None` for other lengths.
pub fn address(words: &[u64]) -> Option<String> {
    let bytes: Vec<u8> = words.iter().flat_map(|&w| (w as u32).to_le_bytes()).collect();
    if let Ok(four) = <[u8; 4]>::try_from(&bytes[..]) {
        return Some(Ipv4Addr::from(four).to_string());
    }
    let sixteen = <[u8; 16]>::try_from(&bytes[..]).ok()?;
    Some(ipv6(Ipv6Addr::from(sixteen).segments()))
}

/// As RFC 5952, except that addresses with an IPv4 part inside are written in hexadecimal as well.
fn ipv6(groups: [u16; 8]) -> String {
    let (mut best, mut best_len) = (0, 1);
    let mut at = 0;
    while at < 8 {
        let len = groups[at..].iter().take_while(|&&g| g == 0).count();
        if len > best_len {
            (best, best_len) = (at, len);
        }
        at += len.max(1);
    }
    let hex = |groups: &[u16]| groups.iter().map(|g| format!("{g:x}")).collect::<Vec<_>>().join(":");
    if best_len < 2 {
        return hex(&groups);
    }
    format!("{}::{}", hex(&groups[..best]), hex(&groups[best + best_len..]))
}

/// The words of an address.
pub fn from_address(text: &str) -> Option<Vec<u64>> {
    let bytes = match text.parse().ok()? {
        IpAddr::V4(four) => four.octets().to_vec(),
        IpAddr::V6(six) => six.octets().to_vec(),
    };
    Some(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect())
}

/// Names of bits.
pub type FlagTable = &'static [(&'static str, u64)];

/// The table a hint names.
pub fn flag_table(name: &str) -> Option<FlagTable> {
    Some(match name {
        "mmap.prot" => &[("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)],
        "mmap.flags" => &[
            ("MAP_SHARED", 1),
            ("MAP_PRIVATE", 2),
            ("MAP_DROPPABLE", 8),
            ("MAP_ANON", 0x20),
            ("MAP_GROWSDOWN", 0x100),
        ],
        "mmap.status" => &[
            ("VMA_AREA_NONE", 0),
            ("VMA_AREA_REGULAR", 1 << 0),
            ("VMA_AREA_STACK", 1 << 1),
            ("VMA_AREA_VSYSCALL", 1 << 2),
            ("VMA_AREA_VDSO", 1 << 3),
            ("VMA_AREA_HEAP", 1 << 5),
            ("VMA_FILE_PRIVATE", 1 << 6),
            ("VMA_FILE_SHARED", 1 << 7),
            ("VMA_ANON_SHARED", 1 << 8),
            ("VMA_ANON_PRIVATE", 1 << 9),
            ("VMA_AREA_SYSVIPC", 1 << 10),
            ("VMA_AREA_SOCKET", 1 << 11),
            ("VMA_AREA_VVAR", 1 << 12),
            ("VMA_AREA_AIORING", 1 << 13),
            ("VMA_AREA_MEMFD", 1 << 14),
            ("VMA_AREA_SHSTK", 1 << 15),
            ("VMA_AREA_UPROBES", 1 << 17),
            ("VMA_RCRIU_URING", 1 << 24),
            ("VMA_UNSUPP", 1 << 31),
        ],
        "rfile.flags" => &[
            ("O_WRONLY", 0o1),
            ("O_RDWR", 0o2),
            ("O_CREAT", 0o100),
            ("O_EXCL", 0o200),
            ("O_NOCTTY", 0o400),
            ("O_TRUNC", 0o1000),
            ("O_APPEND", 0o2000),
            ("O_NONBLOCK", 0o4000),
            ("O_DSYNC", 0o10000),
            ("FASYNC", 0o20000),
            ("O_DIRECT", 0o40000),
            ("O_LARGEFILE", 0o100000),
            ("O_DIRECTORY", 0o200000),
            ("O_NOFOLLOW", 0o400000),
            ("O_NOATIME", 0o1000000),
            ("O_CLOEXEC", 0o2000000),
        ],
        "pmap.flags" => &[("PE_PARENT", 1), ("PE_LAZY", 2), ("PE_PRESENT", 4), ("PE_PAYLOAD_ALIGNED", 8)],
        "seals.flags" => &[
            ("F_SEAL_SEAL", 1),
            ("F_SEAL_SHRINK", 2),
            ("F_SEAL_GROW", 4),
            ("F_SEAL_WRITE", 8),
            ("F_SEAL_FUTURE_WRITE", 0x10),
        ],
        _ => return None,
    })
}

/// Names of the bits set, and the rest as a number: `PROT_READ | PROT_WRITE`.
pub fn flags(value: u64, table: FlagTable) -> String {
    let mut parts: Vec<String> =
        table.iter().filter(|(_, bit)| value & bit != 0).map(|(name, _)| (*name).into()).collect();
    let rest = table.iter().fold(value, |rest, (_, bit)| rest & !bit);
    if rest != 0 {
        parts.push(format!("{rest:#x}"));
    }
    parts.join(" | ")
}

/// The number of such a list.
pub fn from_flags(text: &str, table: FlagTable) -> Option<u64> {
    if text.is_empty() {
        return Some(0);
    }
    text.split('|').map(str::trim).try_fold(0u64, |sum, part| {
        let bit = match table.iter().find(|(name, _)| *name == part) {
            Some((_, bit)) => *bit,
            None => from_integer(part)?.try_into().ok()?,
        };
        sum.checked_add(bit)
    })
}

/// Names of numbers: task states and socket parameters, by the hint's dictionary and the field's name.
pub fn dictionary(dict: &str, field: &str) -> &'static [(u64, &'static str)] {
    match (dict, field) {
        ("gen", "task_state") => &[(1, "Alive"), (3, "Zombie"), (6, "Stopped")],
        ("sk", "family") => &[(1, "UNIX"), (2, "INET"), (10, "INET6"), (16, "NETLINK"), (17, "PACKET")],
        ("sk", "type") => &[(1, "STREAM"), (2, "DGRAM"), (3, "RAW"), (5, "SEQPACKET"), (10, "PACKET")],
        ("sk", "state") => &[
            (1, "ESTABLISHED"),
            (2, "SYN_SENT"),
            (3, "SYN_RECV"),
            (4, "FIN_WAIT1"),
            (5, "FIN_WAIT2"),
            (6, "TIME_WAIT"),
            (7, "CLOSE"),
            (8, "CLOSE_WAIT"),
            (9, "LAST_ACK"),
            (10, "LISTEN"),
        ],
        ("sk", "proto") => &[(0, "IP"), (6, "TCP"), (17, "UDP"), (136, "UDPLITE")],
        _ => &[],
    }
}

/// An integer in decimal or with one of the prefixes `0x`, `0o`, `0b`.
pub fn from_integer(text: &str) -> Option<i128> {
    let text = text.trim();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.get(..2) {
        Some("0x") => (16, &lower[2..]),
        Some("0o") => (8, &lower[2..]),
        Some("0b") => (2, &lower[2..]),
        _ => (10, &lower[..]),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).ok()?;
    Some(if negative { -value } else { value })
}

/// A size as `1.5KB`: one decimal, none if it is whole.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["", "K", "M", "G", "T", "P", "E", "Z"] {
        if value < 1024.0 {
            return if value.fract() == 0.0 {
                format!("{value:.0}{unit}B")
            } else {
                format!("{value:.1}{unit}B")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1}YB")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_devices_flags_and_numbers() {
        assert_eq!(address(&[0x0100007f]).as_deref(), Some("127.0.0.1"));
        assert_eq!(address(&[0, 0, 0, 0x01000000]).as_deref(), Some("::1"));
        assert_eq!(address(&[0, 0, 0xffff0000, 0x04030201]).as_deref(), Some("::ffff:102:304"));
        assert_eq!(address(&[0x20, 0x0100, 0, 0x01000000]).as_deref(), Some("2000:0:1::1"));
        assert_eq!(address(&[0, 0]), None);
        assert_eq!(from_address("::1"), Some(vec![0, 0, 0, 0x01000000]));
        assert_eq!(device(0x1f, false), "0:31");
        assert_eq!(device(0x0103, true), "1:3");
        assert_eq!(device(0x0000_1000_0010_0103, true), "4097:259");
        let table = flag_table("mmap.prot").unwrap();
        assert_eq!(flags(3 | 0x10, table), "PROT_READ | PROT_WRITE | 0x10");
        assert_eq!(flags(0, table), "");
        assert_eq!(from_flags("PROT_EXEC | 0x10", table), Some(0x14));
        assert_eq!(from_flags("PROT_WHAT", table), None);
        assert_eq!(from_integer("-0x1"), Some(-1));
        assert_eq!(from_integer("0x-1"), None);
        assert_eq!((size(10), size(2048), size(1500)), ("10B".into(), "2KB".into(), "1.5KB".into()));
    }

    proptest! {
        #[test]
        fn numbers_come_back(value in any::<u32>(), wide in any::<u64>()) {
            let table = flag_table("mmap.status").unwrap();
            prop_assert_eq!(from_flags(&flags(value.into(), table), table), Some(value.into()));
            prop_assert_eq!(from_device(&device(value.into(), false), false), Some(value.into()));
            prop_assert_eq!(from_device(&device(wide, true), true), Some(wide));
        }

        #[test]
        fn hostile_text_is_no_panic(text in "\\PC*") {
            from_integer(&text);
            from_device(&text, true);
            from_address(&text);
            from_flags(&text, flag_table("rfile.flags").unwrap());
        }
    }
}
