//! The RPC as container runtimes speak it, over a socket pair (swrk) and a listening socket (service).

mod tool;

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Stdio;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket};
use rcriu_images::pb::{CriuFeatures, CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType};
use rcriu_tests::rpc::{Client, Told, answer_notifications, request};
use tool::{Tool, is_root, sleeper};

#[test]
fn version_is_told_and_the_worker_ends_well() {
    let tool = Tool::new();
    let client = tool.swrk();
    // libcriu sends options with it, which do not matter.
    let odd = CriuOpts { images_dir_fd: 0, root: Some("/nonexistent".into()), ..CriuOpts::default() };
    let resp = client.ask(&CriuReq { opts: Some(odd), ..request(CriuReqType::Version) });
    assert!(resp.success);
    let version = resp.version.unwrap();
    assert_eq!((version.major_number, version.minor_number, version.gitid), (4, 2, None));
    assert_eq!(client.end(), 0);
}

#[test]
fn a_connection_can_be_kept_open_for_harmless_requests() {
    let tool = Tool::new();
    let client = tool.swrk();
    for _ in 0..3 {
        let resp = client.ask(&CriuReq { keep_open: Some(true), ..request(CriuReqType::Version) });
        assert!(resp.success);
    }
    assert!(client.ask(&request(CriuReqType::Version)).success);
    assert!(client.receive().is_none());
    assert_eq!(client.end(), 0);

    let client = tool.swrk();
    let resp = client.ask(&CriuReq { keep_open: Some(true), ..request(CriuReqType::Dump) });
    assert!(!resp.success && resp.cr_errmsg().contains("keep_open"));
    assert_eq!(client.end(), 1);
}

#[test]
fn features_are_answered_one_by_one() {
    let tool = Tool::new();
    let client = tool.swrk();
    let asked = CriuFeatures { pidfd_store: Some(true), ..CriuFeatures::default() };
    let resp = client.ask(&CriuReq { features: Some(asked), ..request(CriuReqType::FeatureCheck) });
    assert!(resp.success);
    let features = resp.features.unwrap();
    // What was not asked for is answered with no.
    assert_eq!((features.mem_track, features.lazy_pages), (Some(false), Some(false)));
    assert!(features.pidfd_store.is_some());
    assert_eq!(client.end(), 0);
}

#[test]
fn check_answers_like_the_command() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let client = tool.swrk();
    let resp = client.ask(&request(CriuReqType::Check));
    assert!(resp.success && resp.cr_errmsg.is_none(), "{resp:?}");
    assert_eq!(client.end(), 0);
}

#[test]
fn a_tree_is_dumped_and_restored_as_our_child_with_notifications() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let mut child = sleeper();
    let pid = child.id() as i32;
    let with = |kind, o: CriuOpts| CriuReq { opts: Some(o), ..request(kind) };
    let both = CriuOpts { notify_scripts: Some(true), log_level: Some(4), ..tool.opts() };

    // Somebody who says no: the tasks go on.
    let client = tool.swrk();
    let o = CriuOpts { pid: Some(pid), log_file: Some("no.log".into()), ..both.clone() };
    client.send(&with(CriuReqType::Dump, o));
    let first = client.receive().unwrap();
    assert_eq!(first.notify.unwrap().script(), "pre-dump");
    client.send(&CriuReq { notify_success: Some(false), ..request(CriuReqType::Notify) });
    let resp = client.receive().unwrap();
    assert!(!resp.success && resp.cr_errmsg().contains("pre-dump"), "{resp:?}");
    assert_eq!(client.end(), 1);
    assert!(child.try_wait().unwrap().is_none());

    let client = tool.swrk();
    let o = CriuOpts { pid: Some(pid), log_file: Some("dump.log".into()), ..both.clone() };
    client.send(&with(CriuReqType::Dump, o));
    let Told { names, resp, .. } = answer_notifications(&client);
    assert!(resp.success && resp.cr_errmsg.is_none(), "{resp:?}");
    assert_eq!(resp.dump.unwrap().restored, Some(false));
    assert_eq!(names, ["pre-dump", "query-ext-files", "post-dump"]);
    assert_eq!(client.end(), 0);
    assert!(!child.wait().unwrap().success(), "killed by the dump");
    let log = fs::read_to_string(tool.dir().join("dump.log")).unwrap();
    assert!(log.contains("Dumping finished successfully"), "{log}");

    let client = tool.swrk();
    let o = CriuOpts { rst_sibling: Some(true), log_file: Some("restore.log".into()), ..both };
    client.send(&with(CriuReqType::Restore, o));
    let Told { names, resp, .. } = answer_notifications(&client);
    assert!(resp.success && resp.cr_errmsg.is_none(), "{resp:?}");
    assert_eq!(resp.restore.unwrap().pid, pid);
    assert_eq!(names, ["pre-restore", "post-restore*", "pre-resume", "post-resume"]);
    assert_eq!(client.end(), 0);
    let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(cmdline, "sleep\x001000\0");
    // It is our child: only its parent can wait for it.
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(pid, None).unwrap();
}

#[test]
fn a_chain_of_pre_dumps_ends_in_a_dump() {
    let tool = Tool::new();
    let client = tool.swrk();
    let asked = CriuFeatures { mem_track: Some(true), ..CriuFeatures::default() };
    let resp = client.ask(&CriuReq { features: Some(asked), ..request(CriuReqType::FeatureCheck) });
    assert_eq!(client.end(), 0);
    if !is_root() || resp.features.unwrap().mem_track != Some(true) {
        println!("SKIP: needs root, and a kernel that tells which pages changed");
        return;
    }
    let mut child = sleeper();
    let folder = |n: i32| {
        let dir = tool.dir().join(n.to_string());
        fs::create_dir_all(&dir).unwrap();
        dir
    };
    let with = |kind, n: i32| {
        let opts = CriuOpts {
            pid: Some(child.id() as i32),
            images_dir: Some(folder(n).display().to_string()),
            parent_img: (n > 1).then(|| format!("../{}", n - 1)),
            track_mem: Some(true),
            log_level: Some(4),
            log_file: Some("log".into()),
            ..CriuOpts::default()
        };
        CriuReq { opts: Some(opts), ..request(kind) }
    };
    let client = tool.swrk();
    for n in [1, 2] {
        let resp = client.ask(&with(CriuReqType::PreDump, n));
        assert!(resp.success && resp.r#type() == CriuReqType::PreDump, "{resp:?}");
        let log = fs::read_to_string(folder(n).join("log")).unwrap();
        assert!(log.contains("Pre-dumping finished successfully"), "{log}");
    }
    let resp = client.ask(&with(CriuReqType::Dump, 3));
    assert!(resp.success, "{resp:?}");
    assert_eq!(client.end(), 0);
    assert!(!child.wait().unwrap().success(), "killed by the dump");
    let size = |n| fs::metadata(folder(n).join("pages-1.img")).unwrap().len();
    assert!(size(3) < size(1) / 2, "{} of {} bytes", size(3), size(1));
}

#[test]
fn a_refused_pre_dump_names_the_option_in_answer_and_log() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let client = tool.swrk();
    let opts = CriuOpts {
        pid: Some(std::process::id() as i32),
        lazy_pages: Some(true),
        tcp_close: Some(false),
        log_level: Some(4),
        log_file: Some("dump.log".into()),
        config_file: Some("/nonexistent/runc.conf".into()),
        ..tool.opts()
    };
    let resp = client.ask(&CriuReq { opts: Some(opts), ..request(CriuReqType::SinglePreDump) });
    assert!(!resp.success);
    assert_eq!(resp.r#type, i32::from(CriuReqType::SinglePreDump));
    assert!(resp.cr_errmsg().starts_with("Error (") && resp.cr_errmsg().contains("--lazy-pages"), "{resp:?}");
    assert_eq!(client.end(), 1);
    let log = fs::read_to_string(tool.dir().join("dump.log")).unwrap();
    assert!(log.contains("--lazy-pages") && log.contains("Pre-dumping FAILED."), "{log}");
}

#[test]
fn folders_are_the_clients_descriptors() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let (images, work) = (tool.dir().join("images"), tool.dir().join("work"));
    fs::create_dir(&images).unwrap();
    fs::create_dir(&work).unwrap();
    let (images_fd, work_fd) = (fs::File::open(&images).unwrap(), fs::File::open(&work).unwrap());
    let client = tool.swrk();
    let opts = CriuOpts {
        images_dir_fd: images_fd.as_raw_fd(),
        work_dir_fd: Some(work_fd.as_raw_fd()),
        log_file: Some("restore.log".into()),
        ..CriuOpts::default()
    };
    let resp = client.ask(&CriuReq { opts: Some(opts), ..request(CriuReqType::Restore) });
    assert!(!resp.success, "there are no images");
    assert!(work.join("restore.log").exists());
    assert_eq!(client.end(), 1);
}

#[test]
fn requests_that_make_no_sense_are_answered() {
    let tool = Tool::new();
    for (req, word) in [
        (request(CriuReqType::Notify), "makes no sense"),
        (CriuReq { r#type: 77, ..CriuReq::default() }, "77"),
        (request(CriuReqType::Dump), "folder"),
        (
            CriuReq {
                opts: Some(CriuOpts { log_file: Some("a/b".into()), ..tool.opts() }),
                ..request(CriuReqType::Dump)
            },
            "a/b",
        ),
    ] {
        let client = tool.swrk();
        let resp = client.ask(&req);
        assert!(!resp.success && resp.cr_errmsg().contains(word), "{resp:?}");
        assert_eq!(client.end(), 1);
    }
}

#[test]
fn a_client_that_says_nothing_or_nonsense_ends_the_worker() {
    let tool = Tool::new();
    assert_eq!(tool.swrk().end(), 1);
    let client = tool.swrk();
    send(client.socket.as_raw_fd(), &[0xff; 64], MsgFlags::empty()).unwrap();
    assert!(client.receive().is_none());
    assert_eq!(client.end(), 1);
}

#[test]
fn the_service_serves_several_clients_and_ends_on_sigterm() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let path = tool.dir().join("socket");
    let (mut ready, ready_fd) = std::io::pipe().unwrap();
    let mut command =
        tool.command(&["service", "--address", "socket", "--pidfile", "pid", "--status-fd", "0"]);
    let mut service = command.stdin(Stdio::from(OwnedFd::from(ready_fd))).spawn().unwrap();
    drop(command);
    // It writes its byte when the socket is there.
    ready.read_exact(&mut [0]).unwrap();
    assert_eq!(fs::read_to_string(tool.dir().join("pid")).unwrap(), service.id().to_string());
    let clients: Vec<Client> = (0..3)
        .map(|_| {
            let sk = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
            connect(sk.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
            Client { socket: sk, child: None }
        })
        .collect();
    for client in &clients {
        assert!(client.ask(&request(CriuReqType::Version)).success);
        assert!(client.receive().is_none());
    }
    let sk = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(sk.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    let stranger = Client { socket: sk, child: None };
    let opts = CriuOpts { rst_sibling: Some(true), ..tool.opts() };
    let resp = stranger.ask(&CriuReq { opts: Some(opts), ..request(CriuReqType::Restore) });
    assert!(!resp.success && resp.cr_errmsg().contains("rst_sibling"), "{resp:?}");

    let pid = nix::unistd::Pid::from_raw(service.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(service.wait().unwrap().success());
    assert!(!path.exists());
}

#[test]
fn a_page_server_is_started_and_waited_for() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let (tool, pages) = (Tool::new(), Tool::new());
    let client = pages.swrk();
    let ps = CriuPageServerInfo { address: Some("127.0.0.1".into()), ..CriuPageServerInfo::default() };
    let o = CriuOpts { ps: Some(ps), log_level: Some(4), log_file: Some("ps.log".into()), ..pages.opts() };
    let resp =
        client.ask(&CriuReq { opts: Some(o), keep_open: Some(true), ..request(CriuReqType::PageServerChld) });
    assert!(resp.success, "{resp:?}");
    let ps = resp.ps.unwrap();
    let mut target = sleeper();
    let (pid, port) = (target.id().to_string(), ps.port().to_string());
    let dumped = tool.run(&[
        "dump",
        "-t",
        &pid,
        "-D",
        ".",
        "--page-server",
        "--address",
        "127.0.0.1",
        "--port",
        &port,
    ]);
    assert_eq!(dumped.code, 0, "{}", dumped.stderr);
    target.wait().unwrap();
    let resp = client.ask(&CriuReq { pid: Some(ps.pid() as u32), ..request(CriuReqType::WaitPid) });
    assert!(resp.success && resp.status() == 0, "{resp:?}");
    assert_eq!(client.end(), 0);
    let names: Vec<_> = fs::read_dir(pages.dir()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(names.iter().any(|n| n.to_string_lossy().starts_with("pages-")), "{names:?}");
}
