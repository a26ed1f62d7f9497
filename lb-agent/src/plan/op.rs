//! Map operations as plain data. The planner makes them, `maps.rs` carries them out, nothing else writes maps.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::{
    affinity::MemberKey,
    frontend::{FrontendValue, ServiceRecord},
    proto,
};

/// An IP family. Each Service port has one record per family, and each family is computed alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The family of a prefix.
    pub const fn of_net(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A layer 4 protocol that Services can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => proto::TCP,
            Self::Udp => proto::UDP,
            Self::Sctp => proto::SCTP,
        }
    }
    /// From the IP protocol number.
    pub const fn from_number(n: u8) -> Option<Self> {
        match n {
            proto::TCP => Some(Self::Tcp),
            proto::UDP => Some(Self::Udp),
            proto::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// An address that clients speak to. Port in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    pub addr: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.addr, self.port), self.protocol)
    }
}

/// An endpoint as the kernel knows it. Port in host order. `local`: on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    pub addr: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
    pub local: bool,
}

/// One write to the kernel's maps. A plan is an ordered list of them, and after every prefix of it each packet sees
/// either the old state of its Service or the new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Names a new record; also zeroes its `SERVICE_STATS`.
    NameService {
        service: u32,
        name: String,
    },
    /// Fills an element of `BACKENDS4/6` that nothing points at yet, or changes `local` of one in use.
    WriteBackend {
        id: u32,
        backend: Backend,
    },
    /// Fills a run of `SLOTS` that nothing points at yet.
    WriteSlots {
        base: u32,
        backends: Vec<u32>,
    },
    /// Adds or changes an entry of `AFFINITY_MEMBERS`.
    PutMember {
        key: MemberKey,
        bits: u32,
    },
    /// Stores both ranges (each one atomic store) and the affinity timeout of a record.
    WriteService {
        service: u32,
        record: ServiceRecord,
    },
    /// Adds or changes a frontend.
    PutFrontend {
        frontend: Frontend,
        value: FrontendValue,
    },
    DeleteFrontend {
        frontend: Frontend,
    },
    /// Adds or changes the entry about an address as a whole. `kind`: one of the `KIND_*` of
    /// `lb_common::frontend::flags`.
    PutAddress {
        addr: IpAddr,
        kind: u32,
    },
    DeleteAddress {
        addr: IpAddr,
    },
    /// Admits clients in `net` to the LoadBalancer addresses of a record.
    PutRange {
        service: u32,
        net: IpNet,
    },
    DeleteRange {
        service: u32,
        net: IpNet,
    },
    /// Fills an element of `SERVICE_CIDRS4/6` that is not active.
    WriteCidr {
        index: u32,
        net: IpNet,
    },
    /// Makes an element of `SERVICE_CIDRS4/6` count (`lb_common::cidr::flags`), or not (0).
    SwitchCidr {
        family: Family,
        index: u32,
        flags: u32,
    },
    DeleteMember {
        key: MemberKey,
    },
    /// Waits until no packet can still be using what earlier operations replaced.
    Grace,
    /// Frees a record that no frontend names any more: clears it and deletes its name.
    ClearService {
        service: u32,
    },
    /// Frees an element of `BACKENDS4/6` that no slot names any more.
    ClearBackend {
        family: Family,
        id: u32,
    },
}
