//! What the command line knows but the engine does not do yet.
//!
//! Everything CRIU accepts is parsed; what would have no effect is refused here by name instead of being
//! ignored. When a feature lands, its line goes.

use rcriu_engine::options::External;
use rcriu_engine::{Error, Result};

use super::actions::Action::{self, *};
use super::raw::Raw;

const BOTH: &[Action] = &[Dump, PreDump, Restore];

/// Options not served by some actions, whatever their value.
const OPTIONS: &[(&str, &[Action])] = &[("libdir", BOTH), ("lazy-pages", &[PreDump]), ("stream", BOTH)];

/// Fails with the name of the first thing asked for that is not served.
pub fn check(action: Action, raw: &Raw) -> Result<()> {
    for (name, on) in OPTIONS {
        if raw.given.contains(name) && on.contains(&action) {
            return Err(refusal(action, &format!("--{name}")));
        }
    }
    values(action, raw)
}

/// Options that are served for some values only.
fn values(action: Action, raw: &Raw) -> Result<()> {
    if !BOTH.contains(&action) {
        return Ok(());
    }
    for external in &raw.external {
        match external {
            External::Dev { .. } => return Err(refusal(action, &format!("--external {external}"))),
            External::Net { value, .. } | External::Pid { value, .. } if action == Restore => {
                let name = value.as_deref().unwrap_or("NAME");
                return Err(Error::usage(format!("--external {external} is for a dump"))
                    .remedy(format!("give --inherit-fd fd[N]:{name} on restore")));
            }
            _ => {}
        }
    }
    Ok(())
}

fn refusal(action: Action, what: &str) -> Error {
    Error::unsupported(format!("{what} is not supported by {} yet", action.name()))
}

#[cfg(test)]
mod tests {
    use super::super::options::{self, try_it::raw};
    use super::*;

    #[test]
    fn the_table_speaks_of_options_that_exist_for_the_action() {
        for (name, on) in OPTIONS {
            let opt = options::all().find(|o| o.long == *name).unwrap_or_else(|| panic!("--{name}"));
            assert!(on.iter().any(|a| opt.on.contains(a)), "--{name}");
        }
    }

    #[test]
    fn an_unserved_option_is_named_with_its_action() {
        let e = check(Dump, &raw(&["--stream"])).unwrap_err().to_string();
        assert_eq!(e, "--stream is not supported by dump yet");
        check(Dump, &raw(&["--stream", "--no-stream"])).unwrap();
    }

    #[test]
    fn an_option_for_another_action_does_not_matter() {
        check(Dump, &raw(&["--lazy-pages"])).unwrap();
        assert!(check(PreDump, &raw(&["--lazy-pages"])).is_err());
    }

    #[test]
    fn some_values_are_served() {
        check(Dump, &raw(&["--network-lock=skip"])).unwrap();
        check(Dump, &raw(&["--external", "tty[1:2]"])).unwrap();
        for profile in ["apparmor:unconfined", "apparmor:box", "selinux:a:b:c:s0"] {
            check(Restore, &raw(&["--lsm-profile", profile, "--lsm-mount-context", "x"])).unwrap();
        }
        check(Restore, &raw(&["--network-lock=nftables"])).unwrap();
        check(Dump, &raw(&["--external", "net[1]:x", "--external", "pid[2]:y", "--empty-ns", "net"]))
            .unwrap();
        let said = check(Restore, &raw(&["--external", "net[1]:x"])).unwrap_err().to_string();
        assert!(said.contains("--inherit-fd fd[N]:x"), "{said}");
        check(Dump, &raw(&["-M", "auto"])).unwrap();
    }

    #[test]
    fn actions_without_such_options_are_served() {
        check(CpuinfoDump, &raw(&[])).unwrap();
        check(Check, &raw(&[])).unwrap();
    }
}
