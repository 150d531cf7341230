//! `lorikeet healthcheck`: a probe for containers that have no curl.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use super::{Failure, options::seconds};

/// Bytes of an answer that are read: the status line is among the first.
const MOST: u64 = 4096;

/// Ask a running server whether it is ready (exit 0) or not (exit 1)
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet healthcheck
  lorikeet healthcheck --url http://127.0.0.1:9000/livez

As a container's probe:
  HEALTHCHECK CMD [\"lorikeet\", \"healthcheck\"]")]
pub(super) struct HealthcheckOptions {
    /// What to ask [default: /readyz on the port of --listen]
    #[arg(long, env = "LORIKEET_URL", value_name = "URL")]
    url: Option<String>,
    /// Where the server listens, as given to `serve`
    #[arg(
        long,
        env = "LORIKEET_LISTEN",
        default_value = "127.0.0.1:8080",
        value_name = "ADDR:PORT"
    )]
    listen: SocketAddr,
    /// Seconds to wait for the answer
    #[arg(long, env = "LORIKEET_TIMEOUT", default_value = "5", value_name = "SECONDS",
        value_parser = seconds)]
    timeout: Duration,
}

pub(super) fn run(options: HealthcheckOptions) -> Result<(), Failure> {
    let url = options.url.unwrap_or_else(|| {
        let mut address = options.listen;
        // A server on every address is asked on this machine's own.
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        format!("http://{address}/readyz")
    });
    let status = get(&url, options.timeout)?;
    match status {
        200 => {
            println!("{url}: ready");
            Ok(())
        }
        status => Err(Failure::new(format!("{url}: status {status}"))),
    }
}

/// The status of a GET.
fn get(url: &str, timeout: Duration) -> Result<u16, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(format!("{url}: {error}"));
    let Some(rest) = url.strip_prefix("http://") else {
        return Err(Failure::usage(format!(
            "--url: must start with http://, got {url}"
        )));
    };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let path = if path.is_empty() { "/readyz" } else { path };
    let with_port = match host.rsplit_once(':') {
        // Colons inside brackets belong to an IPv6 address.
        Some((_, port)) if !port.ends_with(']') => host.to_owned(),
        _ => format!("{host}:80"),
    };
    let address = with_port
        .to_socket_addrs()
        .map_err(|error| failed(&error))?
        .next()
        .ok_or_else(|| failed(&"the name has no address"))?;
    // A timeout of zero is an error of the socket's; the shortest wait is as good.
    let timeout = timeout.max(Duration::from_millis(1));
    let mut stream =
        TcpStream::connect_timeout(&address, timeout).map_err(|error| failed(&error))?;
    stream
        .set_read_timeout(Some(timeout))
        .and_then(|()| stream.set_write_timeout(Some(timeout)))
        .and_then(|()| {
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes())
        })
        .map_err(|error| failed(&error))?;
    let mut answer = Vec::new();
    stream
        .take(MOST)
        .read_to_end(&mut answer)
        .map_err(|error| failed(&error))?;
    let answer = String::from_utf8_lossy(&answer);
    answer
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split_whitespace().nth(1))
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| failed(&"the answer is not HTTP"))
}
