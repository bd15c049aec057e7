//! Options about files, locks and terminals.

use super::{Action, Group, Opt, Takes, on};
use rcriu_engine::options::FileValidation;

pub const OPTIONS: &[&Opt] = &[
    &SHELL_JOB,
    &FILE_LOCKS,
    &LINK_REMAP,
    &EVASIVE_DEVICES,
    &GHOST_LIMIT,
    &GHOST_FIEMAP,
    &FORCE_IRMAP,
    &IRMAP_SCAN_PATH,
    &FILE_VALIDATION,
    &SKIP_FILE_RWX_CHECK,
];

static SHELL_JOB: Opt = Opt {
    long: "shell-job",
    short: Some('j'),
    takes: Takes::Switch,
    group: Group::Files,
    on: on::BOTH,
    help: "The tree was started from a shell: share its terminal",
    more: "Session and process group may lead outside the tree; restored tasks get ours, and our terminal.",
    apply: |raw, v| {
        raw.shell_job = v.on();
        Ok(())
    },
};

static FILE_LOCKS: Opt = Opt {
    long: "file-locks",
    short: Some('l'),
    takes: Takes::Switch,
    group: Group::Files,
    on: on::BOTH,
    help: "Keep file locks",
    more: "Safe only if nobody outside the tree uses the same locks, as in a container.",
    apply: |raw, v| {
        raw.file_locks = v.on();
        Ok(())
    },
};

static LINK_REMAP: Opt = Opt {
    long: "link-remap",
    short: None,
    takes: Takes::Switch,
    group: Group::Files,
    on: on::BOTH,
    help: "Give an unlinked file that has other links a name again",
    more: "Changes the file system: the name stays from the dump to the restore.",
    apply: |raw, v| {
        raw.link_remap = v.on();
        Ok(())
    },
};

static EVASIVE_DEVICES: Opt = Opt {
    long: "evasive-devices",
    short: None,
    takes: Takes::Switch,
    group: Group::Files,
    on: on::BOTH,
    help: "Use any path to a device if its own cannot be reached",
    more: "",
    apply: |raw, v| {
        raw.evasive_devices = v.on();
        Ok(())
    },
};

static GHOST_LIMIT: Opt = Opt {
    long: "ghost-limit",
    short: None,
    takes: Takes::One("SIZE"),
    group: Group::Files,
    on: on::DUMP,
    help: "Largest content of an unlinked file to keep [default: 1M]",
    more: "In bytes, or with K, M or G after the number.",
    apply: |raw, v| {
        raw.ghost_limit =
            size(v.text()?).ok_or_else(|| v.bad("give a number of bytes, or with K, M or G"))?;
        Ok(())
    },
};

fn size(text: &str) -> Option<u64> {
    let (number, shift) = match text.char_indices().last()? {
        (at, 'K' | 'k') => (&text[..at], 10),
        (at, 'M' | 'm') => (&text[..at], 20),
        (at, 'G' | 'g') => (&text[..at], 30),
        _ => (text, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

static GHOST_FIEMAP: Opt = Opt {
    long: "ghost-fiemap",
    short: None,
    takes: Takes::Switch,
    group: Group::Files,
    on: &[Action::Dump],
    help: "Find holes of unlinked files by FIEMAP [default]",
    more: "With --no-ghost-fiemap, and where the file system has none, by SEEK_HOLE.",
    apply: |raw, v| {
        raw.ghost_fiemap = v.on();
        Ok(())
    },
};

static FORCE_IRMAP: Opt = Opt {
    long: "force-irmap",
    short: None,
    takes: Takes::Switch,
    group: Group::Files,
    on: on::BOTH,
    help: "Find the paths of watched files by searching",
    more: "For file systems whose inode numbers will be others on restore.",
    apply: |raw, v| {
        raw.force_irmap = v.on();
        Ok(())
    },
};

static IRMAP_SCAN_PATH: Opt = Opt {
    long: "irmap-scan-path",
    short: None,
    takes: Takes::One("PATH"),
    group: Group::Files,
    on: on::DUMP,
    help: "Search there too",
    more: "May be given more than once.",
    apply: |raw, v| {
        raw.irmap_scan_paths.push(v.path()?);
        Ok(())
    },
};

static FILE_VALIDATION: Opt = Opt {
    long: "file-validation",
    short: None,
    takes: Takes::One("METHOD"),
    group: Group::Files,
    on: on::BOTH,
    help: "How files are recognised: buildid [default] or filesize",
    more: "buildid compares the build-id of programs and libraries, and the size of everything else.",
    apply: |raw, v| {
        raw.file_validation = match v.text()? {
            "filesize" => FileValidation::Size,
            "buildid" => FileValidation::BuildId,
            _ => return Err(v.bad("give filesize or buildid")),
        };
        Ok(())
    },
};

static SKIP_FILE_RWX_CHECK: Opt = Opt {
    long: "skip-file-rwx-check",
    short: None,
    takes: Takes::Switch,
    group: Group::Files,
    on: on::RESTORE,
    help: "Accept files whose permissions changed",
    more: "",
    apply: |raw, v| {
        raw.skip_file_rwx_check = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use rcriu_engine::options::FileValidation;
    use std::path::PathBuf;

    #[test]
    fn switches_about_files() {
        let r =
            raw(&["-j", "-l", "--link-remap", "--evasive-devices", "--force-irmap", "--skip-file-rwx-check"]);
        assert!(r.shell_job && r.file_locks && r.link_remap);
        assert!(r.evasive_devices && r.force_irmap && r.skip_file_rwx_check);
        let r = raw(&["-j", "--no-shell-job", "-l", "--no-file-locks"]);
        assert!(!r.shell_job && !r.file_locks);
    }

    #[test]
    fn ghost_limit_understands_units() {
        assert_eq!(raw(&[]).ghost_limit, 1 << 20);
        assert_eq!(raw(&["--ghost-limit", "268435456"]).ghost_limit, 268_435_456);
        assert_eq!(raw(&["--ghost-limit=16K"]).ghost_limit, 16 << 10);
        assert_eq!(raw(&["--ghost-limit=3M"]).ghost_limit, 3 << 20);
        assert_eq!(raw(&["--ghost-limit=2G"]).ghost_limit, 2 << 30);
        for bad in ["", "x", "1T", "99999999999999999999", "18446744073709551615G", "M"] {
            assert!(refused(&["--ghost-limit", bad]).contains("ghost-limit"), "{bad}");
        }
    }

    #[test]
    fn fiemap_is_on_until_switched_off() {
        assert!(raw(&[]).ghost_fiemap);
        assert!(!raw(&["--no-ghost-fiemap"]).ghost_fiemap);
    }

    #[test]
    fn irmap_paths_add_up() {
        let r = raw(&["--irmap-scan-path", "/a", "--irmap-scan-path=/b"]);
        assert_eq!(r.irmap_scan_paths, [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn file_validation_knows_two_words() {
        assert_eq!(raw(&[]).file_validation, FileValidation::BuildId);
        assert_eq!(raw(&["--file-validation", "filesize"]).file_validation, FileValidation::Size);
        assert!(refused(&["--file-validation", "sha"]).contains("sha"));
    }
}
