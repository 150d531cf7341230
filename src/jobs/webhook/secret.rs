//! The key that messages are signed with.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// Fewer bytes could be guessed.
const SHORTEST: usize = 24;

/// What receiver and sender know, and nobody else.
#[derive(Clone)]
pub struct WebhookSecret(Vec<u8>);

/// Without the key.
impl fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookSecret")
    }
}

/// Why a text cannot be the secret. It does not repeat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSecret {
    #[error("what follows `whsec_` is not base64")]
    NotBase64,
    #[error("the webhook secret has {0} bytes; it needs at least {SHORTEST}")]
    TooShort(usize),
}

impl WebhookSecret {
    /// `whsec_` with base64, as Standard Webhooks writes them, or any text, whose bytes it is then.
    pub fn new(text: &str) -> Result<Self, InvalidSecret> {
        let key = match text.strip_prefix("whsec_") {
            Some(coded) => BASE64.decode(coded).map_err(|_| InvalidSecret::NotBase64)?,
            None => text.as_bytes().to_vec(),
        };
        match key.len() < SHORTEST {
            true => Err(InvalidSecret::TooShort(key.len())),
            false => Ok(Self(key)),
        }
    }

    /// The header `webhook-signature`.
    pub(in super::super) fn sign(&self, id: &str, timestamp: i64, body: &str) -> String {
        // A key of any length will do.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else {
            unreachable!("HMAC takes keys of any length");
        };
        mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1,{}", BASE64.encode(mac.finalize().into_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_standard_webhooks() {
        // The example of the libraries of Standard Webhooks.
        let secret = WebhookSecret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = secret.sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            r#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_that_could_be_guessed_is_none() {
        let error = WebhookSecret::new("hunter2").unwrap_err();
        assert_eq!(error, InvalidSecret::TooShort(7));
        assert!(!error.to_string().contains("hunter2"));
        assert_eq!(
            WebhookSecret::new("whsec_?").unwrap_err(),
            InvalidSecret::NotBase64
        );
        let secret = WebhookSecret::new(&"x".repeat(24)).unwrap();
        assert_eq!(format!("{secret:?}"), "WebhookSecret");
    }
}
