//! Options of the command check.

use super::{Action, Group, Opt, Takes};

pub const OPTIONS: &[&Opt] = &[&FEATURE, &EXTRA, &EXPERIMENTAL, &ALL];

static FEATURE: Opt = Opt {
    long: "feature",
    short: None,
    takes: Takes::One("NAME|list"),
    group: Group::Check,
    on: &[Action::Check],
    help: "Check this kernel feature only; list names them",
    more: "",
    apply: |raw, v| {
        let name = v.text()?;
        if name != "list" && !crate::check::is_feature(name) {
            return Err(v.bad("no such feature; --feature list names them"));
        }
        raw.features.push(name.to_owned());
        Ok(())
    },
};

static EXTRA: Opt = Opt {
    long: "extra",
    short: None,
    takes: Takes::Switch,
    group: Group::Check,
    on: &[Action::Check],
    help: "Also check what only some programs need",
    more: "",
    apply: |raw, v| {
        raw.check_extra = v.on();
        Ok(())
    },
};

static EXPERIMENTAL: Opt = Opt {
    long: "experimental",
    short: None,
    takes: Takes::Switch,
    group: Group::Check,
    on: &[Action::Check],
    help: "Also check what experiments need",
    more: "",
    apply: |raw, v| {
        raw.check_experimental = v.on();
        Ok(())
    },
};

static ALL: Opt = Opt {
    long: "all",
    short: None,
    takes: Takes::Nothing,
    group: Group::Check,
    on: &[Action::Check],
    help: "--extra and --experimental",
    more: "",
    apply: |raw, _| {
        raw.check_extra = true;
        raw.check_experimental = true;
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};

    #[test]
    fn features_are_known_names() {
        assert_eq!(raw(&["--feature", "mem_dirty_track"]).features, ["mem_dirty_track"]);
        assert_eq!(raw(&["--feature=list"]).features, ["list"]);
        assert!(refused(&["--feature", "time_travel"]).contains("time_travel"));
    }

    #[test]
    fn all_is_both() {
        let r = raw(&["--extra"]);
        assert!(r.check_extra && !r.check_experimental);
        let r = raw(&["--experimental", "--no-extra"]);
        assert!(!r.check_extra && r.check_experimental);
        let r = raw(&["--all"]);
        assert!(r.check_extra && r.check_experimental);
    }
}
