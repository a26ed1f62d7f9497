//! Base chains of nf_tables on the forward hook whose policy is to drop. Tables of iptables-nft are among them.

use std::{fmt, io};

use crate::datapath::netlink::{self, NLM_F_DUMP, Payload};

const NETLINK_NETFILTER: i32 = 12;
/// NFNL_SUBSYS_NFTABLES (10) and NFT_MSG_GETCHAIN (4).
const GET_CHAIN: u16 = 10 << 8 | 4;
/// Size of struct nfgenmsg, before the attributes.
const NFGENMSG: usize = 4;
// enum nft_chain_attributes, enum nft_hook_attributes.
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NF_INET_FORWARD: u32 = 2;
const NF_DROP: u32 = 0;

/// Address families of chains that see routed packets (NFPROTO_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Inet,
    Ip,
    Ip6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub family: Family,
    pub table: String,
    pub name: String,
    /// Of the old iptables, not of nf_tables.
    pub legacy: bool,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = if self.legacy { "legacy iptables" } else { "nf_tables" };
        write!(f, "{by} chain {} in table {} {}", self.name, self.family, self.table)
    }
}

/// Asks the kernel. None where it has no nf_tables.
pub fn dropping_forward_chains() -> io::Result<Vec<Chain>> {
    // NFPROTO_UNSPEC: of all families.
    let payload = Payload::new(&[0; NFGENMSG]);
    match netlink::request(NETLINK_NETFILTER, GET_CHAIN, NLM_F_DUMP, &payload) {
        Ok(chains) => Ok(chains.iter().filter_map(|chain| dropping_forward_chain(chain)).collect()),
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOENT)
            ) =>
        {
            Ok(Vec::new())
        }
        Err(e) => Err(io::Error::new(e.kind(), format!("listing nf_tables chains: {e}"))),
    }
}

fn dropping_forward_chain(message: &[u8]) -> Option<Chain> {
    let family = match message.first()? {
        1 => Family::Inet,
        2 => Family::Ip,
        10 => Family::Ip6,
        _ => return None,
    };
    let attributes = message.get(NFGENMSG..)?;
    let hook = netlink::attribute(attributes, NFTA_CHAIN_HOOK)?;
    let is_dropping_forward = be32(netlink::attribute(hook, NFTA_HOOK_HOOKNUM)?)? == NF_INET_FORWARD
        && be32(netlink::attribute(attributes, NFTA_CHAIN_POLICY)?)? == NF_DROP;
    is_dropping_forward.then_some(Chain {
        family,
        table: netlink::text(netlink::attribute(attributes, NFTA_CHAIN_TABLE)?),
        name: netlink::text(netlink::attribute(attributes, NFTA_CHAIN_NAME)?),
        legacy: false,
    })
}

fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*value.first_chunk()?))
}
