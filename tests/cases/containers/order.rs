//! The order of all stages that scripts and clients hear of, and in which world scripts run.

use std::fs::{self, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sched::CloneFlags;
use rcriu_images::pb::{CriuOpts, CriuReqType};
use rcriu_tests::cycle::unchanged;
use rcriu_tests::program::wait_gone;
use rcriu_tests::rpc::{Client, answer_notifications, with};
use rcriu_tests::{Case, Cycle, Engine, Home, Images, Program, Scratch};

use crate::entered;
use crate::pages::{Server, free_port};

/// A script that writes down when it was called, with the pid it was told and the namespaces it is in.
struct Script {
    scratch: Scratch,
    of_criu: bool,
}

/// Namespaces that a script must share with whoever dumps or restores.
const NAMESPACES: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];

impl Script {
    /// One that fails at stage `failing`.
    fn new(failing: &str) -> Result<Script> {
        let script = Script { scratch: Scratch::new()?, of_criu: false };
        let links: Vec<String> = NAMESPACES.iter().map(|name| format!("/proc/self/ns/{name}")).collect();
        let text = format!(
            "#!/bin/sh\n\
             echo $CRTOOLS_SCRIPT_ACTION ${{CRTOOLS_INIT_PID-none}} $(readlink -f $CRTOOLS_IMAGE_DIR) \
             $(readlink {}) >> {}\n\
             test $CRTOOLS_SCRIPT_ACTION != {failing}\n",
            links.join(" "),
            script.heard().display(),
        );
        fs::write(script.path(), text)?;
        fs::set_permissions(script.path(), Permissions::from_mode(0o700))?;
        Ok(script)
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("script")
    }

    fn heard(&self) -> PathBuf {
        self.scratch.path().join("heard")
    }

    fn option(&self) -> [String; 2] {
        ["--action-script".into(), self.path().display().to_string()]
    }

    /// Stages it was called at since this was last asked, each with whether it knew the pid, after checking everything
    /// else that it was told.
    fn stages(&self, images: &Path, root: i32) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.heard()).unwrap_or_default();
        let _ = fs::remove_file(self.heard());
        let ours = NAMESPACES.map(|name| fs::read_link(format!("/proc/self/ns/{name}")));
        let ours =
            ours.into_iter().map(|link| Ok(link?.display().to_string())).collect::<Result<Vec<_>>>()?;
        let stage = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let (stage, pid) = (words[0], words.get(1).copied().unwrap_or_default());
            // In the end, CRIU has left the folder.
            let left = self.of_criu && stage == "post-resume";
            let folder = words.get(2).map(Path::new);
            ensure!(left || folder == Some(images), "{stage}: images are in {folder:?}");
            ensure!(words[3..] == ours[..], "{stage}: the script is in {:?}, not in {ours:?}", &words[3..]);
            match pid {
                "none" => Ok(stage.to_owned()),
                pid if pid == root.to_string() => Ok(format!("{stage}*")),
                pid => anyhow::bail!("{stage}: the pid is {pid}, not {root}"),
            }
        };
        text.lines().map(stage).collect()
    }
}

/// Stages of a tree in namespaces of its own, and of one in ours; a star where scripts know the pid.
const DUMP: [&[&str]; 2] = [&["pre-dump*", "network-lock*", "post-dump*"], &["pre-dump*", "post-dump*"]];
const RESTORE: [&[&str]; 2] = [
    &[
        "pre-restore",
        "setup-namespaces*",
        "post-setup-namespaces*",
        "post-restore*",
        "network-unlock*",
        "pre-resume*",
        "post-resume*",
    ],
    &["pre-restore", "post-restore*", "pre-resume*", "post-resume*"],
];

fn start(inside: bool) -> Result<Program> {
    match inside {
        true => Program::start_inside(Home::new(), "sleeper", &[]),
        false => Program::start("sleeper", &[]),
    }
}

/// Of servers, scripts hear when they can be asked.
fn server(engine: &Engine, command: &str) -> Result<()> {
    let script = Script { of_criu: engine.is_criu(), ..Script::new("none")? };
    let (program, images) = (start(false)?, Images::new()?);
    let folder = fs::canonicalize(images.path())?;
    if command == "lazy-pages" {
        Cycle::between(engine.clone(), engine.clone()).dump(&program, &images)?;
    }
    let (option, port) = (script.option(), free_port()?);
    let mut args: Vec<&str> = option.iter().map(String::as_str).collect();
    if command == "page-server" {
        args.extend(["--address", "127.0.0.1", "--port", &port]);
    }
    let _server = Server::start(engine, command, &images, &args)?;
    let stages = script.stages(&folder, 0)?;
    ensure!(stages == ["status-ready"], "{stages:?}");
    Ok(())
}

/// A tree that had no namespaces of its own and joins one.
fn joined(engine: Engine) -> Result<()> {
    let script = Script { of_criu: engine.is_criu(), ..Script::new("none")? };
    let (program, images) = (start(false)?, Images::new()?);
    let folder = fs::canonicalize(images.path())?;
    let cycle = Cycle::between(engine.clone(), engine);
    cycle.dump(&program, &images)?;
    let namespace = entered::fresh(CloneFlags::CLONE_NEWUTS, "uts")?;
    let join = format!("uts:/proc/self/fd/{}", namespace.as_raw_fd());
    let option = script.option();
    let args: Vec<&str> = option.iter().map(String::as_str).chain(["--join-ns", &join]).collect();
    cycle.try_restore(&images, &args)?.ok()?;
    let stages = script.stages(&folder, program.pid())?;
    ensure!(stages == RESTORE[1], "{stages:?}");
    program.verify()
}

/// Scripts of the command line.
fn scripts(engine: Engine, inside: bool) -> Result<()> {
    let script = Script { of_criu: engine.is_criu(), ..Script::new("none")? };
    let (program, images) = (start(inside)?, Images::new()?);
    let folder = fs::canonicalize(images.path())?;
    let which = usize::from(!inside);
    let option = script.option();
    let cycle = Cycle::between(engine.clone(), engine).at_home(&program);
    let cycle = cycle.with(&option.each_ref().map(String::as_str));

    cycle.try_dump(program.pid(), &images, &["--leave-running"])?.ok()?;
    let mut expected = DUMP[which].to_vec();
    if inside {
        expected.push("network-unlock*");
    }
    let heard = script.stages(&folder, program.pid())?;
    ensure!(heard == expected, "left running: {heard:?}");

    let (again, dumped) = (Images::new()?, program.pid());
    let folder = fs::canonicalize(again.path())?;
    cycle.dump(&program, &again)?;
    let heard = script.stages(&folder, dumped)?;
    ensure!(heard == DUMP[which], "dump: {heard:?}");
    cycle.bring_back(&program, &again, &[])?;
    let heard = script.stages(&folder, program.pid())?;
    ensure!(heard == RESTORE[which], "restore: {heard:?}");
    program.verify()
}

/// A pre-dump asks nobody.
fn pre_dump() -> Result<()> {
    let (program, script, images) = (start(true)?, Script::new("none")?, Images::new()?);
    let (pid, option) = (program.pid().to_string(), script.option());
    let mut args = vec!["pre-dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "log"];
    args.extend(option.iter().map(String::as_str));
    Engine::rcriu()?.run(&args)?.ok()?;
    let heard = script.stages(&fs::canonicalize(images.path())?, program.pid())?;
    ensure!(heard.is_empty(), "told: {heard:?}");
    program.verify()
}

/// Whoever fails to lock is asked to unlock, and the tree goes on.
fn lock_fails() -> Result<()> {
    let (program, script, images) = (start(true)?, Script::new("network-lock")?, Images::new()?);
    let option = script.option();
    let cycle = Cycle::new()?.at_home(&program).with(&option.each_ref().map(String::as_str));
    let before = program.state()?;
    cycle.try_dump(program.pid(), &images, &[])?.refused()?.says(&["network-lock", "script"])?;
    let heard = script.stages(&fs::canonicalize(images.path())?, program.pid())?;
    ensure!(heard == ["pre-dump*", "network-lock*", "network-unlock*"], "told: {heard:?}");
    unchanged(&before, || program.state())?;
    program.verify()
}

/// A client of the RPC is also asked for what is outside.
fn client(inside: bool) -> Result<()> {
    let (program, images) = (start(inside)?, Images::new()?);
    let opts = CriuOpts {
        images_dir: Some(images.as_str()?.into()),
        notify_scripts: Some(true),
        log_level: Some(4),
        log_file: Some("log".into()),
        root: program.root().map(|root| root.display().to_string()),
        ..CriuOpts::default()
    };
    let told = |kind, opts: CriuOpts| {
        let client = Client::swrk(Engine::rcriu()?.command(&[]));
        client.send(&with(kind, opts));
        let told = answer_notifications(&client);
        ensure!(told.resp.success, "{:?}", told.resp);
        ensure!(client.end() == 0, "the worker fails");
        Ok(told)
    };
    let tree = program.tree()?;
    let names = told(CriuReqType::Dump, CriuOpts { pid: Some(program.pid()), ..opts.clone() })?.names;
    wait_gone(&tree)?;
    let lock = inside.then_some("network-lock");
    let expected: Vec<&str> =
        ["pre-dump"].into_iter().chain(lock).chain(["query-ext-files", "post-dump"]).collect();
    ensure!(names == expected, "dump: {names:?}");
    let told = told(CriuReqType::Restore, CriuOpts { rst_sibling: Some(true), ..opts })?;
    // The pid is only sent where clients take it for that of their child.
    let pid = ["setup-namespaces*", "post-restore*"];
    let expected: Vec<&str> = RESTORE[usize::from(!inside)]
        .iter()
        .map(|stage| if pid.contains(stage) { stage } else { stage.trim_end_matches('*') })
        .collect();
    ensure!(told.names == expected, "restore: {:?}", told.names);
    program.moved(told.resp.restore.context("no answer")?.pid);
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (inside, of) in [(true, "in namespaces of its own"), (false, "in ours")] {
        let name = move |who: &str| format!("{who} are called in order, for a tree {of}");
        cases.push(Case::new(format!("containers: {}", name("scripts")), move || {
            scripts(Engine::rcriu()?, inside)
        }));
        cases.push(Case::new(format!("interop: containers: CRIU's {}", name("scripts")), move || {
            scripts(Engine::criu()?, inside)
        }));
        cases.push(Case::new(format!("containers: {}", name("clients")), move || client(inside)));
    }
    for command in ["page-server", "lazy-pages"] {
        let name = format!("containers: scripts hear when {command} can be asked");
        cases.push(Case::new(format!("interop: with CRIU, {name}"), move || {
            server(&Engine::criu()?, command)
        }));
        cases.push(Case::new(name, move || server(&Engine::rcriu()?, command)));
    }
    let name = "containers: scripts do not hear of a namespace that is only joined";
    cases.push(Case::new(format!("interop: with CRIU, {name}"), || joined(Engine::criu()?)));
    cases.push(Case::new(name, || joined(Engine::rcriu()?)));
    cases.push(Case::new("containers: a pre-dump calls no scripts", pre_dump));
    cases.push(Case::new(
        "containers: a script that cannot lock the network is asked to unlock it",
        lock_fails,
    ));
    cases
}
