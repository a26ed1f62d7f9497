//! What the text of each option means. Every error says what would have been right.

use std::{net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use k8s_openapi::jiff::SignedDuration;
use lb_common::nat::PortRange;

use super::{Error, LogFormat, options::Given};
use crate::settings::{NodePortAddresses, SocketLb, SourceSettings, XdpSetting};

impl Given {
    fn invalid(&self, reason: impl ToString, allowed: &str) -> Error {
        Error::Invalid {
            origin: self.origin.clone(),
            value: self.value.clone(),
            reason: reason.to_string(),
            allowed: allowed.to_owned(),
        }
    }

    /// One of a few words.
    fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, Error> {
        match words.iter().find(|(word, _)| *word == self.value) {
            Some((_, meaning)) => Ok(*meaning),
            None => {
                let allowed: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                Err(self.invalid("unknown", &allowed.join(", ")))
            }
        }
    }
}

pub(super) fn source(
    given: &Given,
    kubeconfig: Option<PathBuf>,
    master: Option<String>,
) -> Result<SourceSettings, Error> {
    match given.value.split_once(':') {
        None if given.value == "kube" => Ok(SourceSettings::Kube { kubeconfig, master }),
        Some(("manifests", dir)) if !dir.is_empty() => Ok(SourceSettings::Manifests(dir.into())),
        _ => Err(given.invalid("unknown", "kube, manifests:DIR")),
    }
}

/// A URL; `HOST:PORT` means https, as only that makes sense for an API server that asks who we are.
pub(super) fn master(given: &Given) -> Result<String, Error> {
    const ALLOWED: &str = "https://HOST:PORT, http://HOST:PORT or HOST:PORT";
    let text = given.value.trim();
    let url = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri: axum::http::Uri = url.parse().map_err(|error| given.invalid(error, ALLOWED))?;
    if !matches!(uri.scheme_str(), Some("https" | "http")) {
        return Err(given.invalid("not an HTTP URL", ALLOWED));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(given.invalid("no host", ALLOWED));
    }
    Ok(url)
}

/// Names of nodes are RFC 1123 subdomains.
pub(super) fn node_name(given: &Given) -> Result<String, Error> {
    const ALLOWED: &str =
        "the name of a Node object: lower-case letters, digits, '-' and '.', at most 253 characters";
    let name = given.value.trim();
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if name.is_empty() || name.len() > 253 || !name.split('.').all(label) {
        return Err(given.invalid("not the name of a node", ALLOWED));
    }
    Ok(name.to_owned())
}

pub(super) fn glob(given: &Given) -> Result<glob::Pattern, Error> {
    const ALLOWED: &str = "names of devices with *, ? and [...], such as eth* or veth[0-9]*";
    glob::Pattern::new(&given.value).map_err(|error| given.invalid(error.msg, ALLOWED))
}

pub(super) fn xdp(given: &Given) -> Result<XdpSetting, Error> {
    given.word(&[
        ("auto", XdpSetting::Auto),
        ("native", XdpSetting::Native),
        ("generic", XdpSetting::Generic),
        ("off", XdpSetting::Off),
    ])
}

pub(super) fn socket_lb(given: &Given) -> Result<SocketLb, Error> {
    given.word(&[("off", SocketLb::Off), ("host", SocketLb::Host), ("all", SocketLb::All)])
}

pub(super) fn on_off(given: &Given) -> Result<bool, Error> {
    given.word(&[("off", false), ("on", true)])
}

pub(super) fn directory(given: &Given) -> Result<PathBuf, Error> {
    let path = PathBuf::from(&given.value);
    if path.is_absolute() { Ok(path) } else { Err(given.invalid("not an absolute path", "/PATH")) }
}

pub(super) fn cidr(given: &Given) -> Result<IpNet, Error> {
    const ALLOWED: &str = "ADDRESS/LENGTH, such as 192.0.2.0/24 or 2001:db8::/64";
    given.value.parse::<IpNet>().map(|net| net.trunc()).map_err(|error| given.invalid(error, ALLOWED))
}

/// `primary` stands alone (kube-proxy rule).
pub(super) fn nodeport_addresses(list: Vec<Given>) -> Result<NodePortAddresses, Error> {
    const ALLOWED: &str = "CIDRs, or primary alone";
    match &list[..] {
        [] => return Ok(NodePortAddresses::All),
        [one] if one.value == "primary" => return Ok(NodePortAddresses::Primary),
        _ => {}
    }
    let parse = |given: &Given| match cidr(given) {
        Ok(net) => Ok(net),
        Err(_) if given.value == "primary" => Err(given.invalid("cannot be combined with CIDRs", ALLOWED)),
        Err(_) => Err(given.invalid("not a CIDR", ALLOWED)),
    };
    list.iter().map(parse).collect::<Result<_, _>>().map(NodePortAddresses::Cidrs)
}

/// Empty: off (kube-proxy rule).
pub(super) fn bind_address(given: &Given) -> Result<Option<SocketAddr>, Error> {
    const ALLOWED: &str = "IP:PORT such as 0.0.0.0:10256 or [::]:10256, or nothing for off";
    match given.value.trim() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|error| given.invalid(error, ALLOWED)),
    }
}

pub(super) fn ports(given: &Given) -> Result<PortRange, Error> {
    const ALLOWED: &str = "FIRST-LAST with 1 <= FIRST <= LAST <= 65535, such as 10240-29999";
    let (first, last) = given.value.split_once('-').ok_or_else(|| given.invalid("not a range", ALLOWED))?;
    let port = |text: &str| text.trim().parse::<u16>().map_err(|error| given.invalid(error, ALLOWED));
    match (port(first)?, port(last)?) {
        (0, _) => Err(given.invalid("0 is not a port", ALLOWED)),
        (first, last) if first > last => Err(given.invalid("the range is empty", ALLOWED)),
        (first, last) => Ok(PortRange { first, last }),
    }
}

/// The largest size of a map that the flow table can have twice.
const MAX_SIZE: u32 = u32::MAX / 2;

pub(super) fn size(given: &Given) -> Result<u32, Error> {
    const ALLOWED: &str = "1 to 2147483647";
    match given.value.trim().parse() {
        Ok(0) => Err(given.invalid("nothing would fit", ALLOWED)),
        Ok(n) if n <= MAX_SIZE => Ok(n),
        Ok(_) => Err(given.invalid("too large", ALLOWED)),
        Err(error) => Err(given.invalid(error, ALLOWED)),
    }
}

/// As [`size`], but for something that can be left out.
pub(super) fn size_or_none(given: &Given) -> Result<u32, Error> {
    const ALLOWED: &str = "0 to 16777216";
    match given.value.trim().parse() {
        Ok(n) if n <= 1 << 24 => Ok(n),
        Ok(_) => Err(given.invalid("too large", ALLOWED)),
        Err(error) => Err(given.invalid(error, ALLOWED)),
    }
}

pub(super) fn seconds(given: &Given) -> Result<u32, Error> {
    const ALLOWED: &str = "whole seconds from 1s on, such as 90s, 15m, 24h or 1h30m";
    let time: SignedDuration =
        given.value.trim().parse().map_err(|_| given.invalid("not a duration", ALLOWED))?;
    if time.subsec_nanos() != 0 {
        return Err(given.invalid("not whole seconds", ALLOWED));
    }
    match u32::try_from(time.as_secs()) {
        Ok(0) => Err(given.invalid("flows would never live", ALLOWED)),
        Ok(seconds) => Ok(seconds),
        Err(_) => Err(given.invalid("out of range", ALLOWED)),
    }
}

pub(super) fn log_format(given: &Given) -> Result<LogFormat, Error> {
    given.word(&[("text", LogFormat::Text), ("json", LogFormat::Json)])
}

pub(super) fn log_filter(given: &Given) -> Result<String, Error> {
    const ALLOWED: &str =
        "error, warn, info, debug, trace, off, also per module (info,lb_agent::source=debug)";
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    // EnvFilter takes a lone word that is no level for the name of a module, and then logs nothing else.
    if let Some(word) =
        given.value.split(',').map(str::trim).find(|d| !d.contains('=') && !LEVELS.contains(d))
    {
        return Err(given.invalid(format!("{word:?} is no level"), ALLOWED));
    }
    match tracing_subscriber::EnvFilter::builder().parse(&given.value) {
        Ok(_) => Ok(given.value.clone()),
        Err(error) => Err(given.invalid(error, ALLOWED)),
    }
}
