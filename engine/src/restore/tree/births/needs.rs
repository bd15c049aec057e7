//! Which sessions must have begun before which.

use super::Wanted;

/// How one session needs another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// A member of the other must be above the head.
    Member,
    /// The head of the other must be above the head.
    Head,
    /// The head of the other must be above a member: above the head, too, or born in this session.
    Early,
}

/// One session needs another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Need {
    /// The other session.
    pub of: usize,
    /// Who must be above: in the session `of`.
    pub who: usize,
    /// How.
    pub why: Why,
    /// Whose ancestor it is in the end.
    pub child: usize,
}

/// The needs of each session.
pub(super) fn all(wanted: &Wanted) -> Vec<Vec<Need>> {
    let root = wanted.parent.iter().position(|p| *p == Some(wanted.sessions[0].head));
    // Nobody is born above the root.
    let root = root.filter(|r| wanted.heads(*r));
    let mut seen = vec![usize::MAX; wanted.parent.len()];
    let needs = |session: usize| {
        let mut needs = Vec::new();
        let own = &wanted.sessions[session];
        if let Some(root) = root.filter(|r| session != 0 && *r != own.head) {
            needs.push(Need { of: wanted.session[root], who: root, why: Why::Head, child: root });
        }
        if let Some(parent) = wanted.parent[own.head] {
            let why = if wanted.heads(parent) { Why::Head } else { Why::Member };
            needs.push(Need { of: wanted.session[parent], who: parent, why, child: own.head });
        }
        for child in own.members.iter().copied() {
            let mut above = wanted.parent[child];
            while let Some(who) = above.filter(|a| wanted.session[*a] != session && seen[*a] != session) {
                seen[who] = session;
                let heads = wanted.heads(who);
                let why = if heads { Why::Early } else { Why::Member };
                needs.push(Need { of: wanted.session[who], who, why, child });
                // What a member needs is above it already.
                above = wanted.parent[who].filter(|_| heads);
            }
        }
        needs
    };
    (0..wanted.sessions.len()).map(needs).collect()
}
