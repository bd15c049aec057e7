//! What goes over a connection, and in how many messages: sockets that keep them apart show it.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send as send_message, socketpair},
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
};
use rcriu_images::pagemap::PAGE_SIZE;

use super::{Command, Conn, MESSAGE_LEN, Message, Pages, send, tls::Role};
use crate::{error::Result, options::Tls};

const PAGE: usize = PAGE_SIZE as usize;

/// A connection, and its other end; messages stay apart.
fn pair() -> (Conn, OwnedFd) {
    let (near, far) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (Conn::new(near, true, Role::Server, &Tls::default()).unwrap(), far)
}

/// The next message at the other end, if there is one.
fn message(far: &OwnedFd) -> Option<Vec<u8>> {
    let mut buf = vec![0; 1 << 20];
    match recv(far.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
        Ok(n) => Some(buf[..n].to_vec()),
        Err(Errno::EAGAIN) => None,
        Err(e) => panic!("recv: {e}"),
    }
}

fn tell(far: &OwnedFd, bytes: &[u8]) {
    assert_eq!(send_message(far.as_raw_fd(), bytes, MsgFlags::empty()).unwrap(), bytes.len());
}

/// Every byte of a page has the page's number.
struct Numbered;

impl Pages for Numbered {
    fn read(&mut self, _: u64, at: u64, buf: &mut [u8]) -> Result<u64> {
        for (n, page) in buf.chunks_mut(PAGE).enumerate() {
            page.fill((at / PAGE_SIZE) as u8 + n as u8);
        }
        Ok(buf.len() as u64)
    }
}

fn get(page: u64, pages: u64) -> [u8; MESSAGE_LEN] {
    Message { command: Command::Get, pages, vaddr: page * PAGE_SIZE, object: 7 }.encode()
}

/// The answer to [`get`].
fn answer(page: u64, pages: u64) -> Vec<u8> {
    let command = Command::Add { flags: rcriu_images::pagemap::PE_PRESENT };
    let header = Message { command, pages, vaddr: page * PAGE_SIZE, object: 7 }.encode();
    let bytes = (0..pages).flat_map(|n| [(page + n) as u8; PAGE]);
    header.into_iter().chain(bytes).collect()
}

#[test]
fn a_command_and_its_pages_are_one_message() {
    let (mut conn, far) = pair();
    for pages in [1, 16] {
        let header = get(1, pages);
        conn.queue(&header).unwrap();
        conn.send(&vec![5; pages as usize * PAGE]).unwrap();
        let got = message(&far).unwrap();
        assert_eq!((got.len(), &got[..MESSAGE_LEN]), (MESSAGE_LEN + pages as usize * PAGE, &header[..]));
        assert_eq!(message(&far), None);
    }
}

#[test]
fn what_is_small_waits_for_what_follows() {
    let (mut conn, far) = pair();
    conn.queue(b"one").unwrap();
    conn.queue(b"two").unwrap();
    assert_eq!(message(&far), None);
    conn.flush().unwrap();
    assert_eq!(message(&far).unwrap(), b"onetwo");
    conn.queue(b"asks").unwrap();
    tell(&far, b"answer");
    let mut buf = [0; 6];
    assert!(conn.receive(&mut buf).unwrap());
    assert_eq!((&buf, message(&far).unwrap()), (b"answer", b"asks".to_vec()));
}

#[test]
fn what_came_together_is_taken_apart() {
    let (mut conn, far) = pair();
    let all: Vec<u8> = (0..=255).cycle().take(40_000).collect();
    tell(&far, &all[..30_000]);
    tell(&far, &all[30_000..]);
    let mut got = Vec::new();
    for len in [1, 31, 5000, 20_000, 100, 14_868] {
        let mut buf = vec![0; len];
        assert!(conn.receive(&mut buf).unwrap());
        got.extend(buf);
    }
    assert!(got == all && !conn.holds_data());
    drop(far);
    assert!(!conn.receive(&mut [0]).unwrap());
}

#[test]
fn requests_that_are_here_are_answered_together() {
    let (conn, far) = pair();
    tell(&far, &[get(1, 1), get(9, 2), get(3, 1)].concat());
    tell(&far, &Message::about(Command::ForceClose, 0).encode());
    assert_eq!(send(conn, &mut Numbered).unwrap(), 4);
    assert_eq!(message(&far).unwrap(), [answer(1, 1), answer(9, 2), answer(3, 1)].concat());
    assert_eq!(message(&far).unwrap(), [0; 4]);
}

#[test]
fn nobody_waits_for_the_next_request() {
    let (conn, far) = pair();
    let server = thread::spawn(move || send(conn, &mut Numbered));
    for page in [4, 2] {
        tell(&far, &get(page, 1));
        let mut buf = vec![0; 2 * PAGE];
        let n = recv(far.as_raw_fd(), &mut buf, MsgFlags::empty()).unwrap();
        assert!(buf[..n] == answer(page, 1));
    }
    tell(&far, &Message::about(Command::ForceClose, 0).encode());
    assert_eq!(server.join().unwrap().unwrap(), 2);
}

/// What is received ahead has a buffer that is much longer than a command: whoever fills it anew for each spends a
/// hundred times as long on that as on the command.
#[test]
fn a_command_costs_about_what_the_socket_does() {
    const TURNS: usize = 10_000;
    let cpu = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    let (mut conn, far) = pair();
    let mut buf = [0; MESSAGE_LEN];
    let took = |since: TimeSpec| Duration::from(cpu() - since);
    let begun = cpu();
    for _ in 0..TURNS {
        conn.send(&buf).unwrap();
        recv(far.as_raw_fd(), &mut buf, MsgFlags::empty()).unwrap();
    }
    let plain = took(begun);
    let begun = cpu();
    for _ in 0..TURNS {
        tell(&far, &buf);
        assert!(conn.receive(&mut buf).unwrap());
    }
    let received = took(begun);
    assert!(received < 10 * plain, "{TURNS} commands: {received:?}, sent: {plain:?}");
}

/// A CRIU that gives pages confirms the end only when it sees that we have ended, or after a fifth of a second.
#[test]
fn the_end_of_ours_is_seen_before_it_is_confirmed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let peer = thread::spawn(move || {
        let mut all = Vec::new();
        far.read_to_end(&mut all).unwrap();
        far.write_all(&[0; 4]).unwrap();
        all
    });
    let conn = Conn::new(near.into(), false, Role::Client { name: None }, &Tls::default()).unwrap();
    conn.conclude().unwrap();
    assert_eq!(peer.join().unwrap(), Message::about(Command::Close, 0).encode());
}
