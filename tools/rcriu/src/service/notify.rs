//! The client as a listener: each stage is a message to it, and its answer decides whether we go on.

use std::os::fd::BorrowedFd;

use rcriu_engine::error::{Error, Result};
use rcriu_engine::options::External;
use rcriu_engine::pstree::RealPid;
use rcriu_engine::scripts::{Notifier, Stage};
use rcriu_images::pb::{CriuNotify, CriuReq, CriuReqType, CriuResp};

use super::connection::Connection;

/// Tells a client of stages.
#[derive(Debug)]
pub struct Client(pub Connection);

impl Client {
    fn ask(&self, stage: Stage, pid: Option<i32>, fd: Option<BorrowedFd<'_>>) -> Result<CriuReq> {
        let message = CriuResp {
            r#type: CriuReqType::Notify.into(),
            success: true,
            notify: Some(CriuNotify { script: Some(stage.name().to_owned()), pid }),
            ..CriuResp::default()
        };
        let during = |e: Error| e.during(format!("notification {stage}"));
        self.0.send(&message, fd).map_err(during)?;
        match self.0.receive().map_err(during)? {
            None => Err(during(Error::host("the client is gone"))),
            Some(answer) if answer.r#type != i32::from(CriuReqType::Notify) => {
                Err(during(Error::usage("the client answered with another request")))
            }
            Some(answer) if !answer.notify_success() => {
                Err(during(Error::host("the client reported a failure")))
            }
            Some(answer) => Ok(answer),
        }
    }
}

impl Notifier for Client {
    fn notify(&self, stage: Stage, root: Option<RealPid>) -> Result<()> {
        // Clients act on the pid of the new root task where they find one, so it goes out only where CRIU
        // sends it.
        let pid = match stage {
            Stage::SetupNamespaces | Stage::PostRestore => root.map(|pid| pid.0),
            _ => None,
        };
        self.ask(stage, pid, None).map(drop)
    }

    fn orphan_pts_master(&self, master: BorrowedFd<'_>) -> Result<bool> {
        self.ask(Stage::OrphanPtsMaster, None, Some(master)).map(|_| true)
    }

    fn query_external(&self) -> Result<Vec<External>> {
        let answer = self.ask(Stage::QueryExtFiles, None, None)?;
        let list = answer.opts.map(|o| o.external).unwrap_or_default();
        list.iter().map(|text| Ok(External::parse(text)?)).collect()
    }
}
