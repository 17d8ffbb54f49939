//! What is done for guests beside the core's orders, which know nothing of what is inside a VM.
//!
//! Not here: when, and for whom (`core::guests`, people).

use std::time::Duration;

use super::failure::failure;
use super::session::{Session, in_session};
use crate::types::VmId;
use crate::types::vm::DomainAnswer;

/// One of these.
pub(super) enum Help {
    /// Ask its guest to reboot.
    Reboot { vm: VmId },
}

/// Does it.
pub(super) fn help(uri: &str, session: &mut Option<Session>, order: &Help, within: Duration) -> DomainAnswer {
    in_session(uri, session, within, |session, _| match order {
        Help::Reboot { vm } => {
            let rebooted = session.domain(*vm).and_then(|domain| domain.reboot(0).map(drop));
            rebooted.map(|()| DomainAnswer::Done).map_err(|error| failure(&error))
        }
    })
}
