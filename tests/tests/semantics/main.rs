//! The rules of Services, one test each: real manifests, real agents on two nodes, real packets from pods, nodes and
//! outside. What is expected is what the rule says; docs/semantics.md has them all in a table.
//!
//! A module per section, each with one cluster; a rule's fixture is `tests/fixtures/semantics/RULE.yaml`. Fixtures have
//! addresses of their own, by section (a: 10, b: 11, ...) and number: 10.96.SECTION.RULE, fd00:10:96::SECTION:RULE,
//! NodePort 30000 + 100 * SECTION + RULE; externalIPs and LoadBalancer addresses are in 192.0.2.0/24 and
//! 2001:db8:192::/64.

mod a;
mod api_server;
mod b;
mod d;
mod f;
mod g;
mod i;
mod stray;
mod table;

use lb_tests::cluster::{Layout, Options};

/// The clusters of this file: routed pods, externalIPs allowed.
fn options() -> Options {
    Options::new(Layout::PointToPoint).flag("--allow-external-ips=192.0.2.0/24,2001:db8:192::/64")
}
