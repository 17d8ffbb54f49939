//! `mainstay host evacuate`: this host's VMs are moved away, and that is waited for; also from the unit that does so before a shutdown.

use std::time::{Duration, Instant};

use serde_json::json;

use super::agent;
use super::datastore::need_root;
use super::out::Out;
use super::trouble::{FAILED, Trouble, What};
use crate::api::dbus::client::AgentError;
use crate::api::systemd;
use crate::types::view::{EvacuationView, VIEW_SCHEMA};

/// Between two questions; each renews the wish.
const AGAIN: Duration = Duration::from_secs(2);
/// systemd's answer.
const ANSWER: Duration = Duration::from_secs(2);
/// While nobody has said yet what is wanted: there may be no master in this moment.
const PATIENCE: Duration = Duration::from_secs(15);
const WHAT: &str = "this host was not emptied";

/// Does it. `for_shutdown`: only while the host goes down, and if the rules say so.
pub async fn run(out: &mut Out, json: bool, for_shutdown: bool) -> Result<(), Trouble> {
    need_root(WHAT)?;
    if for_shutdown && !systemd::going_down(ANSWER).await {
        return done(out, json, "this host is not going down: nothing is moved");
    }
    let agent = agent(WHAT).await?;
    let began = Instant::now();
    let mut before: Option<EvacuationView> = None;
    loop {
        // An agent or a master that is gone for a moment costs nothing but time.
        let view = match (agent.evacuate(for_shutdown).await, &before) {
            (Ok(view), _) => view,
            (Err(_), Some(last)) => last.clone(),
            (Err(AgentError::Failed(_) | AgentError::Denied(_)), None) if began.elapsed() < PATIENCE => {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            (Err(error), None) => return Err(error).what(WHAT),
        };
        if !view.wanted {
            return done(out, json, "by the rules its VMs are started on other hosts when it is down");
        }
        if view.left == 0 {
            return done(out, json, "nothing that is protected runs here");
        }
        let all_stay = view.stay.len() == view.left as usize;
        if all_stay || Duration::from_secs(view.within_s.into()) <= began.elapsed() {
            return Err(stay(&view, all_stay));
        }
        if !json && before.as_ref().is_none_or(|before| before.left != view.left) {
            out.line(&format!("{} VM(s) are still here", view.left))?;
        }
        before = Some(view);
        tokio::time::sleep(AGAIN).await;
    }
}

fn stay(view: &EvacuationView, all_stay: bool) -> Trouble {
    let why: Vec<String> = view.stay.iter().map(|(vm, why)| format!("{vm}: {why}")).collect();
    let why = if why.is_empty() { "they are still being moved".to_owned() } else { why.join("; ") };
    let why = if all_stay { why } else { format!("{} s are over; {why}", view.within_s) };
    let next = "they are shut down with the host and started on others; [shutdown] in 'mainstay cluster vm-rules' has the limit";
    Trouble::new(FAILED, format!("{} VM(s) were not moved", view.left), why, next)
}

fn done(out: &mut Out, json: bool, text: &str) -> Result<(), Trouble> {
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "done": text }))?);
    }
    Ok(out.line(&format!("{text}."))?)
}
