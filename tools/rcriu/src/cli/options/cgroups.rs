//! Options about control groups.

use super::{Group, Opt, Takes, on};
use rcriu_engine::options::{CgroupRoot, ManageCgroups};

pub const OPTIONS: &[&Opt] = &[
    &MANAGE_CGROUPS,
    &CGROUP_ROOT,
    &CGROUP_PROPS,
    &CGROUP_PROPS_FILE,
    &CGROUP_DUMP_CONTROLLER,
    &CGROUP_YARD,
    &FREEZE_CGROUP,
];

static MANAGE_CGROUPS: Opt = Opt {
    long: "manage-cgroups",
    short: None,
    takes: Takes::Maybe("MODE"),
    group: Group::Cgroups,
    on: on::BOTH,
    help: "What is kept: ignore, none, props, soft [default], full, strict",
    more: "ignore does not look at them. none keeps membership only; props also sets properties of groups that \
           exist; soft makes missing groups and sets their properties; full makes missing groups and sets all \
           properties; strict wants no group to exist before.",
    apply: |raw, v| {
        raw.cgroup.manage = match v.maybe_text()? {
            None | Some("soft") => ManageCgroups::Soft,
            Some("ignore") => ManageCgroups::Ignore,
            Some("none") => ManageCgroups::None,
            Some("props") => ManageCgroups::Props,
            Some("full") => ManageCgroups::Full,
            Some("strict") => ManageCgroups::Strict,
            Some(_) => return Err(v.bad("give ignore, none, props, soft, full or strict")),
        };
        Ok(())
    },
};

static CGROUP_ROOT: Opt = Opt {
    long: "cgroup-root",
    short: None,
    takes: Takes::One("[CTL:]PATH"),
    group: Group::Cgroups,
    on: on::BOTH,
    help: "Take PATH for the root of the hierarchy of controller CTL",
    more: "On dump the tree's groups are kept relative to it; on restore they are made below it. Without CTL it \
           counts for all hierarchies not named. May be given more than once.",
    apply: |raw, v| {
        let text = v.text()?;
        let (controllers, path) = match text.split_once(':') {
            Some((controllers, path)) => (Some(controllers.to_owned()), path),
            None => (None, text),
        };
        raw.cgroup.roots.push(CgroupRoot { controllers, path: path.into() });
        Ok(())
    },
};

static CGROUP_PROPS: Opt = Opt {
    long: "cgroup-props",
    short: None,
    takes: Takes::One("TEXT"),
    group: Group::Cgroups,
    on: on::DUMP,
    help: "Which properties of which controllers are kept",
    more: "In a simple YAML: `\"CTL\":` followed by the lines ` - \"strategy\": \"merge\"` (or replace) and \
           ` - \"properties\": [\"A\", \"B\"]`.",
    apply: |raw, v| {
        raw.cgroup.props = Some(v.text()?.to_owned());
        Ok(())
    },
};

static CGROUP_PROPS_FILE: Opt = Opt {
    long: "cgroup-props-file",
    short: None,
    takes: Takes::One("FILE"),
    group: Group::Cgroups,
    on: on::DUMP,
    help: "The same, from a file",
    more: "",
    apply: |raw, v| {
        raw.cgroup.props_file = Some(v.path()?);
        Ok(())
    },
};

static CGROUP_DUMP_CONTROLLER: Opt = Opt {
    long: "cgroup-dump-controller",
    short: None,
    takes: Takes::One("CTL"),
    group: Group::Cgroups,
    on: on::DUMP,
    help: "Keep this controller only",
    more: "May be given more than once.",
    apply: |raw, v| {
        raw.cgroup.dump_controllers.push(v.text()?.to_owned());
        Ok(())
    },
};

static CGROUP_YARD: Opt = Opt {
    long: "cgroup-yard",
    short: None,
    takes: Takes::One("DIR"),
    group: Group::Cgroups,
    on: on::BOTH,
    help: "Folder in which every hierarchy is mounted already",
    more: "",
    apply: |raw, v| {
        raw.cgroup.yard = Some(v.path()?);
        Ok(())
    },
};

static FREEZE_CGROUP: Opt = Opt {
    long: "freeze-cgroup",
    short: None,
    takes: Takes::One("DIR"),
    group: Group::Cgroups,
    on: on::DUMP,
    help: "Find and freeze the tasks through this cgroup",
    more: "A folder of the v1 freezer or of cgroup v2.",
    apply: |raw, v| {
        raw.freeze_cgroup = Some(v.path()?);
        Ok(())
    },
};

#[cfg(test)]
mod tests {
    use super::super::try_it::{raw, refused};
    use rcriu_engine::options::ManageCgroups;
    use std::path::Path;

    #[test]
    fn manage_cgroups_knows_its_modes() {
        assert_eq!(raw(&[]).cgroup.manage, ManageCgroups::Soft);
        for (text, mode) in [
            ("--manage-cgroups", ManageCgroups::Soft),
            ("--manage-cgroups=ignore", ManageCgroups::Ignore),
            ("--manage-cgroups=none", ManageCgroups::None),
            ("--manage-cgroups=props", ManageCgroups::Props),
            ("--manage-cgroups=soft", ManageCgroups::Soft),
            ("--manage-cgroups=full", ManageCgroups::Full),
            ("--manage-cgroups=strict", ManageCgroups::Strict),
        ] {
            assert_eq!(raw(&[text]).cgroup.manage, mode, "{text}");
        }
        assert!(refused(&["--manage-cgroups=hard"]).contains("hard"));
    }

    #[test]
    fn cgroup_roots_have_controllers_or_none() {
        let r = raw(&["--cgroup-root", "name=systemd:/a", "--cgroup-root=/b"]);
        assert_eq!(r.cgroup.roots[0].controllers.as_deref(), Some("name=systemd"));
        assert_eq!(r.cgroup.roots[0].path, Path::new("/a"));
        assert_eq!(
            (r.cgroup.roots[1].controllers.as_deref(), &*r.cgroup.roots[1].path),
            (None, Path::new("/b"))
        );
    }

    #[test]
    fn properties_and_controllers_are_kept_as_given() {
        let r = raw(&["--cgroup-props", "x", "--cgroup-props-file=f", "--cgroup-dump-controller", "cpu"]);
        assert_eq!(r.cgroup.props.as_deref(), Some("x"));
        assert_eq!(r.cgroup.props_file.as_deref(), Some(Path::new("f")));
        assert_eq!(r.cgroup.dump_controllers, ["cpu"]);
    }

    #[test]
    fn folders_of_cgroups() {
        let r = raw(&["--cgroup-yard", "/y", "--freeze-cgroup", "/sys/fs/cgroup//x"]);
        assert_eq!(r.cgroup.yard.as_deref(), Some(Path::new("/y")));
        assert_eq!(r.freeze_cgroup.as_deref(), Some(Path::new("/sys/fs/cgroup//x")));
    }
}
