//! Threads that sleep in all kinds of calls, none of which may end early or with EINTR.
//!
//! # Safety
//! Raw calls on locals of the layouts their man pages name, which outlive the calls.

use std::{
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use super::{check, errno, gettid, ready, verdict, wait};

/// Far beyond any test: a call that ends by its timeout was disturbed.
const LONG: libc::timespec = libc::timespec { tv_sec: 600, tv_nsec: 0 };

struct Sleepers {
    threads: Vec<JoinHandle<()>>,
    /// "tid:number of the system call", for the test to see that each has fallen asleep.
    said: Arc<Mutex<Vec<String>>>,
}

impl Sleepers {
    fn add(&mut self, nr: libc::c_long, name: &'static str, f: impl FnOnce() -> bool + Send + 'static) {
        let said = self.said.clone();
        self.threads.push(std::thread::spawn(move || {
            said.lock().unwrap().push(format!("{}:{nr}", gettid()));
            let ok = f();
            check(ok, &format!("{name} was disturbed: errno {}", errno()));
        }));
    }
}

pub fn all() {
    let mut s = Sleepers { threads: Vec::new(), said: Arc::default() };
    let pipe = || {
        let (r, w) = std::io::pipe().unwrap();
        (r, Some(w))
    };

    // SAFETY (for all raw calls below): arguments are locals of the layouts the calls want.
    s.add(libc::SYS_clock_nanosleep, "nanosleep", || {
        let time = libc::timespec { tv_sec: 1, tv_nsec: 500_000_000 };
        // SAFETY: see above.
        unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &time, std::ptr::null_mut()) == 0 }
    });
    s.add(libc::SYS_nanosleep, "nanosleep (old)", || {
        let time = libc::timespec { tv_sec: 1, tv_nsec: 0 };
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_nanosleep, &time, 0) == 0 }
    });

    let (r, mut poll_w) = pipe();
    s.add(libc::SYS_poll, "poll", move || {
        let mut p = libc::pollfd { fd: r.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_poll, &mut p, 1, 600_000) == 1 }
    });
    let (r, mut ppoll_w) = pipe();
    s.add(libc::SYS_ppoll, "ppoll", move || {
        let mut p = libc::pollfd { fd: r.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: see above.
        unsafe {
            let mut mask = std::mem::zeroed();
            libc::sigfillset(&mut mask);
            libc::ppoll(&mut p, 1, &LONG, &mask) == 1
        }
    });
    let (r, mut read_w) = pipe();
    s.add(libc::SYS_read, "read", move || {
        let mut b = [0u8; 1];
        // SAFETY: see above.
        unsafe { libc::read(r.as_raw_fd(), b.as_mut_ptr().cast(), 1) == 1 }
    });
    let (r, mut epoll_w) = pipe();
    s.add(libc::SYS_epoll_wait, "epoll_wait", move || {
        // SAFETY: see above.
        unsafe {
            let ep = libc::epoll_create1(0);
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };
            libc::epoll_ctl(ep, libc::EPOLL_CTL_ADD, r.as_raw_fd(), &mut event);
            libc::syscall(libc::SYS_epoll_wait, ep, &mut event, 1, 600_000) == 1
        }
    });
    let word = Arc::new(AtomicU32::new(0));
    let theirs = word.clone();
    s.add(libc::SYS_futex, "futex", move || {
        // SAFETY: see above.
        let woken =
            unsafe { libc::syscall(libc::SYS_futex, theirs.as_ptr(), libc::FUTEX_WAIT, 0, &LONG) == 0 };
        // The word may change before the call has been made again: then there is nothing to wait for.
        woken || (errno() == libc::EAGAIN && theirs.load(Ordering::Acquire) == 1)
    });
    let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
    near.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
    s.add(libc::SYS_recvfrom, "recv with a timeout", move || {
        let mut b = [0u8; 1];
        // SAFETY: see above.
        unsafe { libc::recv(near.as_raw_fd(), b.as_mut_ptr().cast(), 1, 0) == 1 }
    });
    let waiter = Arc::new(AtomicU32::new(0));
    let theirs = waiter.clone();
    s.add(libc::SYS_rt_sigtimedwait, "sigtimedwait", move || {
        // SAFETY: see above.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGUSR1);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            theirs.store(gettid() as u32, Ordering::Release);
            libc::sigtimedwait(&set, std::ptr::null_mut(), &LONG) == libc::SIGUSR1
        }
    });
    let (r, child_w) = pipe();
    s.add(libc::SYS_wait4, "wait4", move || {
        // SAFETY: the child only reads and exits.
        unsafe {
            let w = child_w.unwrap().as_raw_fd();
            let child = libc::fork();
            if child == 0 {
                libc::close(w);
                let mut b = [0u8; 1];
                libc::read(0, b.as_mut_ptr().cast(), 0);
                libc::read(r.as_raw_fd(), b.as_mut_ptr().cast(), 1);
                libc::usleep(1_500_000);
                libc::_exit(0);
            }
            libc::close(w);
            let mut status = 0;
            libc::syscall(libc::SYS_wait4, child, &mut status, 0, 0) == i64::from(child) && status == 0
        }
    });

    while s.said.lock().unwrap().len() < s.threads.len() || waiter.load(Ordering::Acquire) == 0 {
        std::thread::yield_now();
    }
    ready(&s.said.lock().unwrap().join(" "));
    wait();

    use std::io::Write;
    for w in [&mut poll_w, &mut ppoll_w, &mut read_w, &mut epoll_w] {
        w.as_mut().unwrap().write_all(b"x").unwrap();
    }
    far.send(b"x").unwrap();
    word.store(1, Ordering::Release);
    // SAFETY: the word is alive; the thread is not joined yet.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), waiter.load(Ordering::Acquire), libc::SIGUSR1);
    }
    for thread in s.threads {
        if thread.join().is_err() {
            verdict("a thread panicked");
        }
    }
}
