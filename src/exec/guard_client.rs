//! stub
use crate::types::guard::*; use crate::types::Ticket; use std::path::PathBuf;
pub struct GuardClient; pub enum GuardEvent { Connected, Report(GuardReport), Lost(String) }
impl GuardClient { pub fn spawn(_: PathBuf, _: impl Fn(GuardEvent) + Send + 'static) -> Self { Self } pub fn order(&self, _: Ticket, _: GuardOrder) {} }
