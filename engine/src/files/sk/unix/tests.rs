//! Round trips of unix sockets.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::{
    sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, connect, getsockname,
        listen, recv, send, sendto, socket, socketpair,
    },
    unistd::{read, write},
};

use crate::files::roundtrip::{FREE, Trip, at, get, pos_and_flags, same};

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap()
}

fn single(kind: SockType) -> OwnedFd {
    socket(AddressFamily::Unix, kind, SockFlag::empty(), None).unwrap()
}

fn receive(number: i32) -> Vec<u8> {
    let mut bytes = vec![0; 200_000];
    let n = recv(number, &mut bytes, MsgFlags::MSG_DONTWAIT).unwrap();
    bytes.truncate(n);
    bytes
}

#[test]
fn pairs_keep_messages_ends_and_flags() {
    Trip::new(
        concat!(module_path!(), "::pairs_keep_messages_ends_and_flags"),
        |_| {
            for (n, kind) in
                [SockType::Stream, SockType::Datagram, SockType::SeqPacket].into_iter().enumerate()
            {
                let base = FREE + 10 * n as i32;
                let (a, b) = pair(kind);
                send(a.as_raw_fd(), b"to b", MsgFlags::empty()).unwrap();
                send(a.as_raw_fd(), &[5; 100_000], MsgFlags::empty()).unwrap();
                send(b.as_raw_fd(), b"to a", MsgFlags::empty()).unwrap();
                crate::sys::fd::set_status_flags(a.as_fd(), libc::O_NONBLOCK).unwrap();
                at(a.try_clone().unwrap(), base + 2, true);
                at(a, base, false);
                at(b, base + 1, false);
            }
            let (a, b) = pair(SockType::Stream);
            nix::sys::socket::shutdown(a.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
            at(a, FREE + 30, false);
            at(b, FREE + 31, false);
            let (a, b) = pair(SockType::Stream);
            write(&b, b"gone").unwrap();
            drop(b);
            at(a, FREE + 32, false);
            at(single(SockType::Stream), FREE + 33, false);
            at(single(SockType::SeqPacket), FREE + 34, false);
        },
        |_| {
            for n in 0..3 {
                let base = FREE + 10 * n;
                assert!(same(base, base + 2) && !same(base, base + 1));
                assert_eq!(pos_and_flags(base).1, (libc::O_RDWR | libc::O_NONBLOCK) as u32);
                assert_eq!(pos_and_flags(base + 1).1, libc::O_RDWR as u32);
                let first = receive(base + 1);
                if n == 0 {
                    assert_eq!((first.len(), &first[..5]), (100_004, &b"to b\x05"[..]));
                } else {
                    assert_eq!(first, b"to b");
                    assert_eq!(receive(base + 1), [5; 100_000]);
                }
                assert_eq!(receive(base), b"to a");
                write(get(base), b"on").unwrap();
                assert_eq!(receive(base + 1), b"on");
            }
            assert_eq!(receive(FREE + 31), b"");
            write(get(FREE + 31), b"x").unwrap();
            assert_eq!(receive(FREE + 30), b"x");
            assert_eq!(receive(FREE + 32), b"gone");
            assert_eq!(receive(FREE + 32), b"");
        },
    )
    .run();
}

#[test]
fn names_listeners_and_datagram_peers_come_back() {
    Trip::new(
        concat!(module_path!(), "::names_listeners_and_datagram_peers_come_back"),
        |folder| {
            let listener = single(SockType::Stream);
            let path = UnixAddr::new(&folder.join("listener")).unwrap();
            bind(listener.as_raw_fd(), &path).unwrap();
            listen(&listener, Backlog::new(7).unwrap()).unwrap();
            let waiting = single(SockType::Stream);
            connect(waiting.as_raw_fd(), &path).unwrap();
            at(waiting, FREE, false);
            at(listener, FREE + 1, false);
            // A server that two talk to, one of them by connection, and what they said.
            let server = single(SockType::Datagram);
            let name = format!("rcriu-{}", folder.display());
            let name = UnixAddr::new_abstract(name.as_bytes()).unwrap();
            bind(server.as_raw_fd(), &name).unwrap();
            let client = single(SockType::Datagram);
            connect(client.as_raw_fd(), &name).unwrap();
            send(client.as_raw_fd(), b"one", MsgFlags::empty()).unwrap();
            send(client.as_raw_fd(), b"", MsgFlags::empty()).unwrap();
            let other = single(SockType::Datagram);
            sendto(other.as_raw_fd(), b"two", &name, MsgFlags::empty()).unwrap();
            at(client, FREE + 2, false);
            at(server, FREE + 3, false);
            // A name that is gone, with somebody connected.
            let lost = single(SockType::Datagram);
            std::fs::create_dir(folder.join("lost")).unwrap();
            let path = UnixAddr::new(&folder.join("lost/name")).unwrap();
            bind(lost.as_raw_fd(), &path).unwrap();
            connect(other.as_raw_fd(), &path).unwrap();
            std::fs::remove_dir_all(folder.join("lost")).unwrap();
            at(lost, FREE + 4, false);
            at(other, FREE + 5, false);
            // A relative name.
            std::env::set_current_dir(folder).unwrap();
            let relative = single(SockType::Datagram);
            bind(relative.as_raw_fd(), &UnixAddr::new("relative").unwrap()).unwrap();
            at(relative, FREE + 6, false);
        },
        |folder| {
            let late = single(SockType::Stream);
            let path = UnixAddr::new(&folder.join("listener")).unwrap();
            connect(late.as_raw_fd(), &path).unwrap();
            let first = accept(FREE + 1).unwrap();
            let first = crate::sys::fd::borrow(first).unwrap();
            write(first, b"hello").unwrap();
            assert_eq!(receive(FREE), b"hello");
            accept(FREE + 1).unwrap();
            assert_eq!(receive(FREE + 3), b"one");
            assert_eq!(receive(FREE + 3), b"");
            assert_eq!(receive(FREE + 3), b"two");
            write(get(FREE + 2), b"three").unwrap();
            assert_eq!(receive(FREE + 3), b"three");
            write(get(FREE + 5), b"four").unwrap();
            assert_eq!(receive(FREE + 4), b"four");
            assert!(!folder.join("lost").exists());
            let name: UnixAddr = getsockname(FREE + 4).unwrap();
            assert_eq!(name.path(), Some(folder.join("lost/name").as_path()));
            let name: UnixAddr = getsockname(FREE + 6).unwrap();
            assert_eq!(name.path(), Some(std::path::Path::new("relative")));
            assert!(folder.join("relative").exists());
        },
    )
    .run();
}

#[test]
fn files_in_messages_come_back() {
    use std::io::IoSlice;

    use nix::sys::socket::{ControlMessage, ControlMessageOwned, recvmsg, sendmsg};

    Trip::new(
        concat!(module_path!(), "::files_in_messages_come_back"),
        |_| {
            let (a, b) = pair(SockType::Stream);
            let (r, w) = nix::unistd::pipe().unwrap();
            // A pipe's end that is nowhere else, one that is, and the socket itself.
            let files = [r.as_raw_fd(), w.as_raw_fd(), b.as_raw_fd()];
            let bytes = [IoSlice::new(b"files")];
            let control = [ControlMessage::ScmRights(&files)];
            sendmsg::<()>(a.as_raw_fd(), &bytes, &control, MsgFlags::empty(), None).unwrap();
            at(a, FREE, false);
            at(b, FREE + 1, false);
            at(w, FREE + 2, false);
        },
        |_| {
            let mut bytes = [0; 20];
            let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
            let mut control = nix::cmsg_space!([i32; 8]);
            let message = recvmsg::<()>(FREE + 1, &mut parts, Some(&mut control), MsgFlags::empty()).unwrap();
            assert_eq!(message.bytes, 5);
            let Some(ControlMessageOwned::ScmRights(files)) = message.cmsgs().unwrap().next() else {
                panic!("no files")
            };
            assert!(same(files[1], FREE + 2) && same(files[2], FREE + 1));
            write(get(FREE + 2), b"through").unwrap();
            let mut bytes = [0; 20];
            assert_eq!(read(get(files[0]), &mut bytes).unwrap(), 7);
        },
    )
    .run();
}

#[test]
fn a_peer_that_nobody_has_is_refused() {
    let trip = Trip::new(
        concat!(module_path!(), "::a_peer_that_nobody_has_is_refused"),
        |_| {
            // Held by a child, which is not in the tree that is dumped and ends with this end.
            let (a, b) = pair(SockType::Stream);
            at(a, FREE, false);
            let stdin = std::process::Stdio::from(b);
            let mut child = std::process::Command::new("cat").stdin(stdin).spawn().unwrap();
            std::thread::spawn(move || child.wait());
        },
        |_| {},
    );
    if let Some(e) = trip.refusal() {
        assert!(e.contains("which no task of the tree has") && e.contains("--external unix["), "{e}");
    }
}
