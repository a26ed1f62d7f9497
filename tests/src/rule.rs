//! One rule of Service semantics at work: a fixture of manifests in a running cluster, and what traffic gets.
//!
//! ```ignore
//! let mut rule = CLUSTER.rule("a4");                              // tests/fixtures/semantics/a4.yaml, served by both nodes
//! rule.check([flows("client", To::LoadBalancer).get(&["pod-1a"])]);  // both families, TCP and UDP
//! rule.change(|f| { f.condition("pod-1a", draining()); });           // written, and served by both nodes
//! rule.check([flows("client", To::LoadBalancer).get(&["pod-1b"])]);
//! ```
//!
//! [`fixture`] loads and changes manifests, [`probe`] says what traffic is to get and finds out what it does get.

pub mod fixture;
mod mark;
pub mod probe;

use std::collections::BTreeMap;

use serde_json::Value;

use self::{
    fixture::Fixture,
    mark::{Mark, in_use},
    probe::Line,
};
use crate::{
    cluster::{Cluster, Options},
    place::Place,
    shared::{Guard, SOON, Shared},
    wait_for,
};

/// A cluster whose nodes are `tests/fixtures/semantics/nodes.yaml`, with an agent on each.
pub fn cluster(options: Options) -> anyhow::Result<Cluster> {
    let mut cluster = Cluster::new(options)?;
    cluster.manifests.write("nodes", &Fixture::load("nodes")?.documents)?;
    cluster.start_agents()?;
    Ok(cluster)
}

/// A rule's fixture in a cluster; taken out again when dropped.
pub struct Rule<'a> {
    pub cluster: Guard<'a>,
    pub fixture: Fixture,
    id: String,
    /// That of the last write.
    mark: Option<Mark>,
    /// The records of the last mark that was programmed, by node.
    records: BTreeMap<u8, u32>,
}

impl Shared {
    /// Writes the fixture of a rule and waits until both nodes serve it.
    ///
    /// # Panics
    /// If that does not work.
    pub fn rule(&self, id: &str) -> Rule<'_> {
        let mut rule = self.prepare(id);
        rule.apply();
        rule
    }

    /// The rule without its manifests: [`Rule::apply`] writes them.
    ///
    /// # Panics
    /// If there is no such fixture.
    pub fn prepare(&self, id: &str) -> Rule<'_> {
        let fixture = Fixture::load(id).unwrap_or_else(|e| panic!("{e:#}"));
        Rule { cluster: self.lock(), fixture, id: id.to_owned(), mark: None, records: BTreeMap::new() }
    }
}

impl Rule<'_> {
    /// Changes the manifests and waits until both nodes have programmed them.
    pub fn change(&mut self, change: impl FnOnce(&mut Fixture)) {
        change(&mut self.fixture);
        self.apply();
    }

    /// Writes the manifests and waits until both nodes have programmed them (see [`mark`]).
    ///
    /// # Panics
    /// If that takes too long.
    pub fn apply(&mut self) {
        let mark = Mark::new();
        self.mark = Some(mark);
        self.write();
        for node in &self.cluster.nodes {
            let last = self.records.get(&node.number).copied();
            let mut record = None;
            wait_for(&format!("{} to program {}", node.place.name, self.id), SOON, || {
                record = record.or_else(|| mark.record(node).ok().flatten());
                let old = || last.is_some_and(|last| in_use(node, last).unwrap_or(true));
                record.is_some() && !old()
            })
            .unwrap_or_else(|e| panic!("{e:#}"));
            self.records.extend(record.map(|record| (node.number, record)));
        }
    }

    /// Writes the manifests without waiting.
    ///
    /// # Panics
    /// If they cannot be written.
    pub fn write(&self) {
        let mut documents = self.fixture.documents.clone();
        documents.extend(self.mark.into_iter().flat_map(Mark::documents));
        self.cluster.manifests.write(&self.id, &documents).unwrap_or_else(|e| panic!("{e:#}"));
    }

    /// Traffic gets what these lines say.
    ///
    /// # Panics
    /// With everything that is not so.
    #[track_caller]
    pub fn check(&self, lines: impl IntoIterator<Item = Line>) {
        let mistakes = self.mistakes(&lines.into_iter().collect::<Vec<_>>());
        assert!(mistakes.is_empty(), "{}: {} mistakes:\n{}", self.id, mistakes.len(), mistakes.join("\n"));
    }

    /// Traffic comes to get what these lines say: for changes that [`Self::apply`] does not wait for.
    ///
    /// # Panics
    /// With everything that is not so in the end.
    #[track_caller]
    pub fn check_soon(&self, lines: impl IntoIterator<Item = Line>) {
        let lines: Vec<_> = lines.into_iter().collect();
        let mut mistakes = Vec::new();
        let waited = wait_for("it", SOON, || {
            mistakes = self.mistakes(&lines);
            mistakes.is_empty()
        });
        assert!(waited.is_ok(), "{}: {} mistakes:\n{}", self.id, mistakes.len(), mistakes.join("\n"));
    }

    /// A place by its name: `client`, `node2`, `pod-1a`.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn place(&self, name: &str) -> &Place {
        let found = self.cluster.places().find(|p| p.name == name);
        found.unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// A Service of the fixture; by default the one that is called like the rule.
    ///
    /// # Panics
    /// If there is none.
    pub fn service(&self, name: Option<&str>) -> &Value {
        let name = name.unwrap_or(&self.id);
        let mut all = self.fixture.documents.iter();
        all.find(|d| d["kind"] == "Service" && d["metadata"]["name"] == name)
            .unwrap_or_else(|| panic!("the fixture has no Service {name}"))
    }

    /// Its specification, to be changed.
    pub fn spec(&mut self) -> &mut Value {
        let name = self.id.clone();
        &mut self.fixture.object("Service", &name)["spec"]
    }
}

impl Drop for Rule<'_> {
    fn drop(&mut self) {
        // What a failed test leaves must not fail the others.
        self.cluster.manifests.remove(&self.id).ok();
    }
}
