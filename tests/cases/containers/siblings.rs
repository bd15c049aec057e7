//! Restores of a sibling, which only its parent can reap, that fail.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcriu_engine::faults::FAULT;
use rcriu_images::pb::{CriuOpts, CriuReq, CriuReqType};
use rcriu_tests::rpc::{Client, Told, answer_each, answer_notifications, with};
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

use crate::failures::nothing_left;

/// What a failed restore may take, however slow the machine: far less than the patience with tasks that do not end.
const AT_ONCE: Duration = Duration::from_secs(8);

/// Asks for a restore that fails at `point`: in the worker, or where the client says no.
pub fn fails(request: &CriuReq, point: &str) -> Result<()> {
    let mut command = Engine::rcriu()?.command(&[]);
    command.env(FAULT, point).stdout(Stdio::piped()).stderr(Stdio::piped());
    let client = Client::swrk(command);
    let begun = Instant::now();
    client.send(request);
    let Told { resp, .. } = answer_each(&client, |stage| stage != point);
    ensure!(!resp.success, "it succeeded");
    let first = resp.cr_errmsg().lines().next().context("no reason")?;
    ensure!(first.starts_with("Error (") && first.contains(point), "the reason given: {first}");
    ensure!(client.end() == 1, "the worker ends as if all were well");
    ensure!(begun.elapsed() < AT_ONCE, "it took {:?}", begun.elapsed());
    nothing_left("the failed restore")
}

/// A tree in our own namespaces, whose children go to whoever reaps for us when their root dies.
fn failing(point: &'static str) -> Result<()> {
    let (program, images) = (Program::start("tree", &["2", "3"])?, Images::new()?);
    Cycle::new()?.dump(&program, &images)?;
    let opts = CriuOpts {
        images_dir: Some(images.as_str()?.into()),
        rst_sibling: Some(true),
        notify_scripts: Some(true),
        log_level: Some(4),
        log_file: Some("restore.log".into()),
        ..CriuOpts::default()
    };
    fails(&with(CriuReqType::Restore, opts.clone()), point)?;
    let client = Client::swrk(Engine::rcriu()?.command(&[]));
    client.send(&with(CriuReqType::Restore, opts));
    let Told { resp, .. } = answer_notifications(&client);
    ensure!(resp.success, "{resp:?}");
    ensure!(client.end() == 0, "the worker fails");
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let points = ["restore-task-born", "restore-forked", "restore-rebuilt", "restore-caught", "post-restore"];
    let case = |point| {
        Case::new(
            format!("containers: an error at {point} in a restore of a sibling is told at once"),
            move || failing(point),
        )
    };
    points.map(case).into()
}
