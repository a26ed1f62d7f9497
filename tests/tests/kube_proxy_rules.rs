//! The rules that stand for kube-proxy in the benchmark do what kube-proxy's do: connections through a ClusterIP, a
//! NodePort and a load balancer's address reach the endpoints, and nothing stays behind.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    bench::kube_proxy::{self, Cluster, Mode, Proto, Service},
    janitor::{Janitor, Thing},
    netns::Netns,
    place::Family,
};

/// Connections to one Service: an endpoint of two that none of them gets is a mistake (once in 10^12 it is bad luck).
const CALLS: usize = 40;
const WITHIN: Duration = Duration::from_secs(5);
const NODE_PORT: u16 = 30_080;

/// A client, a node that serves, and a place where all endpoints are.
struct Bed {
    client: Netns,
    node: Netns,
    janitor: Janitor,
    family: Family,
}

/// Of both families: the node towards the client, the client, the node towards the pods, the pods' machine.
fn places(family: Family) -> [&'static str; 4] {
    match family {
        Family::V4 => ["10.131.0.1", "10.131.0.2", "10.132.0.1", "10.132.0.2"],
        Family::V6 => ["fd00:10:128:a::1", "fd00:10:128:a::2", "fd00:10:128:b::1", "fd00:10:128:b::2"],
    }
}

fn load_balancer(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([192, 0, 2, 80]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x80]),
    }
}

/// Two Services with endpoints, the second with all kinds of addresses, and one without.
fn services(family: Family, proto: Proto) -> Vec<Service> {
    let mut services = kube_proxy::services(family, proto, 3, 2);
    services[1].node_port = Some(NODE_PORT);
    services[1].load_balancer = Some(load_balancer(family));
    services[2].endpoints.clear();
    services
}

impl Bed {
    fn new(family: Family) -> Result<Self> {
        let mut janitor = Janitor::start()?;
        let mut make = |name: &str| {
            let name = format!("lbkp-{}-{name}", std::process::id());
            janitor.will_remove(&Thing::Netns(name.clone()))?;
            Netns::create(&name)
        };
        let (client, node, pods) = (make("client")?, make("node")?, make("pods")?);
        let [near, far, to_pods, at_pods] = places(family);
        let (bits, all, flags) = match family {
            Family::V4 => (24, "0.0.0.0/0", ""),
            Family::V6 => (64, "::/0", "nodad"),
        };
        node.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        node.ip(&[
            format!("link add c0 type veth peer name c0 netns {}", client.name()),
            format!("link add p0 type veth peer name p0 netns {}", pods.name()),
            format!("addr add {near}/{bits} dev c0 {flags}"),
            format!("addr add {to_pods}/{bits} dev p0 {flags}"),
            "link set c0 up".into(),
            "link set p0 up".into(),
            // As nodes have one: what is refused is refused while it is forwarded.
            format!("route add {all} via {at_pods}"),
        ])?;
        client.ip(&[
            format!("addr add {far}/{bits} dev c0 {flags}"),
            "link set c0 up".into(),
            format!("route add {all} via {near}"),
        ])?;
        pods.ip(&[
            format!("addr add {at_pods}/{bits} dev p0 {flags}"),
            "link set p0 up".into(),
            format!("route add {all} via {to_pods}"),
        ])?;
        for endpoint in services(family, Proto::Tcp).iter().flat_map(|s| &s.endpoints) {
            pods.ip(&[format!("addr add {} dev lo {flags}", endpoint.ip())])?;
            node.ip(&[format!("route add {} via {at_pods}", endpoint.ip())])?;
            pods.run(|| serve(*endpoint))??;
        }
        Ok(Self { client, node, janitor, family })
    }

    /// What an endpoint says: its own address, and the one that it was called from.
    fn call(&self, proto: Proto, to: SocketAddr) -> Result<std::io::Result<(SocketAddr, IpAddr)>> {
        let said = self.client.run(|| match proto {
            Proto::Tcp => call_tcp(to),
            Proto::Udp => call_udp(to, self.family),
        })?;
        let Ok(said) = said else { return Ok(said.map(|_| unreachable!("an error"))) };
        let (endpoint, from) = said.split_once(' ').with_context(|| format!("{said:?}"))?;
        Ok(Ok((endpoint.parse()?, from.parse::<SocketAddr>()?.ip())))
    }

    /// Every endpoint answers there, called from one address.
    fn reaches(&self, service: &Service, to: SocketAddr, from: &str) -> Result<()> {
        let mut found = BTreeSet::new();
        for _ in 0..CALLS {
            let (endpoint, source) =
                self.call(service.proto, to)?.with_context(|| format!("{:?} {to}", service.proto))?;
            ensure!(source == from.parse::<IpAddr>()?, "{to}: came from {source}, not {from}");
            found.insert(endpoint);
        }
        let wanted: BTreeSet<_> = service.endpoints.iter().copied().collect();
        ensure!(found == wanted, "{to}: reached {found:?} of {wanted:?}");
        Ok(())
    }

    fn check(&self, mode: Mode, proto: Proto) -> Result<()> {
        let [near, client, masqueraded, _] = places(self.family);
        let services = services(self.family, proto);
        let rules = kube_proxy::rules(mode, &Cluster::bench(self.family, near.parse()?), &services);
        self.node.run(|| kube_proxy::load(&rules))??;
        let [one, external, none] = &services[..] else { unreachable!("three Services") };
        let cluster_ip = |s: &Service| SocketAddr::new(s.cluster_ip, s.port);
        self.reaches(one, cluster_ip(one), client)?;
        self.reaches(external, cluster_ip(external), client)?;
        self.reaches(external, SocketAddr::new(near.parse()?, NODE_PORT), masqueraded)?;
        self.reaches(external, SocketAddr::new(load_balancer(self.family), 80), masqueraded)?;
        let refused = self.call(proto, cluster_ip(none))?;
        let refused = refused.err().with_context(|| format!("{none:?} answers"))?;
        ensure!(refused.kind() == ErrorKind::ConnectionRefused, "{refused}");
        self.node.run(|| kube_proxy::clear(&rules))??;
        let left = self.node.exec("nft list tables")?;
        ensure!(!left.contains("kube-proxy") && !left.contains("nat"), "left: {left}");
        Ok(())
    }
}

/// Answers on an address, TCP and UDP, until the process ends.
fn serve(at: SocketAddr) -> Result<()> {
    let (tcp, udp) = (TcpListener::bind(at)?, UdpSocket::bind(at)?);
    thread::spawn(move || {
        while let Ok((mut stream, from)) = tcp.accept() {
            std::io::Write::write_all(&mut stream, format!("{at} {from}").as_bytes()).ok();
        }
    });
    thread::spawn(move || {
        while let Ok((_, from)) = udp.recv_from(&mut [0; 16]) {
            udp.send_to(format!("{at} {from}").as_bytes(), from).ok();
        }
    });
    Ok(())
}

fn call_tcp(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, WITHIN)?;
    stream.set_read_timeout(Some(WITHIN))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

fn call_udp(to: SocketAddr, family: Family) -> std::io::Result<String> {
    let socket = match family {
        Family::V4 => UdpSocket::bind("0.0.0.0:0")?,
        Family::V6 => UdpSocket::bind("[::]:0")?,
    };
    socket.set_read_timeout(Some(WITHIN))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    let mut said = [0; 200];
    let len = socket.recv(&mut said)?;
    Ok(String::from_utf8_lossy(&said[..len]).into_owned())
}

fn check(family: Family) -> Result<()> {
    let mut bed = Bed::new(family)?;
    for mode in Mode::ALL {
        for proto in [Proto::Tcp, Proto::Udp] {
            bed.check(mode, proto).with_context(|| format!("{mode:?} {proto:?}"))?;
        }
    }
    bed.janitor.finish()
}

#[test]
fn rules_of_kube_proxy_lead_to_every_endpoint_ipv4() -> Result<()> {
    check(Family::V4)
}

#[test]
fn rules_of_kube_proxy_lead_to_every_endpoint_ipv6() -> Result<()> {
    check(Family::V6)
}

/// More Services than come in one transaction.
#[test]
fn every_service_of_many_is_in_the_rules() -> Result<()> {
    let services = kube_proxy::services(Family::V4, Proto::Udp, 900, 2);
    let cluster = Cluster::bench(Family::V4, IpAddr::from([192, 0, 2, 1]));
    let mut janitor = Janitor::start()?;
    let name = format!("lbkp-{}-many", std::process::id());
    janitor.will_remove(&Thing::Netns(name.clone()))?;
    let node = Netns::create(&name)?;
    for (mode, list) in [
        (Mode::Nftables, "nft list map ip kube-proxy service-ips"),
        (Mode::Iptables, "nft list chain ip nat KUBE-SERVICES"),
    ] {
        let rules = kube_proxy::rules(mode, &cluster, &services);
        node.run(|| kube_proxy::load(&rules))??;
        let text = node.exec(list)?;
        for service in &services {
            let address = format!("{} ", service.cluster_ip);
            ensure!(text.contains(&address), "{mode:?}: no {}", service.cluster_ip);
        }
        node.run(|| kube_proxy::clear(&rules))??;
    }
    janitor.finish()
}
