//! Propagation: which mounts share what is mounted on them, and who only receives it.

use std::collections::HashMap;

use super::{mount::Mount, paths::shown, tree::Group, tree::Source};
use crate::error::{Error, Result};

/// Groups of all mounts that are not private, those above others first.
///
/// # Errors
/// A group that is a slave of itself, or of two; one that is a slave of a group outside that no mount leads to.
pub(super) fn of(mounts: &[Mount], sources: &[Source]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    let mut known = HashMap::new();
    for (at, mount) in mounts.iter().enumerate() {
        let key = (mount.shared, mount.master);
        if key == (0, 0) {
            continue;
        }
        let number = *known.entry(key).or_insert_with(|| {
            groups.push(Group { shared: key.0, master: key.1, members: Vec::new(), above: None });
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(number) {
            group.members.push(at);
        }
    }
    let mut by_shared = HashMap::new();
    for (number, group) in groups.iter().enumerate().filter(|(_, group)| group.shared != 0) {
        if by_shared.insert(group.shared, number).is_some() {
            let what = format!("propagation group {} is a slave of two others", group.shared);
            return Err(Error::image(what));
        }
    }
    let outside = |at: usize| match sources.get(at) {
        Some(Source::Of(base)) => matches!(sources.get(*base), Some(Source::Root | Source::Outside)),
        Some(source) => matches!(source, Source::Root | Source::Outside),
        None => false,
    };
    let root_of = |at: usize| mounts.get(at).and_then(|m| m.root.as_ref()).map_or(0, Vec::len);
    for group in &mut groups {
        group.above = by_shared.get(&group.master).copied().filter(|_| group.master != 0);
        let led_outside = group.is_led_outside();
        group.members.sort_by_key(|at| (led_outside && !outside(*at), root_of(*at), *at));
        let needs = if group.shared == 0 { group.members.len() } else { 1 };
        let lost = group.members.iter().take(needs).find(|at| led_outside && !outside(**at));
        if let Some(mount) = lost.and_then(|at| mounts.get(*at)) {
            let what = format!("it is a slave of propagation group {}, which is outside", mount.master);
            let remedy = format!(
                "give --external mnt[]:m, or --external mnt[{}]:NAME for a mount of the same file system",
                shown(&mount.point)
            );
            return Err(Error::unsupported(what).remedy(remedy).during(mount.name()));
        }
    }
    sorted(groups)
}

/// Those above first; positions of those above are of the new order.
fn sorted(groups: Vec<Group>) -> Result<Vec<Group>> {
    let mut place: HashMap<usize, usize> = HashMap::new();
    let mut out: Vec<Group> = Vec::with_capacity(groups.len());
    while out.len() < groups.len() {
        let before = out.len();
        for (number, group) in groups.iter().enumerate() {
            let ready = group.above.is_none_or(|above| place.contains_key(&above));
            if ready && !place.contains_key(&number) {
                let above = group.above.and_then(|above| place.get(&above).copied());
                place.insert(number, out.len());
                out.push(Group { above, ..group.clone() });
            }
        }
        if out.len() == before {
            return Err(Error::image("propagation groups are slaves of one another in a circle"));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{mount, tree};

    #[test]
    fn groups_above_come_first_and_wide_roots_lead() {
        let mut mounts = vec![mount(1, 0, "/"), mount(2, 1, "/a"), mount(3, 1, "/b"), mount(4, 1, "/c")];
        for m in &mut mounts[1..] {
            m.dev = 7;
        }
        mounts[1].root = Some(b"/sub/dir".into());
        (mounts[1].shared, mounts[2].shared, mounts[3].master) = (5, 5, 5);
        let tree = tree(mounts.clone()).unwrap();
        assert_eq!(tree.groups.len(), 2);
        assert_eq!((tree.groups[0].shared, &tree.groups[0].members[..]), (5, &[2, 1][..]));
        assert_eq!((tree.groups[1].above, tree.groups[1].is_led_outside()), (Some(0), false));
        mounts[3].shared = 6;
        mounts[1].master = 6;
        mounts[2].master = 6;
        let said = super::super::testing::tree(mounts).unwrap_err().to_string();
        assert!(said.contains("in a circle"), "{said}");
    }

    #[test]
    fn a_group_outside_needs_a_mount_that_leads_to_it() {
        let mut mounts = vec![mount(1, 0, "/"), mount(2, 1, "/a")];
        mounts[1].master = 9;
        let said = tree(mounts.clone()).unwrap_err().to_string();
        assert!(said.contains("mount 2 on /a") && said.contains("--external mnt[]:m"), "{said}");
        // The root comes from outside, and leads there.
        mounts[1].master = 0;
        mounts[0].master = 9;
        assert!(tree(mounts).unwrap().groups[0].is_led_outside());
    }
}
