//! `mainstay doctor`: the agent's findings; without an agent, what can be seen without it.

use serde_json::json;

use super::out::{Out, Tone};
use super::trouble::Trouble;
use crate::api::dbus::Bus;
use crate::api::dbus::client::{Agent, AgentError};
use crate::exec::doctor::{self, Finding, Level};
use crate::types::view::VIEW_SCHEMA;

/// Runs it; there being errors is the exit code 1.
pub async fn run(out: &mut Out, json: bool) -> Result<(), Trouble> {
    let found = out.progress("looking", findings()).await;
    let errors = found.iter().filter(|finding| finding.level == Level::Error).count();
    let warnings = found.iter().filter(|finding| finding.level == Level::Warning).count();
    if json {
        out.json(&json!({ "schema": VIEW_SCHEMA, "errors": errors, "warnings": warnings, "findings": found }))?;
    } else {
        for finding in &found {
            show(out, finding)?;
        }
        let well = found.len() - errors - warnings;
        out.line(&format!("\nErrors: {errors}, warnings: {warnings}, ok: {well}"))?;
    }
    if 0 < errors { Err(Trouble::Found) } else { Ok(()) }
}

async fn findings() -> Vec<Finding> {
    let asked = async { Agent::connect(&Bus::System).await?.doctor().await };
    match asked.await {
        Ok(found) => found,
        Err(error @ AgentError::Unreachable(_)) => doctor::examine(Err(error.to_string())).await,
        Err(error) => doctor::examine(Err(format!("did not answer: {error}"))).await,
    }
}

fn show(out: &mut Out, finding: &Finding) -> std::io::Result<()> {
    let (mark, tone) = match finding.level {
        Level::Error => ("error  ", Tone::Bad),
        Level::Warning => ("warning", Tone::Doubtful),
        Level::Ok => ("ok     ", Tone::Good),
    };
    let text = out.wrapped("         ", &format!("{} ({}): {}", finding.object, finding.id, finding.what));
    out.line(&format!("{}  {}", out.paint(mark, tone), text.trim_start()))?;
    if !finding.cure.is_empty() {
        out.line(&out.wrapped("         → ", &finding.cure))?;
    }
    Ok(())
}
