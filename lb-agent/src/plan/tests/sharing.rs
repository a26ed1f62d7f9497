//! What several Services have in common: frontends that both claim, backends that both use.

use super::world::*;
use crate::{
    model::{
        Change::{self, DeleteService},
        Endpoint, ServiceKey,
    },
    plan::Rejection,
};

const VIP: &str = "10.96.0.1:80";

#[test]
fn of_two_services_that_claim_a_frontend_the_smaller_name_has_it_until_it_goes() {
    let world = &mut World::with([
        Change::Service(service("b", &["10.96.0.1"])),
        Change::Slice(slice("sb", "b", &[ready("10.0.0.2")])),
    ]);
    let plan = world.change([
        Change::Service(service("a", &["10.96.0.1"])),
        Change::Slice(slice("sa", "a", &[ready("10.0.0.1")])),
    ]);
    let (a, b) = (ServiceKey::new("default", "a"), ServiceKey::new("default", "b"));
    let taken = Rejection::FrontendTaken { service: b, frontend: frontend(VIP), owner: a.clone() };
    assert_eq!(plan.rejections, [taken]);
    assert_eq!(world.taken(), plan.rejections);
    assert_eq!(world.both(VIP), "10.0.0.1:8080");
    world.assert_right();
    let plan = world.change([DeleteService(a)]);
    assert_eq!(plan.rejections, []);
    assert_eq!(world.taken(), []);
    assert_eq!(world.both(VIP), "10.0.0.2:8080");
    world.assert_right();
}

#[test]
fn services_share_backends_and_disagreement_about_the_node_means_here() {
    let mut world = World::with([
        Change::Service(service("a", &["10.96.0.1"])),
        Change::Slice(slice("sa", "a", &[Endpoint { node: None, ..ready("10.0.0.1") }])),
    ]);
    assert!(!world.kernel.backends4[&1].local);
    world.change([
        Change::Service(service("b", &["10.96.0.2"])),
        Change::Slice(slice("sb", "b", &[ready("10.0.0.1").here()])),
    ]);
    assert_eq!(world.kernel.backends4.len(), 1);
    assert!(world.kernel.backends4[&1].local);
    world.change([DeleteService(ServiceKey::new("default", "b"))]);
    assert!(!world.kernel.backends4[&1].local);
    world.assert_right();
}
