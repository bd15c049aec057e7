//! Resources that are not in the images: `--external`, `--inherit-fd` and their legacy forms.
//!
//! One list serves both directions: on dump it names what is left out, on restore it says what stands in.
//! [`External::id`] gives the text that CRIU compares and that goes into image files.

use std::fmt;
use std::os::fd::RawFd;

/// A value that cannot be what it should be; `Display` is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad {what} `{value}`: {why}")]
pub struct BadOption {
    what: &'static str,
    value: String,
    why: String,
}

impl BadOption {
    /// `what` the value was for, the `value`, and `why` it will not do or what would.
    pub fn new(what: &'static str, value: &str, why: impl Into<String>) -> Self {
        BadOption { what, value: value.to_owned(), why: why.into() }
    }
}

impl From<BadOption> for crate::Error {
    fn from(e: BadOption) -> Self {
        crate::Error::usage(e.to_string())
    }
}

/// One `--external KIND[KEY]:VALUE`.
///
/// Numbers are in CRIU's own bases: tty and file hexadecimal, unix, net, pid and dev decimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum External {
    /// Dump: `mnt[MOUNTPOINT]:NAME`; restore: `mnt[NAME]:PATH`. The value may be missing or empty.
    Mnt { key: String, value: Option<String> },
    /// Dump: `dev[MAJOR/MINOR]:NAME`; restore: `dev[NAME]:PATH`.
    Dev { key: String, value: Option<String> },
    /// Dump: `file[MNT_ID:INODE]`, both hexadecimal; comes back through `--inherit-fd`.
    File { mnt_id: u32, inode: u64 },
    /// Dump: `tty[RDEV:DEV]`, both hexadecimal; comes back through `--inherit-fd`.
    Tty { rdev: u64, dev: u64 },
    /// Dump: `unix[INODE]`, a socket whose peer stays outside.
    Unix { inode: u32 },
    /// Dump: `net[INODE]:NAME`; comes back through `--inherit-fd fd[N]:NAME`.
    Net { key: String, value: Option<String> },
    /// Dump: `pid[INODE]:NAME`; comes back through `--inherit-fd fd[N]:NAME`.
    Pid { key: String, value: Option<String> },
    /// Restore: `veth[INSIDE]:OUTSIDE@BRIDGE`.
    Veth { inside: String, outside: String, bridge: Option<String> },
    /// Restore: `macvlan[INSIDE]:LINK`.
    Macvlan { inside: String, link: String },
    /// Restore: `netdev[NAME]:ORIGINAL`, a device moved in from outside.
    Netdev { name: String, original: String },
}

impl External {
    /// Parses the text of the command line or the RPC, except `mnt[]...`, which is [`ExternalMounts::apply`]'s.
    pub fn parse(text: &str) -> Result<External, BadOption> {
        let bad = |why: &str| BadOption::new("external resource", text, why);
        // liblxc repeats the console's --ext-mount-map as an --external, if a network has no name outside.
        let is_mount = |(key, value): &(&str, &str)| {
            !key.is_empty() && !key.contains(['[', ']']) && (value.is_empty() || value.starts_with('/'))
        };
        if let Some((key, value)) = text.split_once(':').filter(is_mount) {
            return Ok(External::mnt(key, Some(value)));
        }
        let (kind, rest) = text.split_once('[').ok_or_else(|| bad("give KIND[KEY] or KIND[KEY]:VALUE"))?;
        // A key may hold brackets itself (a path): the closing one is the one before `:` or the end.
        let (key, value) = match rest.find("]:") {
            Some(at) => (&rest[..at], Some(&rest[at + 2..])),
            None => (rest.strip_suffix(']').ok_or_else(|| bad("the closing ] is missing"))?, None),
        };
        let pair = || (key.to_owned(), value.map(str::to_owned));
        let need = |why| value.filter(|v| !v.is_empty()).ok_or_else(|| bad(why));
        Ok(match kind {
            "mnt" => External::mnt(key, value),
            "dev" => {
                let (key, value) = pair();
                External::Dev { key, value }
            }
            "net" => {
                let (key, value) = pair();
                External::Net { key, value }
            }
            "pid" => {
                let (key, value) = pair();
                External::Pid { key, value }
            }
            "file" => {
                let (mnt_id, inode) =
                    hex_pair(key).ok_or_else(|| bad("give file[MNT_ID:INODE] in hexadecimal"))?;
                External::File {
                    mnt_id: u32::try_from(mnt_id).map_err(|_| bad("mount id too large"))?,
                    inode,
                }
            }
            "tty" => {
                let (rdev, dev) = hex_pair(key).ok_or_else(|| bad("give tty[RDEV:DEV] in hexadecimal"))?;
                External::Tty { rdev, dev }
            }
            "unix" => External::Unix { inode: key.parse().map_err(|_| bad("give unix[INODE] in decimal"))? },
            "veth" => {
                let v = need("give veth[INSIDE]:OUTSIDE or veth[INSIDE]:OUTSIDE@BRIDGE")?;
                External::veth(key, v)
            }
            "macvlan" => External::Macvlan {
                inside: key.to_owned(),
                link: need("give macvlan[INSIDE]:LINK")?.to_owned(),
            },
            "netdev" => External::Netdev {
                name: key.to_owned(),
                original: need("give netdev[NAME]:ORIGINAL")?.to_owned(),
            },
            _ => return Err(bad("known kinds are mnt dev file tty unix net pid veth macvlan netdev")),
        })
    }

    /// `--ext-mount-map KEY:VALUE` and the RPC's ext_mnt.
    pub fn mnt(key: &str, value: Option<&str>) -> External {
        External::Mnt { key: key.to_owned(), value: value.map(str::to_owned) }
    }

    /// `--veth-pair INSIDE=OUTSIDE[@BRIDGE]` and the RPC's veths.
    pub fn veth(inside: &str, outside: &str) -> External {
        let (outside, bridge) = match outside.split_once('@') {
            Some((outside, bridge)) => (outside, Some(bridge.to_owned())),
            None => (outside, None),
        };
        External::Veth { inside: inside.to_owned(), outside: outside.to_owned(), bridge }
    }

    /// `KIND[KEY]`, the identity by which images refer to an external object.
    pub fn id(&self) -> String {
        match self {
            External::Mnt { key, .. } => format!("mnt[{key}]"),
            External::Dev { key, .. } => format!("dev[{key}]"),
            External::Net { key, .. } => format!("net[{key}]"),
            External::Pid { key, .. } => format!("pid[{key}]"),
            External::File { mnt_id, inode } => format!("file[{mnt_id:x}:{inode:x}]"),
            External::Tty { rdev, dev } => format!("tty[{rdev:x}:{dev:x}]"),
            External::Unix { inode } => format!("unix[{inode}]"),
            External::Veth { inside, .. } => format!("veth[{inside}]"),
            External::Macvlan { inside, .. } => format!("macvlan[{inside}]"),
            External::Netdev { name, .. } => format!("netdev[{name}]"),
        }
    }
}

impl fmt::Display for External {
    /// The form that can be pasted after `--external`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id())?;
        match self {
            External::Mnt { value: Some(v), .. }
            | External::Dev { value: Some(v), .. }
            | External::Net { value: Some(v), .. }
            | External::Pid { value: Some(v), .. } => write!(f, ":{v}"),
            External::Veth { outside, bridge: Some(b), .. } => write!(f, ":{outside}@{b}"),
            External::Veth { outside, bridge: None, .. } => write!(f, ":{outside}"),
            External::Macvlan { link, .. } => write!(f, ":{link}"),
            External::Netdev { original, .. } => write!(f, ":{original}"),
            _ => Ok(()),
        }
    }
}

fn hex_pair(key: &str) -> Option<(u64, u64)> {
    let number = |s: &str| u64::from_str_radix(s.strip_prefix("0x").unwrap_or(s), 16).ok();
    let (a, b) = key.split_once(':')?;
    Some((number(a)?, number(b)?))
}

/// Mounts that are recognised as external without being listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExternalMounts {
    /// `--external mnt[]` or `--ext-mount-map auto`.
    pub auto: bool,
    /// `mnt[]:s` or `--enable-external-sharing`: also those that share propagation with ours.
    pub sharing: bool,
    /// `mnt[]:m` or `--enable-external-masters`: also those that are slaves of ours.
    pub masters: bool,
}

impl ExternalMounts {
    /// Applies `flags`, the text after `mnt[]` (empty, `:s...`, `:m...`; only the first letter counts).
    pub fn apply(&mut self, flags: &str) -> Result<(), BadOption> {
        self.auto = true;
        match flags.strip_prefix(':').map(|f| f.chars().next()) {
            None | Some(None) => {}
            Some(Some('m')) => self.masters = true,
            Some(Some('s')) => self.sharing = true,
            Some(Some(_)) => {
                return Err(BadOption::new(
                    "external resource",
                    &format!("mnt[]{flags}"),
                    "give mnt[]:m or mnt[]:s",
                ));
            }
        }
        Ok(())
    }
}

/// `-x[INO,...]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtUnixSk {
    /// The option was given.
    pub enabled: bool,
    /// Inodes it is limited to; all when empty.
    pub inodes: Vec<u32>,
}

impl ExtUnixSk {
    /// Applies one `-x[LIST]`.
    pub fn apply(&mut self, list: Option<&str>) -> Result<(), BadOption> {
        for part in list.unwrap_or("").split(',').filter(|p| !p.is_empty()) {
            match part.parse() {
                Ok(inode) if inode != 0 => self.inodes.push(inode),
                _ => {
                    return Err(BadOption::new(
                        "unix socket inode",
                        part,
                        "give decimal numbers, comma between",
                    ));
                }
            }
        }
        self.enabled = true;
        Ok(())
    }
}

/// `--inherit-fd fd[N]:RES`: descriptor N of ours becomes the open file that was RES when dumped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InheritFd {
    /// Our descriptor.
    pub fd: RawFd,
    /// What it stands in for, in the images' own words: `tty[R:D]`, `pipe:[INO]`, `socket:[INO]`,
    /// `file[M:I]`, `/memfd:NAME`, a path, or the NAME of an external namespace.
    pub key: String,
}

impl InheritFd {
    /// Parses the form of the command line. Whether the descriptor is open is for the front end to check.
    pub fn parse(text: &str) -> Result<InheritFd, BadOption> {
        let bad = || BadOption::new("inherited descriptor", text, "give fd[N]:RESOURCE");
        let rest = text.strip_prefix("fd[").ok_or_else(bad)?;
        let (number, key) = rest.split_once("]:").ok_or_else(bad)?;
        let fd: RawFd = number.parse().map_err(|_| bad())?;
        if fd < 0 || key.is_empty() {
            return Err(bad());
        }
        Ok(InheritFd { fd, key: key.to_owned() })
    }

    /// Is this the one for what the images call `id`? A leading slash of a path does not matter.
    pub fn is_for(&self, id: &str) -> bool {
        self.key == id
            || self.key.strip_prefix('/').unwrap_or(&self.key) == id.strip_prefix('/').unwrap_or(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_parses_and_prints_back() {
        for text in [
            "mnt[/a/b]:name",
            "mnt[console]:",
            "mnt[/x]",
            "dev[1/3]:null",
            "file[1d:abc]",
            "tty[8805:18]",
            "unix[4711]",
            "net[4026531840]:extRootNetNS",
            "pid[4026531836]:extRootPidNS",
            "veth[eth0]:host0",
            "veth[eth0]:host0@br0",
            "macvlan[eth0]:link0",
            "netdev[eth0]:orig0",
        ] {
            assert_eq!(External::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_mount_may_come_in_its_older_form() {
        assert_eq!(External::parse("console:").unwrap(), External::mnt("console", Some("")));
        assert_eq!(
            External::parse("console:/dev/pts/0").unwrap(),
            External::mnt("console", Some("/dev/pts/0"))
        );
        for bad in [":", "a:b", "a:b:", "mnt]:"] {
            assert!(External::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_in_the_base_of_the_kind() {
        assert_eq!(External::parse("tty[8805:18]").unwrap(), External::Tty { rdev: 0x8805, dev: 0x18 });
        assert_eq!(External::parse("unix[10]").unwrap(), External::Unix { inode: 10 });
    }

    #[test]
    fn a_bad_external_names_itself() {
        for bad in ["mnt", "mnt[x", "disk[x]", "tty[1]", "file[x:y]", "unix[a]", "veth[eth0]", "netdev[a]:"] {
            let e = External::parse(bad).unwrap_err().to_string();
            assert!(e.contains(bad), "{e}");
        }
    }

    #[test]
    fn automatic_mounts_take_one_letter() {
        let mut m = ExternalMounts::default();
        m.apply("").unwrap();
        assert!(m.auto && !m.sharing && !m.masters);
        m.apply(":s").unwrap();
        m.apply(":m").unwrap();
        assert!(m.sharing && m.masters);
        assert!(m.apply(":q").is_err());
    }

    #[test]
    fn unix_inodes_add_up() {
        let mut x = ExtUnixSk::default();
        x.apply(None).unwrap();
        x.apply(Some("5,6")).unwrap();
        x.apply(Some(",7")).unwrap();
        assert_eq!(x, ExtUnixSk { enabled: true, inodes: vec![5, 6, 7] });
        assert!(x.apply(Some("0")).is_err());
        assert!(x.apply(Some("a")).is_err());
    }

    #[test]
    fn inherited_descriptors_match_by_the_images_words() {
        let i = InheritFd::parse("fd[3]:tty[8805:18]").unwrap();
        assert_eq!((i.fd, i.key.as_str()), (3, "tty[8805:18]"));
        let i = InheritFd::parse("fd[4]:tmp/x").unwrap();
        assert!(i.is_for("/tmp/x") && i.is_for("tmp/x") && !i.is_for("x"));
        for bad in ["fd[a]:x", "fd[-1]:x", "fd[1]:", "fd[1]", "1:x"] {
            assert!(InheritFd::parse(bad).is_err(), "{bad}");
        }
    }
}
