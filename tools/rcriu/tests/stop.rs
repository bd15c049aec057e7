//! A dump that is stopped from outside leaves its target as it was.

mod tool;

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tool::{Tool, is_root, sleeper};

/// Neither stopped nor traced.
fn runs(child: &Child) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let stopped = status.contains("State:\tT") || status.contains("State:\tt");
    !stopped && status.contains("TracerPid:\t0\n")
}

/// Whether a signal is ignored here, and so by what is started from here, which keeps it that way (as nohup wants).
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    u64::from_str_radix(mask, 16).unwrap() & 1 << (signal as i32 - 1) != 0
}

/// Numbers and targets of a process' descriptors.
fn descriptors(pid: u32) -> Vec<(String, String)> {
    let list = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let target = |e: &fs::DirEntry| fs::read_link(e.path()).unwrap().display().to_string();
    let mut all: Vec<_> = list.map(|e| (e.file_name().into_string().unwrap(), target(&e))).collect();
    // A pipe is another one after the restore.
    all.iter_mut().filter(|(_, t)| t.starts_with("pipe:")).for_each(|(_, t)| t.truncate(5));
    all.sort();
    all
}

/// A dump whose post-dump script says so on its standard input and then waits for long.
fn blocked_dump(tool: &Tool, target: &Child, more: &[&str]) -> Child {
    let script = tool.dir().join("script");
    fs::write(
        &script,
        "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-dump ] && : > reached && exec sleep 1000\ntrue\n",
    )
    .unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(&script, mode).unwrap();
    nix::unistd::mkfifo(&tool.dir().join("reached"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let pid = target.id().to_string();
    let mut args = vec!["dump", "-t", &pid, "--action-script", script.to_str().unwrap(), "-o", "dump.log"];
    args.extend(more);
    let mut command = tool.command(&args);
    let dump = command.stderr(Stdio::piped()).spawn().unwrap();
    // Opening for reading waits until the script opens for writing.
    fs::File::open(tool.dir().join("reached")).unwrap().read_to_end(&mut Vec::new()).unwrap();
    dump
}

fn stderr_of(mut child: Child) -> (i32, String) {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code().unwrap(), text)
}

#[test]
fn a_signal_during_a_dump_leaves_the_target_running() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        if is_ignored(signal) {
            println!("SKIP: {signal} is ignored by whoever started this");
            continue;
        }
        let tool = Tool::new();
        let mut target = sleeper();
        let dump = blocked_dump(&tool, &target, &[]);
        kill(Pid::from_raw(dump.id() as i32), signal).unwrap();
        let (code, text) = stderr_of(dump);
        assert_eq!(code, 1);
        assert!(text.contains(&format!("signal {}", signal as i32)), "{text}");
        assert!(runs(&target));
        let log = fs::read_to_string(tool.dir().join("dump.log")).unwrap();
        assert!(log.contains("Dumping FAILED."), "{log}");
        target.kill().unwrap();
        target.wait().unwrap();
    }
}

#[test]
fn the_timeout_covers_scripts_too() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let mut target = sleeper();
    let dump = blocked_dump(&tool, &target, &["--timeout", "1"]);
    let (code, text) = stderr_of(dump);
    assert_eq!(code, 1);
    assert!(text.contains("--timeout"), "{text}");
    assert!(runs(&target));
    target.kill().unwrap();
    target.wait().unwrap();
}

#[test]
fn descriptors_of_the_caller_reach_neither_scripts_nor_restored_tasks() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let mut target = sleeper();
    let pid = target.id();
    // What runs the tests may have left some open too.
    let before = descriptors(pid);
    let script = tool.dir().join("script");
    fs::write(&script, "#!/bin/sh\nls -l /proc/self/fd\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    // The shell leaves descriptor 7 open for the program, as container managers do.
    let out = tool.shell(&format!(
        "exec 7</etc/hostname; \"$TOOL\" dump -t {pid} -D . -v4 -o dump.log --action-script {}",
        script.display()
    ));
    assert_eq!(out.code, 0, "{}", out.stderr);
    target.wait().unwrap();
    let log = fs::read_to_string(tool.dir().join("dump.log")).unwrap();
    assert!(log.contains("/proc/") && !log.contains("hostname"), "{log}");

    let out = tool.shell("exec 7</etc/hostname; \"$TOOL\" restore -d -D . -v4 -o restore.log");
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(descriptors(pid), before);
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn exec_cmd_becomes_the_parent_and_gets_the_callers_descriptors_back() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let mut target = sleeper();
    let pid = target.id();
    assert_eq!(tool.run(&["dump", "-t", &pid.to_string(), "-D", "."]).code, 0);
    target.wait().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = tool.command(&[
        "restore",
        "--exec-cmd",
        "-D",
        ".",
        "--",
        "/bin/sh",
        "-c",
        &format!("ps -o ppid= -p {pid}; echo $$; kill -9 {pid}"),
    ]);
    command.stdout(Stdio::from(OwnedFd::from(writer)));
    let status = command.status().unwrap();
    drop(command);
    assert!(status.success());
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let numbers: Vec<_> = text.split_whitespace().collect();
    assert_eq!(numbers.len(), 2, "{text}");
    assert_eq!(numbers[0], numbers[1], "the shell is the parent");
}

#[test]
fn each_restored_task_can_have_a_log_of_its_own() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let mut target = sleeper();
    let pid = target.id();
    let before = descriptors(pid);
    assert_eq!(tool.run(&["dump", "-t", &pid.to_string(), "-D", "."]).code, 0);
    target.wait().unwrap();
    let out = tool.run(&["restore", "-d", "-D", ".", "-v4", "-o", "restore.log", "--log-pid"]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(descriptors(pid), before);
    let own = fs::read_to_string(tool.dir().join(format!("restore.log.{pid}"))).unwrap();
    assert!(own.contains("Jumps into the restorer"), "up to the end: {own}");
    // No pid in front: the file is the task's.
    assert!(!own.contains(&format!("{pid:6}: ")), "{own}");
    let shared = fs::read_to_string(tool.dir().join("restore.log")).unwrap();
    assert!(shared.contains("Restore finished successfully. Tasks resumed."), "{shared}");
    assert!(!shared.contains("Jumps into the restorer"), "{shared}");
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}
