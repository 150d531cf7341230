//! The server as its users meet it: over real HTTP on the demo model, and through the real binary.
//!
//! One server with one engine answers most tests, all at the same time; tests that need a server in
//! a certain state start their own. Pictures are small and have few steps wherever their content
//! does not matter.

mod adapter_files;
mod adapters;
mod bad_adapters;
mod bad_input;
mod bad_uploads;
mod command_line;
mod crashes;
mod edits;
mod generations;
mod lifecycle;
mod metadata;
mod operations;
mod painting;
mod painting_on;
mod process;
mod streaming;
mod support;
mod training;
mod vllm;
