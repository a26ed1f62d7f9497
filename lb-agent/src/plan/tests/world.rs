//! A model, a planner and a kernel that follow each other, and short ways to make objects.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use lb_common::frontend::flags;

use super::{
    kernel::{Decision, Kernel},
    reference::{self, ORIGINS, answers},
};
use crate::{
    model::{
        AddressType, Change, Conditions, Dirty, Endpoint, EndpointSlice, ExternalPolicy, Hints,
        InternalPolicy, Model, Node, Service, ServiceKey, ServicePort, ServiceType, SliceKey, SlicePort,
    },
    plan::{
        Capacities, NodeView, Plan, Planner, Rejection,
        op::{Family, Frontend, Protocol},
    },
    settings::NodePortAddresses,
};

pub const NODE: &str = "node-a";

pub const ROOMY: Capacities = Capacities {
    frontends: 1000,
    services: 1000,
    slots: 10_000,
    backends: 1000,
    members: 1000,
    source_ranges: 1000,
};

pub struct World {
    pub model: Model,
    pub node: NodeView,
    pub planner: Planner,
    pub kernel: Kernel,
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// `10.96.0.1:80` for TCP, `udp 10.96.0.1:53` otherwise.
pub fn frontend(text: &str) -> Frontend {
    let (protocol, at) = match text.split_once(' ') {
        Some(("udp", at)) => (Protocol::Udp, at),
        _ => (Protocol::Tcp, text),
    };
    let at: std::net::SocketAddr = at.parse().expect("an address and a port");
    Frontend { addr: at.ip(), port: at.port(), protocol }
}

/// A Service of type ClusterIP with one unnamed TCP port 80.
pub fn service(name: &str, cluster_ips: &[&str]) -> Service {
    Service {
        key: ServiceKey::new("default", name),
        kind: ServiceType::ClusterIp,
        headless: false,
        cluster_ips: cluster_ips.iter().map(|t| ip(t)).collect(),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: None,
        internal_policy: InternalPolicy::Cluster,
        external_policy: ExternalPolicy::Cluster,
        affinity_timeout_s: None,
        proxy_name: None,
        health_check: None,
        ports: vec![port("", Protocol::Tcp, 80, 0)],
    }
}

pub fn port(name: &str, protocol: Protocol, port: u16, node_port: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port, node_port }
}

/// A slice with one unnamed TCP port 8080.
pub fn slice(name: &str, service: &str, endpoints: &[Endpoint]) -> EndpointSlice {
    let family = endpoints.first().map_or(Family::V4, |e| Family::of(e.addr));
    EndpointSlice {
        key: SliceKey::new("default", name),
        service: Some(service.into()),
        address_type: AddressType::Ip(family),
        ports: [SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        endpoints: endpoints.into(),
    }
}

/// A ready endpoint on some other node.
pub fn ready(addr: &str) -> Endpoint {
    let conditions = Conditions { ready: true, serving: true, terminating: false };
    Endpoint { addr: ip(addr), conditions, node: Some("node-b".into()), hints: None }
}

pub fn terminating(addr: &str) -> Endpoint {
    let conditions = Conditions { ready: false, serving: true, terminating: true };
    Endpoint { conditions, ..ready(addr) }
}

pub fn unready(addr: &str) -> Endpoint {
    let conditions = Conditions { ready: false, serving: false, terminating: false };
    Endpoint { conditions, ..ready(addr) }
}

impl Endpoint {
    pub fn here(self) -> Self {
        Self { node: Some(NODE.into()), ..self }
    }
    pub fn hinted(self, zones: &[&str], nodes: &[&str]) -> Self {
        let names = |list: &[&str]| list.iter().map(|n| Arc::from(*n)).collect();
        Self { hints: Some(Box::new(Hints { zones: names(zones), nodes: names(nodes) })), ..self }
    }
}

impl World {
    pub fn new(capacities: Capacities) -> Self {
        let model = Model::new(NODE);
        let addresses = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "127.0.0.1"].map(ip);
        let allowed = ["203.0.113.0/28".parse().expect("a prefix")];
        let mut node = NodeView::new(&model, &NodePortAddresses::All, &allowed, &addresses);
        node.zone = Some("zone-a".into());
        let planner = Planner::new(capacities);
        let mut world = Self { model, node, planner, kernel: Kernel::new(capacities) };
        assert_eq!(world.plan_all().ops, []);
        world
    }

    /// A world with these objects in it.
    pub fn with(changes: impl IntoIterator<Item = Change>) -> Self {
        let mut world = Self::new(ROOMY);
        world.change(changes);
        world
    }

    /// Takes the changes in, plans once, carries out.
    pub fn change(&mut self, changes: impl IntoIterator<Item = Change>) -> Plan {
        let mut dirty = BTreeSet::new();
        let mut all = false;
        for change in changes {
            if let Change::Node(node) = &change {
                self.node.zone = node.zone.clone();
            }
            match self.model.apply(change) {
                Dirty::Nothing => {}
                Dirty::Services(keys) => dirty.extend(keys),
                Dirty::All => all = true,
                Dirty::ServiceCidrs => {}
            }
        }
        if all {
            return self.plan_all();
        }
        let plan = self.planner.plan_services(&self.model, &self.node, &dirty);
        self.carry_out(&plan);
        plan
    }

    pub fn plan_all(&mut self) -> Plan {
        let plan = self.planner.plan_all(&self.model, &self.node);
        self.carry_out(&plan);
        plan
    }

    /// Carries the plan out, looking at every frontend after every operation: each flow must find the old state of its
    /// Service or the new one. A change of policy and of endpoints in one plan may look like two, endpoints first.
    fn carry_out(&mut self, plan: &Plan) {
        let before = self.kernel.clone();
        self.kernel.apply_all(&plan.ops);
        let after = &self.kernel;
        let mut now = before.clone();
        now.begin();
        for op in &plan.ops {
            now.apply(op);
            for frontend in now.frontends.keys() {
                for origin in ORIGINS {
                    let seen = now.decide(frontend, origin);
                    let endpoints_first = || {
                        let old = before.frontends.get(frontend)?;
                        after
                            .services
                            .contains_key(&old.service)
                            .then(|| after.decide_as(frontend, *old, origin))
                    };
                    assert!(
                        seen == after.decide(frontend, origin)
                            || before.frontends.contains_key(frontend)
                                && seen == before.decide(frontend, origin)
                            || Some(&seen) == endpoints_first().as_ref(),
                        "{frontend} from {origin:?} gets {seen:?} after {op:?}\n{:#?}",
                        plan.ops
                    );
                }
            }
        }
    }

    /// The kernel does what the reference says, for everything.
    pub fn assert_right(&self) {
        let answers = answers(&self.model, &self.node);
        let frontends: BTreeSet<_> = answers.keys().chain(self.kernel.frontends.keys()).collect();
        for frontend in frontends {
            for (i, origin) in ORIGINS.into_iter().enumerate() {
                let expected = answers.get(frontend).map_or(Decision::Pass, |a| a[i].clone());
                assert_eq!(self.kernel.decide(frontend, origin), expected, "{frontend} from {origin:?}");
            }
        }
        self.kernel.assert_consistent();
        assert_eq!(self.kernel.addresses, reference::addresses(&self.model, &self.node));
        self.assert_right_sources();
    }

    /// LoadBalancer frontends admit whom they should, others everybody.
    fn assert_right_sources(&self) {
        let sources = ["198.51.100.1", "192.0.2.1", "10.1.0.9", "10.2.0.9", "2001:db8::1", "2001:db9::1"];
        for (frontend, value) in &self.kernel.frontends {
            let service = self.model.service(&self.planner.records[&value.service].owner).expect("a Service");
            let is_lb = value.flags & flags::KIND_MASK == flags::KIND_LOAD_BALANCER;
            for source in sources.map(ip) {
                if Family::of(source) == Family::of(frontend.addr) {
                    let expected = !is_lb || reference::admits(service, source, &self.node);
                    assert_eq!(self.kernel.admits(frontend, source), expected, "{source} to {frontend}");
                }
            }
        }
    }

    /// The agent is killed and started again.
    pub fn restart(&mut self) {
        let (planner, anomalies) = Planner::recover(self.kernel.capacities, self.kernel.read());
        assert_eq!(anomalies, []);
        self.planner = planner;
    }

    /// What a flow from inside and one from outside get, as text.
    pub fn ask(&self, to: &str) -> [String; 2] {
        ORIGINS.map(|origin| match self.kernel.decide(&frontend(to), origin) {
            Decision::Pass => "pass".to_owned(),
            Decision::Refuse => "refuse".to_owned(),
            Decision::Drop => "drop".to_owned(),
            Decision::To(set) => {
                set.iter().map(|(addr, port)| format!("{addr}:{port}")).collect::<Vec<_>>().join(" ")
            }
        })
    }

    /// What both get.
    pub fn both(&self, to: &str) -> String {
        let [inside, outside] = self.ask(to);
        assert_eq!(inside, outside, "{to}");
        inside
    }

    pub fn taken(&self) -> Vec<Rejection> {
        self.planner.rejections()
    }
}

/// This node's object.
pub fn node(zone: Option<&str>) -> Change {
    Change::Node(Node {
        name: NODE.into(),
        zone: zone.map(Arc::from),
        internal_ips: Vec::new(),
        external_ips: Vec::new(),
    })
}

/// This Service with these endpoints in one slice.
pub fn with(service: Service, endpoints: &[Endpoint]) -> World {
    let name = service.key.name.to_string();
    let world = World::with([Change::Service(service), Change::Slice(slice("s", &name, endpoints))]);
    world.assert_right();
    world
}

/// A Service of every external kind with policy Local.
pub fn external_local() -> Service {
    Service {
        kind: ServiceType::LoadBalancer,
        external_ips: vec![ip("203.0.113.1")],
        load_balancer_ips: vec![ip("198.51.100.1")],
        external_policy: ExternalPolicy::Local,
        ports: vec![port("", Protocol::Tcp, 80, 30080)],
        ..service("web", &["10.96.0.1"])
    }
}

/// Its frontends except the ClusterIP, 10.96.0.1:80.
pub const EXTERNAL: [&str; 4] = ["192.0.2.1:30080", "192.0.2.2:30080", "198.51.100.1:80", "203.0.113.1:80"];
