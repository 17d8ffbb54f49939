pub mod core;
pub mod exec;
pub mod guard;
pub mod mutants;
pub mod types;
pub mod wire;
