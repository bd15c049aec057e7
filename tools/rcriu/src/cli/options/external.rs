//! Options that name what is not in the images.

use super::{Group, Opt, Takes, on};
use rcriu_engine::options::{External, InheritFd, JoinNs, LsmProfile};

pub const OPTIONS: &[&Opt] = &[
    &EXTERNAL,
    &INHERIT_FD,
    &JOIN_NS,
    &EXT_UNIX_SK,
    &EXT_MOUNT_MAP,
    &ENABLE_EXTERNAL_SHARING,
    &ENABLE_EXTERNAL_MASTERS,
    &VETH_PAIR,
];

static EXTERNAL: Opt = Opt {
    long: "external",
    short: None,
    takes: Takes::One("RES"),
    group: Group::External,
    on: on::BOTH,
    help: "Something that stays outside: KIND[KEY] or KIND[KEY]:VALUE",
    more: "On dump: mnt[MOUNTPOINT]:NAME, mnt[] (find them; mnt[]:s and mnt[]:m also shared and slave ones), \
           dev[MAJOR/MINOR]:NAME, file[MNT_ID:INODE], tty[RDEV:DEV], unix[INODE], net[INODE]:NAME, \
           pid[INODE]:NAME. On restore: mnt[NAME]:PATH, dev[NAME]:PATH, veth[INSIDE]:OUTSIDE@BRIDGE, \
           macvlan[INSIDE]:LINK, netdev[NAME]:ORIGINAL; files, ttys and namespaces come back by --inherit-fd. \
           file and tty are written in hexadecimal.",
    apply: |raw, v| {
        let text = v.text()?;
        // liblxc repeats what stands before it, if a network has no name outside.
        let is_repeated =
            raw.lsm_profile.as_ref().is_some_and(|p| LsmProfile::parse(text).is_ok_and(|again| again == *p));
        match text.strip_prefix("mnt[]") {
            _ if is_repeated => {}
            Some(flags) => raw.external_mounts.apply(flags)?,
            None => raw.external.push(External::parse(text)?),
        }
        Ok(())
    },
};

static INHERIT_FD: Opt = Opt {
    long: "inherit-fd",
    short: None,
    takes: Takes::One("fd[N]:RES"),
    group: Group::External,
    on: on::RESTORE,
    help: "Our descriptor N is what was RES",
    more: "RES is tty[RDEV:DEV], pipe:[INODE], socket:[INODE], file[MNT_ID:INODE], /memfd:NAME, a path, or the \
           NAME of an external namespace.",
    apply: |raw, v| {
        raw.inherit_fds.push(InheritFd::parse(v.text()?)?);
        Ok(())
    },
};

static JOIN_NS: Opt = Opt {
    long: "join-ns",
    short: Some('J'),
    takes: Takes::One("NS:PID|FILE"),
    group: Group::External,
    on: on::RESTORE,
    help: "Restore into a namespace that exists",
    more: "NS is net, uts, time, ipc, user or mnt. After a user namespace `,UID,GID` may follow.",
    apply: |raw, v| {
        raw.join_ns.push(JoinNs::parse(v.text()?)?);
        Ok(())
    },
};

static EXT_UNIX_SK: Opt = Opt {
    long: "ext-unix-sk",
    short: Some('x'),
    takes: Takes::Maybe("INODE,.."),
    group: Group::External,
    on: on::BOTH,
    help: "Unix sockets may be connected outside; better: --external",
    more: "",
    apply: |raw, v| raw.ext_unix_sk.apply(v.maybe_text()?),
};

static EXT_MOUNT_MAP: Opt = Opt {
    long: "ext-mount-map",
    short: Some('M'),
    takes: Takes::One("KEY:VALUE"),
    group: Group::External,
    on: on::BOTH,
    help: "Older form of --external mnt[KEY]:VALUE; or auto",
    more: "",
    apply: |raw, v| {
        let text = v.text()?;
        if text == "auto" {
            raw.external_mounts.auto = true;
        } else {
            let (key, value) = text.split_once(':').ok_or_else(|| v.bad("give KEY:VALUE or auto"))?;
            raw.external.push(External::mnt(key, Some(value)));
        }
        Ok(())
    },
};

static ENABLE_EXTERNAL_SHARING: Opt = Opt {
    long: "enable-external-sharing",
    short: None,
    takes: Takes::Nothing,
    group: Group::External,
    on: on::BOTH,
    help: "Older form of --external mnt[]:s",
    more: "",
    apply: |raw, _| {
        raw.external_mounts.sharing = true;
        Ok(())
    },
};

static ENABLE_EXTERNAL_MASTERS: Opt = Opt {
    long: "enable-external-masters",
    short: None,
    takes: Takes::Nothing,
    group: Group::External,
    on: on::BOTH,
    help: "Older form of --external mnt[]:m",
    more: "",
    apply: |raw, _| {
        raw.external_mounts.masters = true;
        Ok(())
    },
};

static VETH_PAIR: Opt = Opt {
    long: "veth-pair",
    short: None,
    takes: Takes::One("IN=OUT"),
    group: Group::External,
    on: on::RESTORE,
    help: "Older form of --external veth[IN]:OUT",
    more: "",
    apply: |raw, v| {
        let (inside, outside) = v.text()?.split_once('=').ok_or_else(|| v.bad("give IN=OUT"))?;
        raw.external.push(External::veth(inside, outside));
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};

    fn externals(args: &[&str]) -> Vec<String> {
        raw(args).external.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn external_keeps_the_order() {
        let got = externals(&["--external", "mnt[/a]:b", "--external=tty[8805:18]"]);
        assert_eq!(got, ["mnt[/a]:b", "tty[8805:18]"]);
        assert!(refused(&["--external", "nonsense"]).contains("nonsense"));
    }

    #[test]
    fn the_profile_again_is_no_resource() {
        let profile = ["--lsm-profile", "apparmor:unconfined", "--external", "apparmor:unconfined"];
        assert!(externals(&profile).is_empty());
        assert!(refused(&["--external", "apparmor:unconfined"]).contains("KIND[KEY]"));
        assert!(refused(&["--lsm-profile", "apparmor:x", "--external", "apparmor:y"]).contains("KIND[KEY]"));
    }

    #[test]
    fn empty_mnt_means_find_them() {
        let r = raw(&["--external", "mnt[]:s"]);
        assert!(r.external.is_empty() && r.external_mounts.auto && r.external_mounts.sharing);
    }

    #[test]
    fn older_forms_mean_the_same() {
        let got = externals(&[
            "-M",
            "/dev/console:console",
            "--ext-mount-map=console:",
            "--veth-pair",
            "eth0=v0@br0",
        ]);
        assert_eq!(got, ["mnt[/dev/console]:console", "mnt[console]:", "veth[eth0]:v0@br0"]);
        let r = raw(&["-M", "auto", "--enable-external-sharing", "--enable-external-masters"]);
        assert!(r.external_mounts.auto && r.external_mounts.sharing && r.external_mounts.masters);
        assert!(refused(&["-M", "plain"]).contains("plain"));
        assert!(refused(&["--veth-pair", "plain"]).contains("plain"));
    }

    #[test]
    fn inherited_descriptors_are_parsed() {
        let r = raw(&["--inherit-fd", "fd[5]:pipe:[77]"]);
        assert_eq!((r.inherit_fds[0].fd, r.inherit_fds[0].key.as_str()), (5, "pipe:[77]"));
        assert!(refused(&["--inherit-fd", "5:x"]).contains("5:x"));
    }

    #[test]
    fn unix_sockets_may_be_limited_to_inodes() {
        assert!(raw(&["-x"]).ext_unix_sk.enabled);
        assert_eq!(raw(&["-x4,5", "--ext-unix-sk=6"]).ext_unix_sk.inodes, [4, 5, 6]);
        assert!(refused(&["-xyz"]).contains("yz"));
    }

    #[test]
    fn namespaces_to_join_are_parsed() {
        assert_eq!(raw(&["-J", "net:1"]).join_ns.len(), 1);
        assert!(refused(&["--join-ns=pid:1"]).contains("pid"));
    }
}
