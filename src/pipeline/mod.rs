//! One request's way from text to picture.

pub mod request;
