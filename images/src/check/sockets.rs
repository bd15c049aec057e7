//! Sockets, their peers and queues.

use std::collections::HashSet;

use super::Check;
use crate::{catalog::ImageKind, pb};

/// `unix_sk_entry.uflags`: the peer is outside of the dump, or the socket is handed over.
const PEER_ELSEWHERE: u32 = 1 | 2 | 4 | 8;

impl Check<'_> {
    pub(super) fn sockets(&mut self) {
        let unix: HashSet<u32> =
            self.set.files.values().filter_map(|f| f.usk.as_ref()).map(|sk| sk.ino).collect();
        let tcp_close = self.set.inventory.as_ref().is_some_and(|i| i.tcp_close());
        for file in self.set.sorted_files() {
            if let Some(sk) = &file.usk
                && sk.peer != 0
                && sk.uflags & PEER_ELSEWHERE == 0
                && !unix.contains(&sk.peer)
            {
                let text = format!("peer {} of unix socket {} is not in the set", sk.peer, sk.ino);
                self.error(ImageKind::Files, 0, text);
            }
            if let Some(sk) = &file.isk
                && sk.proto == 6
                && sk.dst_port != 0
                && !tcp_close
            {
                let what = format!("state of TCP connection {}", sk.ino);
                self.expect((ImageKind::Files, 0), (ImageKind::TcpStream, sk.ino.into()), &what);
            }
        }
        self.queues();
    }

    fn queues(&mut self) {
        let ids: HashSet<u32> = self.set.files.keys().map(|(_, id)| *id).collect();
        let Some(Some(mut reader)) = self.note(self.set.dir.reader(ImageKind::SkQueues, 0)) else { return };
        // Damage was found when all contents were read.
        while let Ok(Some(packet)) = reader.next::<pb::SkPacketEntry>() {
            if !ids.contains(&packet.id_for) {
                let text = format!("data for socket {:#x}, which is not in the set", packet.id_for);
                self.error(ImageKind::SkQueues, 0, text);
            }
            for right in packet.scm.iter().flat_map(|scm| &scm.rights) {
                if !ids.contains(right) {
                    let text = format!(
                        "file {right:#x}, on its way to socket {:#x}, is not in the set",
                        packet.id_for
                    );
                    self.error(ImageKind::SkQueues, 0, text);
                }
            }
            if reader.skip(packet.length.into()).is_err() {
                break;
            }
        }
    }
}
