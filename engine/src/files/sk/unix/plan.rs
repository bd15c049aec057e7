//! Which unix sockets must be made together, and what each of them is.
//!
//! Sockets that are connected with each other, that were bound to one path, or whose path is gone form a
//! *cluster*: one task opens all of it, so that nobody waits for anybody and no lock guards a path. Order
//! inside a cluster is the only thing that matters then:
//!
//! ```text
//! open    pairs, single sockets -> names (lost ones first) -> listeners -> connections waiting for accept
//! finish  queues -> datagram peers (who is connected to comes after who connects) -> shutdown -> options
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use rcriu_images::pb;

use super::{CALLBACK, DGRAM, ESTABLISHED, LISTEN, OUTSIDE, SEQPACKET, SERVICE, STREAM};
use crate::{
    error::{Error, Result},
    files::{
        PlanFiles, Root, Roots,
        sk::{
            queue::{self, Packet},
            socket_name,
        },
    },
    pstree::FileId,
};

/// What a socket is within its cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// One end of a pair; the number is the other's place in the cluster.
    Pair(usize),
    /// A connection whose other end is gone, or a datagram socket with something to read: a helper of ours
    /// is its peer while queues are filled.
    Helped,
    /// Anything else.
    Single,
    /// Given from outside (--inherit-fd).
    Given,
    /// Only its name matters: it lives outside.
    Outside,
}

/// A socket of a cluster.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) id: FileId,
    pub(super) entry: pb::UnixSkEntry,
    pub(super) role: Role,
    /// Place of the peer in the cluster.
    pub(super) peer: Option<usize>,
    /// What it has received.
    pub(super) packets: Vec<Packet>,
    /// Options that the entry has no field for.
    pub(super) option: Vec<pb::RcriuSockopt>,
    /// Whose it is.
    pub(super) owner: Option<pb::RcriuOwner>,
    /// Who the kernel has noted as its peer.
    pub(super) peer_is: Option<pb::RcriuCredentials>,
}

impl Member {
    pub(super) fn stream(&self) -> bool {
        self.entry.r#type != DGRAM
    }

    /// Whether its name is bound. Both ends of a connection may tell the name of the listener.
    pub(super) fn binds(&self) -> bool {
        let accepted = self.stream() && self.entry.state == ESTABLISHED;
        !self.entry.name.is_empty() && !accepted && !matches!(self.role, Role::Given | Role::Outside)
    }

    /// The path it is bound to, without the final NUL.
    pub(super) fn path(&self) -> Option<&[u8]> {
        let name = self.entry.name.split(|c| *c == 0).next()?;
        (!name.is_empty()).then_some(name)
    }

    /// Where its path begins.
    pub(super) fn root<'a>(&self, roots: &'a Roots) -> &'a Root {
        roots.of_mount(self.entry.mnt_id)
    }

    pub(super) fn lost(&self) -> bool {
        self.entry.deleted == Some(true)
    }
}

/// Sockets that one task opens, ordered by id.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) members: Vec<Member>,
    /// Everything that completing it needs open: its members, and the files in their queues.
    pub(super) at_hand: Vec<FileId>,
}

impl Cluster {
    /// The member that is restored last completes all of them.
    pub(super) fn last(&self) -> Option<usize> {
        self.members.iter().rposition(|m| m.role != Role::Outside)
    }
}

/// All clusters.
#[derive(Debug)]
pub(in crate::files) struct UnixWorld {
    places: HashMap<FileId, (Arc<Cluster>, usize)>,
}

impl UnixWorld {
    /// Sorts all unix sockets of the images into clusters.
    pub(in crate::files) fn new(plan: &PlanFiles<'_>) -> Result<Self> {
        let mut packets = queue::read(plan.images)?;
        let entries: Vec<(FileId, &pb::UnixSkEntry)> =
            plan.entries.iter().filter_map(|(id, e)| Some((id, e.usk.as_deref()?))).collect();
        let mut by_ino = HashMap::new();
        for (at, (id, entry)) in entries.iter().enumerate() {
            check(entry)
                .and_then(|()| plan.check_network(entry.ns_id))
                .map_err(|e| e.during(format!("file {id}")))?;
            if entry.ino != 0 && by_ino.insert(entry.ino, at).is_some() {
                return Err(Error::image(format!("files.img has unix socket {} twice", entry.ino)));
            }
        }
        let mut union = Union::new(entries.len());
        let mut peers = vec![None; entries.len()];
        let mut paths: HashMap<(&[u8], &[u8]), usize> = HashMap::new();
        let mut lost = None;
        for (at, (id, entry)) in entries.iter().enumerate() {
            if entry.peer != 0 {
                let peer = by_ino.get(&entry.peer).copied().ok_or_else(|| {
                    Error::image(format!("file {id}: its peer, socket {}, is missing", entry.peer))
                })?;
                peers[at] = Some(peer);
                union.join(at, peer);
            }
            let accepted = entry.r#type != DGRAM && entry.state == ESTABLISHED;
            if let Some(first) = entry.name.first()
                && *first != 0
                && !accepted
            {
                let folder = entry.name_dir.as_deref().unwrap_or_default();
                union.join(at, *paths.entry((folder, &entry.name)).or_insert(at));
            }
            if entry.deleted == Some(true) {
                union.join(at, *lost.get_or_insert(at));
            }
        }
        // Who has sent a datagram sends it again.
        let datagrams = entries.iter().enumerate().filter(|(_, (_, e))| e.r#type == DGRAM);
        let senders: HashMap<_, _> = datagrams.map(|(at, (_, e))| (bound(e), at)).collect();
        for (at, (id, entry)) in entries.iter().enumerate() {
            for name in packets.get(id).into_iter().flatten().filter_map(|packet| packet.name.as_deref()) {
                if let Some(sender) = senders.get(&known_as(name, entry)) {
                    union.join(at, *sender);
                }
            }
        }
        let mut clusters: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for at in 0..entries.len() {
            clusters.entry(union.root(at)).or_default().push(at);
        }
        let mut places = HashMap::new();
        for cluster in clusters.into_values() {
            let place: HashMap<usize, usize> = cluster.iter().enumerate().map(|(n, at)| (*at, n)).collect();
            let mut members = Vec::with_capacity(cluster.len());
            for at in &cluster {
                let (id, entry) = entries[*at];
                let peer = peers[*at];
                // No call makes a pair in two network namespaces: such datagram sockets are connected by name.
                let mutual =
                    peer.filter(|p| p != at && peers[*p] == Some(*at) && entries[*p].1.ns_id == entry.ns_id);
                let packets = packets.remove(&id).unwrap_or_default();
                let more = plan.more(id);
                let given = plan.opts.inherit_fds.iter().any(|fd| fd.is_for(&socket_name(entry.ino)));
                members.push(Member {
                    id,
                    role: role(entry, mutual.map(|p| place[&p]), &packets, given),
                    entry: entry.clone(),
                    peer: peer.map(|p| place[&p]),
                    packets,
                    option: more.map(|more| more.option.clone()).unwrap_or_default(),
                    owner: more.and_then(|more| more.owner),
                    peer_is: more.and_then(|more| more.peer),
                });
            }
            let mut at_hand: Vec<FileId> =
                members.iter().filter(|m| m.role != Role::Outside).map(|m| m.id).collect();
            at_hand.extend(members.iter().flat_map(|m| &m.packets).flat_map(|p| &p.files));
            at_hand.sort_unstable();
            at_hand.dedup();
            let cluster = Arc::new(Cluster { members, at_hand });
            for (at, member) in cluster.members.iter().enumerate() {
                places.insert(member.id, (cluster.clone(), at));
            }
        }
        Ok(UnixWorld { places })
    }

    /// The socket with this file id.
    pub(super) fn member(&self, id: FileId) -> Result<super::restore::UnixFile> {
        let (cluster, at) = self
            .places
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::image("files.img: a unix socket entry without socket"))?;
        Ok(super::restore::UnixFile { cluster, at })
    }
}

/// What names a socket: a path, without the final NUL, or an abstract name and its network namespace.
type Known<'a> = (Option<u32>, &'a [u8]);

/// What names the socket with the name `name` to one that has got a message of it.
pub(super) fn known_as<'a>(name: &'a [u8], receiver: &pb::UnixSkEntry) -> Known<'a> {
    (receiver.ns_id.filter(|_| name.first() == Some(&0)), name)
}

/// What a socket is bound to.
pub(super) fn bound(entry: &pb::UnixSkEntry) -> Known<'_> {
    match entry.name.first() {
        Some(0) => known_as(&entry.name, entry),
        _ => (None, entry.name.split(|c| *c == 0).next().unwrap_or_default()),
    }
}

/// Refuses what no socket can be.
fn check(entry: &pb::UnixSkEntry) -> Result<()> {
    if ![STREAM, DGRAM, SEQPACKET].contains(&entry.r#type) {
        return Err(Error::image(format!("unix socket {} is of type {}", entry.ino, entry.r#type)));
    }
    if entry.name.len() > 108 {
        return Err(Error::image(format!("a unix socket's name of {} bytes", entry.name.len())));
    }
    if entry.deleted == Some(true) && entry.name.first().is_none_or(|c| *c == 0) {
        return Err(Error::image(format!("unix socket {} lost a name it never had", entry.ino)));
    }
    if entry.uflags & SERVICE != 0 {
        return Err(Error::unsupported(format!(
            "unix socket {} was connected with the service that dumped it",
            entry.ino
        ))
        .remedy("restore with CRIU"));
    }
    if entry.uflags & CALLBACK != 0 {
        return Err(Error::unsupported(format!("unix socket {} is restored by a plugin", entry.ino))
            .remedy("restore with CRIU and its plugins"));
    }
    Ok(())
}

fn role(entry: &pb::UnixSkEntry, mutual: Option<usize>, packets: &[Packet], given: bool) -> Role {
    if entry.uflags & OUTSIDE != 0 {
        return Role::Outside;
    }
    if given {
        return Role::Given;
    }
    if let Some(other) = mutual {
        return Role::Pair(other);
    }
    let dangling = entry.r#type != DGRAM && entry.state == ESTABLISHED && entry.peer == 0;
    if dangling || (!packets.is_empty() && entry.state != LISTEN) { Role::Helped } else { Role::Single }
}

/// Disjoint sets of numbers.
struct Union(Vec<usize>);

impl Union {
    fn new(n: usize) -> Self {
        Union((0..n).collect())
    }

    fn root(&mut self, mut at: usize) -> usize {
        while self.0[at] != at {
            self.0[at] = self.0[self.0[at]];
            at = self.0[at];
        }
        at
    }

    /// The lower root stays the root: clusters are ordered by their first members.
    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        self.0[a.max(b)] = a.min(b);
    }
}
