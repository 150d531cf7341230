//! Where messages may go.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use http_client::Url;

/// The hosts an operator allows. Empty, it allows none.
///
/// | entry | allows |
/// |---|---|
/// | `hooks.example.org` | `https` to this host, any port |
/// | `*.example.org` | `https` to every host under it, and not to itself |
/// | `10.1.2.3` | `https` to this address, though it is a private one |
/// | `http://callback:8080` | `http` to exactly this host and port, wherever it leads |
///
/// A name must lead to public addresses, or a message could be sent to the machine next to this one
/// that trusts its neighbours. Only the last two vouch for a private one: the operator wrote it down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedHosts(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Host(String),
    Under(String),
    Plain { host: String, port: u16 },
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a host, *.SUFFIX or http://HOST:PORT")]
pub struct InvalidHost(String);

/// A way that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// To public addresses.
    Public,
    /// Wherever the name leads.
    Anywhere,
}

impl AllowedHosts {
    /// Reads the entries.
    pub fn new<S: AsRef<str>>(entries: impl IntoIterator<Item = S>) -> Result<Self, InvalidHost> {
        let entries = entries.into_iter().map(|entry| entry.as_ref().parse());
        entries.collect::<Result<_, _>>().map(Self)
    }

    /// Whether it allows nothing at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a message may be sent there, or the reason it may not.
    pub fn check(&self, url: &str) -> Result<(), String> {
        self.way(url).map(|_| ())
    }

    pub(super) fn way(&self, url: &str) -> Result<(Url, Way), String> {
        if self.is_empty() {
            return Err("this server sends no webhooks; its operator can allow hosts".to_owned());
        }
        let url = Url::parse(url).map_err(|error| format!("not a URL: {error}"))?;
        if url.as_str().len() > 2048 {
            return Err("has more than 2048 bytes".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must have no user name or password in it".to_owned());
        }
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return Err("expected https://HOST/…".to_owned());
        };
        let secure = match url.scheme() {
            "https" => true,
            "http" => false,
            scheme => return Err(format!("the scheme `{scheme}` is not https")),
        };
        let found = self
            .0
            .iter()
            .find_map(|entry| entry.way(secure, host, port));
        match found {
            Some(way) => Ok((url, way)),
            None if !secure => Err(format!("http to `{host}:{port}` is not allowed; use https")),
            None => Err(format!(
                "the host `{host}` is not one of those this server may call"
            )),
        }
    }
}

impl Entry {
    fn way(&self, secure: bool, to: &str, at: u16) -> Option<Way> {
        match self {
            Self::Host(host) if secure && host == to => Some(match address(host) {
                Some(_) => Way::Anywhere,
                None => Way::Public,
            }),
            Self::Under(suffix) if secure && address(to).is_none() => {
                // The suffix has its dot.
                let name = to.strip_suffix(&**suffix)?;
                (!name.is_empty()).then_some(Way::Public)
            }
            Self::Plain { host, port } if !secure && host == to && *port == at => {
                Some(Way::Anywhere)
            }
            _ => None,
        }
    }
}

impl FromStr for Entry {
    type Err = InvalidHost;

    fn from_str(text: &str) -> Result<Self, InvalidHost> {
        let invalid = || InvalidHost(text.to_owned());
        if let Some(suffix) = text.strip_prefix("*.") {
            let suffix = host(suffix)
                .filter(|s| address(s).is_none())
                .ok_or_else(invalid)?;
            return Ok(Self::Under(format!(".{suffix}")));
        }
        if let Some(place) = text.strip_prefix("http://") {
            let (name, port) = place.rsplit_once(':').ok_or_else(invalid)?;
            let host = host(name).ok_or_else(invalid)?;
            let port = port.parse().map_err(|_| invalid())?;
            return Ok(Self::Plain { host, port });
        }
        host(text).map(Self::Host).ok_or_else(invalid)
    }
}

/// A host in the one spelling that URLs are brought to, if the text is a host and nothing else.
fn host(text: &str) -> Option<String> {
    let v6 = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    let fine = match v6 {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => {
            !text.contains(|c: char| c.is_whitespace() || c.is_control() || ":/?#@*%\\".contains(c))
        }
    };
    let url = Url::parse(&format!("https://{text}/"))
        .ok()
        .filter(|_| fine)?;
    url.host_str().map(str::to_owned)
}

/// The address that a host is, if it is not a name.
fn address(host: &str) -> Option<IpAddr> {
    let host = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    host.parse().ok()
}

/// Whether an address is one of the whole world's.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_documentation()
        || address.is_multicast()
        // This network, carrier-grade NAT (RFC 6598), protocol assignments, benchmarks, reserved.
        || a == 0
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && (18..20).contains(&b))
        || a >= 240)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    // An IPv4 address inside one: mapped, of NAT64 (RFC 6052), of 6to4.
    let [a, b, c, .., g, h] = address.segments();
    let inside = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    if let Some(v4) = address.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    match (a, b) {
        (0x64, 0xff9b) => c == 0 && inside(g, h),
        (0x2002, _) => inside(b, c),
        // Documentation; Teredo and other assignments of protocols.
        (0x2001, 0xdb8) => false,
        (0x2001, b) if b < 0x200 => false,
        // Only 2000::/3 is the world's.
        _ => a & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> AllowedHosts {
        AllowedHosts::new([
            "Hooks.example.org",
            "*.example.com",
            "http://callback:8080",
            "10.1.2.3",
            "[fd00::1]",
        ])
        .unwrap()
    }

    #[test]
    fn what_the_list_names_is_allowed() {
        for (url, way) in [
            ("https://hooks.example.org/a?b=c", Way::Public),
            ("https://HOOKS.example.org:8443/", Way::Public),
            ("https://a.b.example.com", Way::Public),
            ("http://callback:8080/done", Way::Anywhere),
            ("https://10.1.2.3/", Way::Anywhere),
            ("https://[fd00:0::1]/", Way::Anywhere),
        ] {
            assert_eq!(hosts().way(url).map(|(_, way)| way), Ok(way), "{url}");
        }
    }

    #[test]
    fn nothing_else_is() {
        for url in [
            "http://hooks.example.org/",
            "https://example.com/",
            "https://notexample.com/",
            "https://example.com.evil.org/",
            "https://hooks.example.org.evil.org/",
            "https://hooks.example.org@evil.org/",
            "https://u:p@hooks.example.org/",
            "https://evil.org/hooks.example.org",
            "https://callback:8080/",
            "http://callback/",
            "http://callback:8081/",
            "https://10.1.2.4/",
            "https://0x0a010204/",
            "https://127.0.0.1/",
            "file:///etc/passwd",
            "ftp://hooks.example.org/",
            "hooks.example.org",
            "",
        ] {
            assert!(hosts().check(url).is_err(), "{url}");
        }
        let reason = AllowedHosts::default().check("https://a.org").unwrap_err();
        assert!(reason.contains("operator"), "{reason}");
    }

    #[test]
    fn an_entry_that_allows_something_else_than_it_seems_to_is_refused() {
        for entry in [
            "",
            "*",
            "*.",
            "*.*.org",
            "https://a.org",
            "a.org/path",
            "a.org:80",
            "u@a.org",
            "http://a.org",
            "http://a.org:x",
            "http://a.org:80/x",
            "*.10.0.0.1",
            "a b",
            "a\tb",
            "a?b",
            "a#b",
            "[::1]:80",
            "[::1]/x]",
        ] {
            assert!(AllowedHosts::new([entry]).is_err(), "{entry}");
        }
    }

    #[test]
    fn addresses_that_lead_inside_are_not_public() {
        for private in [
            "127.0.0.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fd00::1",
            "fe80::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::a00:1",
            "2002:a00:1::",
            "2001:db8::1",
            "2001::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in [
            "1.1.1.1",
            "93.184.216.34",
            "172.32.0.1",
            "100.128.0.1",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }
}
