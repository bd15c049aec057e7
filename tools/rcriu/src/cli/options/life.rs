//! Options about what becomes of the tasks and of us afterwards.

use super::{Action, Group, Opt, Takes, on};

pub const OPTIONS: &[&Opt] = &[
    &LEAVE_RUNNING,
    &LEAVE_STOPPED,
    &RESTORE_DETACHED,
    &RESTORE_SIBLING,
    &EXEC_CMD,
    &DRY_RUN,
    &JSON,
    &DAEMON,
];

static LEAVE_RUNNING: Opt = Opt {
    long: "leave-running",
    short: Some('R'),
    takes: Takes::Nothing,
    group: Group::Life,
    on: &[Action::Dump],
    help: "Let the tasks go on after the dump, instead of killing them",
    more: "What they change from then on (files, connections) may keep the images from being restored.",
    apply: |raw, _| {
        raw.leave_running = true;
        raw.leave_stopped = false;
        Ok(())
    },
};

static LEAVE_STOPPED: Opt = Opt {
    long: "leave-stopped",
    short: Some('s'),
    takes: Takes::Nothing,
    group: Group::Life,
    on: &[Action::Dump, Action::Restore],
    help: "Leave the tasks stopped, after a dump or a restore",
    more: "They go on when they get SIGCONT.",
    apply: |raw, _| {
        raw.leave_stopped = true;
        raw.leave_running = false;
        Ok(())
    },
};

static RESTORE_DETACHED: Opt = Opt {
    long: "restore-detached",
    short: Some('d'),
    takes: Takes::Switch,
    group: Group::Life,
    on: on::RESTORE,
    help: "Return once the tasks run, instead of waiting for their end",
    more: "For servers it means the same as --daemon.",
    apply: |raw, v| {
        raw.restore_detached = v.on();
        Ok(())
    },
};

static RESTORE_SIBLING: Opt = Opt {
    long: "restore-sibling",
    short: Some('S'),
    takes: Takes::Switch,
    group: Group::Life,
    on: on::RESTORE,
    help: "Make the root task a child of our parent (needs -d)",
    more: "",
    apply: |raw, v| {
        raw.restore_sibling = v.on();
        Ok(())
    },
};

static EXEC_CMD: Opt = Opt {
    long: "exec-cmd",
    short: None,
    takes: Takes::Nothing,
    group: Group::Life,
    on: on::RESTORE,
    help: "Then execute the command after `--` in our place",
    more: "It becomes the parent of the restored root task.",
    apply: |raw, _| {
        raw.exec_cmd = true;
        Ok(())
    },
};

static DRY_RUN: Opt = Opt {
    long: "dry-run",
    short: None,
    takes: Takes::Switch,
    group: Group::Life,
    on: on::RESTORE,
    help: "Only tell whether a restore can work here, and why not",
    more: "Checks pids, files, CPU, kernel and limits; creates nothing. The exit code is 0 if nothing is missing.",
    apply: |raw, v| {
        raw.dry_run = v.on();
        Ok(())
    },
};

static JSON: Opt = Opt {
    long: "json",
    short: None,
    takes: Takes::Switch,
    group: Group::Life,
    on: on::RESTORE,
    help: "With --dry-run: answer in JSON",
    more: "",
    apply: |raw, v| {
        raw.json = v.on();
        Ok(())
    },
};

static DAEMON: Opt = Opt {
    long: "daemon",
    short: None,
    takes: Takes::Switch,
    group: Group::Server,
    on: on::SERVERS,
    help: "Serve in the background; also -d",
    more: "",
    apply: |raw, v| {
        raw.restore_detached = v.on();
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::raw;

    #[test]
    fn the_last_of_leave_running_and_leave_stopped_counts() {
        let r = raw(&["-R"]);
        assert!(r.leave_running && !r.leave_stopped);
        let r = raw(&["--leave-running", "-s"]);
        assert!(!r.leave_running && r.leave_stopped);
    }

    #[test]
    fn detached_and_daemon_are_one_switch() {
        assert!(raw(&["-d"]).restore_detached);
        assert!(raw(&["--daemon"]).restore_detached);
        assert!(!raw(&["-d", "--no-daemon"]).restore_detached);
        assert!(!raw(&["--restore-detached", "--no-restore-detached"]).restore_detached);
    }

    #[test]
    fn sibling_is_a_switch() {
        assert!(raw(&["-S"]).restore_sibling);
        assert!(!raw(&["-S", "--no-restore-sibling"]).restore_sibling);
    }

    #[test]
    fn exec_cmd_and_dry_run_are_noted() {
        assert!(raw(&["--exec-cmd"]).exec_cmd);
        let r = raw(&["--dry-run", "--json"]);
        assert!(r.dry_run && r.json);
    }
}
