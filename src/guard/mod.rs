//! stub: the pure parts of the guard, so that the simulator can run them
mod process;
pub mod state;
pub mod store;
pub mod table;
