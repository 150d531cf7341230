//! Who delivers the messages.

use std::{future::Future, net::SocketAddr, time::Duration};

use http_client::{
    Client, StatusCode,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect,
};

use super::{
    AllowedHosts, WebhookSecret,
    allow::{Way, is_public},
    outbox::{self, Message, Outcome},
};
use crate::jobs::{JobError, Jobs};

/// For the whole of one attempt; well under the time after which another courier goes.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Between two looks into the outbox.
const IDLE: Duration = Duration::from_secs(1);

/// Takes messages from the outbox to where they go. Any number of processes may have one.
#[derive(Debug, Clone)]
pub struct Courier {
    jobs: Jobs,
    secret: WebhookSecret,
    /// Goes to public addresses only.
    outward: Client,
    /// Goes where the operator's list says, wherever that is.
    anywhere: Client,
}

impl Courier {
    /// One who signs with this secret. Where it may go is what the jobs were opened with.
    pub fn new(jobs: Jobs, secret: WebhookSecret) -> Result<Self, JobError> {
        // It fails where a provider is chosen already, and then that one serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            Client::builder()
                .timeout(TIMEOUT)
                .redirect(redirect::Policy::none())
                // A proxy would look up the name itself, and we could not see where it leads.
                .no_proxy()
                .user_agent(concat!("lorikeet/", env!("CARGO_PKG_VERSION")))
        };
        let made = |client: Result<Client, http_client::Error>| {
            client.map_err(|error| JobError::Broken {
                reason: error.to_string(),
            })
        };
        Ok(Self {
            jobs,
            secret,
            outward: made(builder().dns_resolver(OnlyPublic).build())?,
            anywhere: made(builder().build())?,
        })
    }

    /// Delivers whatever is due, now and later, until `shutdown` resolves.
    pub async fn run(&self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            // What is under way is finished: cut off, it would be sent once more.
            let waits = match self.deliver_one().await {
                Ok(true) => Duration::ZERO,
                Ok(false) => IDLE,
                Err(error) => {
                    tracing::warn!(%error, "the outbox of webhooks cannot be read");
                    IDLE
                }
            };
            tokio::select! {
                biased;
                () = &mut shutdown => return,
                () = tokio::time::sleep(waits) => {}
            }
        }
    }

    /// Makes one attempt at one message, if one is due; says whether it was.
    pub async fn deliver_one(&self) -> Result<bool, JobError> {
        let Some(message) = outbox::take(&self.jobs).await? else {
            return Ok(false);
        };
        let outcome = self.attempt(&message).await;
        tracing::debug!(job = %message.job, attempt = message.attempts, ?outcome, "webhook");
        outbox::settle(&self.jobs, &message, outcome).await?;
        Ok(true)
    }

    async fn attempt(&self, message: &Message) -> Outcome {
        let allowed: &AllowedHosts = &self.jobs.settings().webhooks;
        // Once more: the list may have become shorter since.
        let (url, client) = match allowed.way(&message.url) {
            Ok((url, Way::Public)) => (url, &self.outward),
            Ok((url, Way::Anywhere)) => (url, &self.anywhere),
            Err(reason) => return Outcome::Never(reason),
        };
        let timestamp = message.now.div_euclid(1000);
        let signature = self.secret.sign(&message.id, timestamp, &message.body);
        let request = client
            .post(url)
            .header("content-type", "application/json")
            .header("webhook-id", &message.id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", signature)
            .body(message.body.clone());
        match request.send().await {
            Ok(answer) if answer.status().is_success() => Outcome::Delivered,
            // The receiver wants no more of it.
            Ok(answer) if answer.status() == StatusCode::GONE => {
                Outcome::Never("the receiver answered 410 Gone".to_owned())
            }
            Ok(answer) => Outcome::Later(format!("the receiver answered {}", answer.status())),
            Err(error) => Outcome::Later(with_causes(&error.without_url())),
        }
    }
}

/// The text of an error and of what caused it, which says more.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Finds the public addresses of a name, and no other. What it gives is what is connected to, so a name
/// that leads elsewhere the next time gains nothing.
struct OnlyPublic;

impl Resolve for OnlyPublic {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|to| is_public(to.ip())).collect();
            if public.is_empty() {
                return Err(format!("`{}` leads to no public address", name.as_str()).into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_that_leads_inside_is_not_followed() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .no_proxy()
            .dns_resolver(OnlyPublic)
            .build()
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let sent = client.get(format!("http://localhost:{port}/")).send().await;
        let error = with_causes(&sent.unwrap_err());
        assert!(error.contains("leads to no public address"), "{error}");
    }
}
