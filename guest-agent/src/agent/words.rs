//! What applications say on the local socket, one JSON object a line, and what they hear.
//!
//! ```text
//!   {"report":{"severity":"critical","kind":"app/db","message":"no connections left","ask":"reset","wait":true}}
//!       ◄── {"accepted":{"sequence":7}}
//!       ◄── {"answer":{"sequence":7,"verdict":"done","why":"web is reset"}}       (with "wait")
//!   {"heartbeat":"enable"}  "mark-active"  "disable"          ◄── "ok"
//!   {"ready":true}                                             ◄── "ok"
//!   "status"                                                   ◄── {"status":{…}}
//! ```

use serde::{Deserialize, Serialize};

use mainstay_guest::message::{Application, Severity, Verdict, Wish};

/// Longest line of an application, in bytes.
pub const MAX_LINE: usize = 16 * 1024;

/// From an application.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Something is wrong.
    Report(Wanted),
    /// Of the application.
    Heartbeat(Heartbeat),
    /// Whether others that wait for this guest may start.
    Ready(bool),
    /// What the agent knows.
    Status,
}

/// A report, as an application words it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// How bad.
    pub severity: Severity,
    /// What kind, for example `app/db`.
    pub kind: String,
    /// For people.
    pub message: String,
    /// What is asked.
    #[serde(default)]
    pub ask: Wish,
    /// The connection stays, for the host's answers.
    #[serde(default)]
    pub wait: bool,
}

/// Of the application.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Heartbeat {
    /// From now on it is missed when it does not come.
    Enable,
    /// Here it is.
    MarkActive,
    /// It is not missed any more.
    Disable,
}

/// To an application.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The report is kept until the host has answered it.
    Accepted {
        /// Its number.
        sequence: u64,
    },
    /// What the host says of it.
    Answer {
        /// Its number.
        sequence: u64,
        /// What was decided.
        verdict: Verdict,
        /// Why.
        why: String,
    },
    /// Done.
    Ok,
    /// What the agent knows.
    Status(Status),
    /// Nothing was done.
    Error(String),
}

/// What the agent knows.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// The host listens.
    pub host: bool,
    /// This VM, as the cluster calls it; empty as long as the host has not said it.
    pub vm: String,
    /// What is wrong with the port.
    pub trouble: Option<String>,
    /// Reports that the host has not answered for good.
    pub waiting: usize,
    /// Reports that had to be dropped.
    pub dropped: u32,
    /// The application's heartbeat.
    pub application: Application,
    /// Others may start.
    pub ready: bool,
    /// File systems stand still.
    pub frozen: bool,
    /// Watched units that have failed.
    pub failed_units: Vec<String>,
    /// Checks that fail, each with the reason.
    pub failing_checks: Vec<(String, String)>,
    /// Why the configuration is not used.
    pub configuration: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_applications() {
        let report = r#"{"report":{"severity":"critical","kind":"app/db","message":"gone","ask":{"reset-vm":"db1"},"wait":true}}"#;
        let expected = Request::Report(Wanted {
            severity: Severity::Critical,
            kind: "app/db".to_owned(),
            message: "gone".to_owned(),
            ask: Wish::ResetVm("db1".to_owned()),
            wait: true,
        });
        for (line, expected) in [
            (report, Some(expected)),
            (r#"{"heartbeat":"mark-active"}"#, Some(Request::Heartbeat(Heartbeat::MarkActive))),
            (r#"{"ready":false}"#, Some(Request::Ready(false))),
            (r#""status""#, Some(Request::Status)),
            (r#"{"report":{"severity":"critical","kind":"a","message":"m","wish":"reset"}}"#, None),
            (r#"{"report":{"severity":"awful","kind":"a","message":"m"}}"#, None),
            ("", None),
        ] {
            assert_eq!(serde_json::from_str::<Request>(line).ok(), expected, "{line}");
        }
        let answer = Reply::Answer { sequence: 7, verdict: Verdict::Done, why: "reset".to_owned() };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"answer":{"sequence":7,"verdict":"done","why":"reset"}}"#
        );
    }
}
