//! Telling somebody else's server that a job ended.
//!
//! When a job ends, its [view](super::Job::view) is put into an outbox in the same transaction; a
//! [`Courier`] of any process takes it from there, as often as it needs, so that a crash loses nothing.
//! A message can therefore arrive twice; its `webhook-id` is the same then. The form is that of Standard
//! Webhooks (<https://www.standardwebhooks.com>): a `POST` of JSON with
//!
//! - `webhook-id`: of the message, the same at every attempt;
//! - `webhook-timestamp`: of this attempt, in seconds since 1970;
//! - `webhook-signature`: `v1,` and the base64 of HMAC-SHA256 over `ID.TIMESTAMP.BODY`.
//!
//! Where messages may go is the operator's to say ([`AllowedHosts`]); nothing is allowed that is not
//! named.

mod allow;
mod courier;
pub(super) mod outbox;
mod secret;

pub use allow::{AllowedHosts, InvalidHost};
pub use courier::Courier;
pub use secret::{InvalidSecret, WebhookSecret};
