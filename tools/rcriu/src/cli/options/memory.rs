//! Options about memory: increments, post-copy, and the form in which pages are stored.

use super::{Action, Group, Opt, Takes, on};
use rcriu_engine::options::PreDumpMode;

pub const OPTIONS: &[&Opt] = &[
    &TRACK_MEM,
    &BACKGROUND,
    &PREV_IMAGES_DIR,
    &AUTO_DEDUP,
    &CHECKSUM,
    &COMPRESS,
    &PRE_DUMP_MODE,
    &LAZY_PAGES,
    &STREAM,
];

static TRACK_MEM: Opt = Opt {
    long: "track-mem",
    short: None,
    takes: Takes::Switch,
    group: Group::Memory,
    on: on::DUMP,
    help: "Have the kernel note which memory changes from now on",
    more: "A later dump with --prev-images-dir then writes only that.",
    apply: |raw, v| {
        raw.track_mem = v.on();
        Ok(())
    },
};

static BACKGROUND: Opt = Opt {
    long: "background",
    short: None,
    takes: Takes::Switch,
    group: Group::Memory,
    on: &[Action::Dump, Action::Restore],
    help: "Copy or fill memory while the tree runs",
    more: "With --leave-running: the tree is frozen only while its other state is read; the images are of that \
           moment. While memory is copied, what the tree changes needs room twice. A restore starts the tasks without \
           their memory, which comes when it is touched and behind their backs; the command says when all is there.",
    apply: |raw, v| {
        raw.background = v.on();
        Ok(())
    },
};

static PREV_IMAGES_DIR: Opt = Opt {
    long: "prev-images-dir",
    short: None,
    takes: Takes::One("DIR"),
    group: Group::Memory,
    on: &[Action::Dump, Action::PreDump, Action::PageServer],
    help: "Images to build upon, relative to -D",
    more: "",
    apply: |raw, v| {
        raw.prev_images_dir = Some(v.path()?);
        Ok(())
    },
};

static AUTO_DEDUP: Opt = Opt {
    long: "auto-dedup",
    short: None,
    takes: Takes::Switch,
    group: Group::Memory,
    on: &[Action::Dump, Action::PreDump, Action::Restore, Action::PageServer],
    help: "Free image space of pages that are superseded or restored",
    more: "On dump it is the older copies in the images of --prev-images-dir; on restore every page once it is in \
           place, so that the images are used up.",
    apply: |raw, v| {
        raw.auto_dedup = v.on();
        Ok(())
    },
};

static CHECKSUM: Opt = Opt {
    long: "checksum",
    short: None,
    takes: Takes::Switch,
    group: Group::Memory,
    on: on::DUMP,
    help: "Write sums of all images, down to single pages",
    more: "A restore and show --check then find every bit that has changed since, and name its file, task and \
           address. Sums are found by themselves: a restore needs no option.",
    apply: |raw, v| {
        raw.checksum = v.on();
        Ok(())
    },
};

static COMPRESS: Opt = Opt {
    long: "compress",
    short: None,
    takes: Takes::Maybe("zstd:LEVEL"),
    group: Group::Memory,
    on: on::DUMP,
    help: "Compress memory: zstd [default], zstd:LEVEL",
    more: "Levels are those of zstd, 1 if none is given; negative ones are faster still. Other programs than this one \
           cannot read such images, and refuse them.",
    apply: |raw, v| {
        let given = v.text()?;
        let level = match given.split_once(':') {
            None if matches!(given, "" | "zstd") => Ok(1),
            Some(("zstd", level)) => level.parse(),
            _ => return Err(v.bad("give zstd or zstd:LEVEL")),
        };
        let levels = rcriu_images::packed::levels();
        match level {
            Ok(level) if levels.contains(&level) => {
                raw.compress = Some(level);
                Ok(())
            }
            _ => Err(v.bad(&format!("give a level from {} to {}", levels.start(), levels.end()))),
        }
    },
};

static PRE_DUMP_MODE: Opt = Opt {
    long: "pre-dump-mode",
    short: None,
    takes: Takes::One("MODE"),
    group: Group::Memory,
    on: &[Action::PreDump],
    help: "How memory is read: splice [default] or read",
    more: "splice holds the pages while the tasks are frozen; read copies them while the tasks run again, which \
           freezes for less time.",
    apply: |raw, v| {
        raw.pre_dump_mode = match v.text()? {
            "splice" => PreDumpMode::Splice,
            "read" => PreDumpMode::Read,
            _ => return Err(v.bad("give splice or read")),
        };
        Ok(())
    },
};

static LAZY_PAGES: Opt = Opt {
    long: "lazy-pages",
    short: None,
    takes: Takes::Nothing,
    group: Group::Memory,
    on: &[Action::Dump, Action::PreDump, Action::Restore, Action::PageServer],
    help: "Move memory only when it is touched",
    more: "A dump serves the pages instead of writing them; a restore starts the tasks without them and needs \
           the command lazy-pages running in the same folder.",
    apply: |raw, _| {
        raw.lazy_pages = true;
        Ok(())
    },
};

static STREAM: Opt = Opt {
    long: "stream",
    short: None,
    takes: Takes::Switch,
    group: Group::Memory,
    on: on::BOTH,
    help: "Pass images through criu-image-streamer",
    more: "",
    apply: |raw, v| {
        raw.stream = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use rcriu_engine::options::PreDumpMode;
    use std::path::Path;

    #[test]
    fn increments_name_their_parent() {
        let r = raw(&["--track-mem", "--prev-images-dir", "../1", "--auto-dedup"]);
        assert!(r.track_mem && r.auto_dedup);
        assert_eq!(r.prev_images_dir.as_deref(), Some(Path::new("../1")));
    }

    #[test]
    fn sums_are_made_on_request() {
        assert!(!raw(&[]).checksum && raw(&["--checksum"]).checksum);
        assert!(!raw(&["--checksum", "--no-checksum"]).checksum);
    }

    #[test]
    fn memory_is_compressed_on_request() {
        let level = |args: &[&str]| raw(args).compress;
        assert_eq!(level(&[]), None);
        assert_eq!((level(&["--compress"]), level(&["--compress=zstd"])), (Some(1), Some(1)));
        assert_eq!((level(&["--compress=zstd:9"]), level(&["--compress=zstd:-3"])), (Some(9), Some(-3)));
        for bad in ["lz4", "zstd:", "zstd:99", "9"] {
            assert!(refused(&[&format!("--compress={bad}")]).contains("zstd") || bad.contains(':'), "{bad}");
        }
        assert!(refused(&["--compress=zstd:99"]).contains("22"));
    }

    #[test]
    fn pre_dump_mode_knows_two_words() {
        assert_eq!(raw(&[]).pre_dump_mode, PreDumpMode::Splice);
        assert_eq!(raw(&["--pre-dump-mode", "read"]).pre_dump_mode, PreDumpMode::Read);
        assert!(refused(&["--pre-dump-mode=write"]).contains("write"));
    }

    #[test]
    fn lazy_pages_and_stream_are_noted() {
        let r = raw(&["--lazy-pages", "--stream"]);
        assert!(r.lazy_pages && r.stream);
        assert!(refused(&["--no-lazy-pages"]).contains("no-lazy-pages"));
    }
}
