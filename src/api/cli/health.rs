//! `mainstay host health …`: a file that the agent of this host reads; it need not run.

use std::path::Path;

use clap::Subcommand;
use serde_json::json;

use super::datastore::need_root;
use super::out::Out;
use super::trouble::{FAILED, Trouble, USAGE};
use crate::config;
use crate::exec::health::vendor;
use crate::types::view::VIEW_SCHEMA;

/// `mainstay host health …`
#[derive(Subcommand, Debug)]
pub enum HealthCommand {
    /// Something is wrong: what is done about it stands in the rules for VMs ([[health]] of source "vendor"; if there is none, nothing
    /// is placed here while another host can have it).
    ///
    /// It stands until it is cleared, or until the next boot. Said again for the same source it replaces what was said before.
    Report {
        /// Who says so: one word of letters, digits, dots, dashes.
        #[arg(long)]
        source: String,
        /// What is wrong, in one line.
        #[arg(long)]
        text: String,
    },
    /// It is well again.
    Clear {
        /// Who had said so.
        #[arg(long)]
        source: String,
    },
}

/// Does it.
pub fn run(out: &mut Out, json: bool, command: HealthCommand) -> Result<(), Trouble> {
    let (source, text) = match command {
        HealthCommand::Report { source, text } => (source, Some(text)),
        HealthCommand::Clear { source } => (source, None),
    };
    let what = format!("the health of this host was not changed for \"{source}\"");
    if !vendor::is_name(&source) {
        let why = format!("\"{source}\" is no name: letters, digits, dots and dashes, at most 64");
        return Err(Trouble::new(USAGE, what, why, "for example --source ipmi"));
    }
    need_root(&what)?;
    let run = config::load(Path::new(config::PATH)).map(|config| config.paths.run);
    let run = run.map_err(|error| Trouble::new(FAILED, &what, error.to_string(), "mainstay config check"))?;
    let folder = vendor::folder(&run);
    let done = match &text {
        Some(text) => vendor::report(&folder, &source, text).map(|()| "reported"),
        None => vendor::clear(&folder, &source).map(|was| if was { "cleared" } else { "nothing was reported" }),
    };
    let failed = |error: std::io::Error| Trouble::new(FAILED, &what, format!("{}: {error}", folder.display()), "");
    let done = done.map_err(failed)?;
    if json {
        return Ok(out.json(&json!({ "schema": VIEW_SCHEMA, "source": source, "done": done }))?);
    }
    Ok(out.line(&format!("{source}: {done}."))?)
}
