//! Options about the log and statistics.

use super::{Group, Opt, Takes, on};

pub const OPTIONS: &[&Opt] = &[&LOG_FILE, &LOG_PID, &VERBOSITY, &DISPLAY_STATS];

static LOG_FILE: Opt = Opt {
    long: "log-file",
    short: Some('o'),
    takes: Takes::One("FILE"),
    group: Group::Logging,
    on: on::ALL,
    help: "Log to FILE, relative to -W; - is standard output",
    more: "Without it the log goes to standard error.",
    apply: |raw, v| {
        raw.log_file = Some(v.path()?);
        Ok(())
    },
};

static LOG_PID: Opt = Opt {
    long: "log-pid",
    short: None,
    takes: Takes::Switch,
    group: Group::Logging,
    on: on::RESTORE,
    help: "One log per restored task, FILE.PID",
    more: "",
    apply: |raw, v| {
        raw.log_pid = v.on();
        Ok(())
    },
};

static VERBOSITY: Opt = Opt {
    long: "verbosity",
    short: Some('v'),
    takes: Takes::Maybe("LEVEL"),
    group: Group::Logging,
    on: on::ALL,
    help: "Log more: -v, -vv, or a level: -v4, --verbosity=4",
    more: "0 nothing, 1 errors, 2 warnings [default], 3 information, with times, 4 everything.",
    apply: |raw, v| {
        // `-verbosity=4` is a common slip, which getopt reads as the value of -v.
        let slip = |text: &str| text.strip_prefix("erbosity=").and_then(|level| level.parse().ok());
        match v.maybe_text()? {
            None => raw.verbosity += 1,
            Some(text) if slip(text).is_some() => raw.verbosity = slip(text).unwrap_or(raw.verbosity),
            Some(more) if more.bytes().all(|b| b == b'v') => raw.verbosity += more.len() as u32 + 1,
            Some(_) => raw.verbosity = v.number()?,
        }
        Ok(())
    },
};

static DISPLAY_STATS: Opt = Opt {
    long: "display-stats",
    short: None,
    takes: Takes::Switch,
    group: Group::Logging,
    on: on::BOTH,
    help: "Print the statistics too",
    more: "They are always written to stats-dump or stats-restore.",
    apply: |raw, v| {
        raw.display_stats = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use std::path::Path;

    #[test]
    fn verbosity_counts_or_is_set() {
        for (args, level) in [
            (&[][..], 2),
            (&["-v"][..], 3),
            (&["-vv"], 4),
            (&["-v", "-v"], 4),
            (&["-v4"], 4),
            (&["-v0"], 0),
            (&["--verbosity=1"], 1),
            (&["--verbosity"], 3),
            (&["-v1", "-v"], 2),
            (&["-vv", "-v1"], 1),
            (&["-verbosity=0"], 0),
        ] {
            assert_eq!(raw(args).verbosity, level, "{args:?}");
        }
        assert!(refused(&["-vx"]).contains('x'));
    }

    #[test]
    fn log_file_and_log_pid() {
        let r = raw(&["-o", "dump.log", "--log-pid"]);
        assert_eq!(r.log_file.as_deref(), Some(Path::new("dump.log")));
        assert!(r.log_pid);
    }

    #[test]
    fn statistics_are_a_switch() {
        assert!(raw(&["--display-stats"]).display_stats);
        assert!(!raw(&["--display-stats", "--no-display-stats"]).display_stats);
    }
}
