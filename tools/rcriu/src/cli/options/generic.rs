//! Options for any action: which tree, which folders, who is told, how long, where options come from.

use super::{Action, Group, Opt, Takes, on};

pub const OPTIONS: &[&Opt] = &[
    &TREE,
    &IMAGES_DIR,
    &WORK_DIR,
    &PIDFILE,
    &TIMEOUT,
    &ACTION_SCRIPT,
    &LIBDIR,
    &CLOSE,
    &UNPRIVILEGED,
    &DEPRECATED,
    &HELP,
    &VERSION,
    &MS,
    &CONFIG,
    &NO_DEFAULT_CONFIG,
];

static TREE: Opt = Opt {
    long: "tree",
    short: Some('t'),
    takes: Takes::One("PID"),
    group: Group::Generic,
    on: on::DUMP,
    help: "Dump the process tree that starts at PID",
    more: "",
    apply: |raw, v| match v.number() {
        Ok(pid) if pid > 0 => {
            raw.tree = Some(pid);
            Ok(())
        }
        _ => Err(v.bad("give the pid of a process")),
    },
};

static IMAGES_DIR: Opt = Opt {
    long: "images-dir",
    short: Some('D'),
    takes: Takes::One("DIR"),
    group: Group::Generic,
    on: on::ALL,
    help: "Folder of the images [default: the current one]",
    more: "The folder must exist. A dump overwrites images that are in it.",
    apply: |raw, v| {
        raw.images_dir = Some(v.path()?);
        Ok(())
    },
};

static WORK_DIR: Opt = Opt {
    long: "work-dir",
    short: Some('W'),
    takes: Takes::One("DIR"),
    group: Group::Generic,
    on: on::ALL,
    help: "Folder for logs, pid files and statistics [default: -D]",
    more: "The program changes into it; relative paths given for such files start there.",
    apply: |raw, v| {
        raw.work_dir = Some(v.path()?);
        Ok(())
    },
};

static PIDFILE: Opt = Opt {
    long: "pidfile",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Generic,
    on: &[Action::Restore, Action::PageServer, Action::LazyPages, Action::Service],
    help: "Write the pid of the root task, or of the server, to FILE",
    more: "FILE must not exist.",
    apply: |raw, v| {
        raw.pidfile = Some(v.path()?);
        Ok(())
    },
};

static TIMEOUT: Opt = Opt {
    long: "timeout",
    short: None,
    takes: Takes::One("SECONDS"),
    group: Group::Generic,
    on: on::BOTH,
    help: "Give up and undo everything after SECONDS",
    more: "Without it a dump gives up if freezing the tree takes more than 10 seconds and may then take as long \
           as it needs. 0 lifts that limit too.",
    apply: |raw, v| {
        raw.timeout = Some(v.number()?);
        Ok(())
    },
};

static ACTION_SCRIPT: Opt = Opt {
    long: "action-script",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Generic,
    on: on::STAGED,
    help: "Run FILE at each stage, with CRTOOLS_SCRIPT_ACTION set",
    more: "May be given more than once. The stages are pre-dump, network-lock, post-dump and network-unlock; \
           pre-restore, setup-namespaces, post-setup-namespaces, post-restore, network-unlock, pre-resume and \
           post-resume; status-ready, when a page server, lazy-pages or a lazy dump can be asked for memory. The script finds the images in CRTOOLS_IMAGE_DIR and the root task's pid in \
           CRTOOLS_INIT_PID. If it fails, so does the operation.",
    apply: |raw, v| {
        // The latest script is run first.
        raw.action_scripts.insert(0, v.path()?);
        Ok(())
    },
};

static LIBDIR: Opt = Opt {
    long: "libdir",
    short: Some('L'),
    takes: Takes::One("DIR"),
    group: Group::Generic,
    on: on::BOTH,
    help: "Folder of plugins",
    more: "",
    apply: |raw, v| {
        raw.libdir = Some(v.path()?);
        Ok(())
    },
};

static CLOSE: Opt = Opt {
    long: "close",
    short: None,
    takes: Takes::One("FD"),
    group: Group::Generic,
    on: on::ALL,
    help: "Close this descriptor first",
    more: "",
    apply: |raw, v| {
        raw.close.push(v.number()?);
        Ok(())
    },
};

static UNPRIVILEGED: Opt = Opt {
    long: "unprivileged",
    short: None,
    takes: Takes::Switch,
    group: Group::Generic,
    on: on::ALL,
    help: "Run without root, with what that cannot do",
    more: "Needs at least CAP_CHECKPOINT_RESTORE.",
    apply: |raw, v| {
        raw.unprivileged = v.on();
        Ok(())
    },
};

static DEPRECATED: Opt = Opt {
    long: "deprecated",
    short: None,
    takes: Takes::Switch,
    group: Group::Generic,
    on: on::ALL,
    help: "Allow what is about to be removed",
    more: "Nothing is at present. The environment variable CRIU_DEPRECATED does the same.",
    apply: |raw, v| {
        raw.deprecated = v.on();
        Ok(())
    },
};

// The front end looks for these two before anything else, so that they work in spite of other mistakes.
static HELP: Opt = Opt {
    long: "help",
    short: Some('h'),
    takes: Takes::Nothing,
    group: Group::Generic,
    on: on::ALL,
    help: "Show this text; after a command, the text for it",
    more: "",
    apply: |_, _| Ok(()),
};

static VERSION: Opt = Opt {
    long: "version",
    short: Some('V'),
    takes: Takes::Nothing,
    group: Group::Generic,
    on: on::ALL,
    help: "Show the version",
    more: "The first line gives the version of CRIU whose command line and images are spoken, in the form that \
           other programs parse; the second our own.",
    apply: |_, _| Ok(()),
};

static MS: Opt = Opt {
    long: "ms",
    short: None,
    takes: Takes::Nothing,
    group: Group::Check,
    on: &[],
    help: "Removed: see --extra, --experimental and --all",
    more: "",
    apply: |_, v| Err(v.bad("it was removed; give --extra, --experimental or --all")),
};

static CONFIG: Opt = Opt {
    long: "config",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Config,
    on: on::ALL,
    help: "Read options from FILE, instead of the default files",
    more: "A file has one option a line, without the dashes: `tcp-established`, `work-dir \"/a b\"`, `no-stream`. \
           What follows a # is a comment. Without this option /etc/criu/default.conf and \
           $HOME/.criu/default.conf are read; then, in any case, the file named by the environment variable \
           CRIU_CONFIG_FILE. The command line comes last and wins.",
    apply: |_, _| Ok(()),
};

static NO_DEFAULT_CONFIG: Opt = Opt {
    long: "no-default-config",
    short: None,
    takes: Takes::Nothing,
    group: Group::Config,
    on: on::ALL,
    help: "Do not read the default files",
    more: "",
    apply: |_, _| Ok(()),
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use std::path::{Path, PathBuf};

    #[test]
    fn tree_takes_a_positive_pid() {
        assert_eq!(raw(&["-t", "12"]).tree, Some(12));
        assert_eq!(raw(&["--tree=7", "-t8"]).tree, Some(8));
        assert!(refused(&["-t", "0"]).contains("tree"));
        assert!(refused(&["-t", "x"]).contains('x'));
    }

    #[test]
    fn folders_take_paths() {
        let r = raw(&["-D", "a", "--work-dir", "b", "-Lc"]);
        assert_eq!(r.images_dir.as_deref(), Some(Path::new("a")));
        assert_eq!(r.work_dir.as_deref(), Some(Path::new("b")));
        assert_eq!(r.libdir.as_deref(), Some(Path::new("c")));
        assert!(refused(&["-D", ""]).contains("images-dir"));
    }

    #[test]
    fn pidfile_takes_a_path() {
        assert_eq!(raw(&["--pidfile", "p"]).pidfile, Some(PathBuf::from("p")));
    }

    #[test]
    fn timeout_takes_seconds() {
        assert_eq!(raw(&["--timeout", "30"]).timeout, Some(30));
        assert!(refused(&["--timeout", "soon"]).contains("soon"));
    }

    #[test]
    fn action_scripts_add_up_latest_first() {
        let r = raw(&["--action-script", "a", "--action-script=b"]);
        assert_eq!(r.action_scripts, [PathBuf::from("b"), PathBuf::from("a")]);
    }

    #[test]
    fn close_takes_descriptors() {
        assert_eq!(raw(&["--close", "5", "--close=6"]).close, [5, 6]);
    }

    #[test]
    fn switches_go_both_ways_and_the_last_one_counts() {
        let r = raw(&["--unprivileged", "--no-unprivileged", "--deprecated"]);
        assert!(!r.unprivileged && r.deprecated);
        assert!(!r.given.contains("unprivileged") && r.given.contains("deprecated"));
    }

    #[test]
    fn options_of_the_front_end_change_nothing() {
        for args in [&["-h"][..], &["-V"], &["--config", "x"], &["--no-default-config"]] {
            assert_eq!(raw(args).tree, None);
        }
    }

    #[test]
    fn ms_says_what_to_use() {
        assert!(refused(&["--ms"]).contains("--extra"));
    }
}
