//! What servers and clients should have seen, for a Service whose backends are pods and whose policies are Cluster.

use std::net::{IpAddr, SocketAddr};

use crate::{
    cluster::{Cluster, Node},
    place::Place,
    traffic::Answers,
};

/// Everything that is not as it should be about calls from one place to one frontend of a Service with these backends,
/// the packets of which come to the Service on node `asked` (for clients in the cluster: their own node).
pub fn mistakes(
    cluster: &Cluster,
    backends: &[&Place],
    asked: &Node,
    from: &Place,
    to: SocketAddr,
    answers: &Answers,
) -> Vec<String> {
    let mut mistakes = Vec::new();
    let failures = answers.failures();
    if let Some(first) = failures.first() {
        mistakes.push(format!("{} of {} got no answer: {}", failures.len(), answers.0.len(), first.message));
    }
    for name in answers.counts().keys().filter(|n| !backends.iter().any(|b| b.name == **n)) {
        mistakes.push(format!("{name} answered, which is no backend"));
    }
    if let Some(answer) = answers.0.iter().flatten().find(|a| a.peer != to) {
        mistakes.push(format!("the client was answered by {}, not by {to}", answer.peer));
    }
    for pod in backends {
        let sources = answers.sources(&pod.name);
        if sources.is_empty() {
            mistakes.push(format!("{} was never asked", pod.name));
        }
        for source in sources.iter().filter(|s| !may_see(cluster, asked, from, to, pod, **s)) {
            mistakes.push(format!("{} saw {source}, which it should not", pod.name));
        }
    }
    mistakes
}

/// Whether a pod may see this source address.
fn may_see(
    cluster: &Cluster,
    asked: &Node,
    from: &Place,
    to: SocketAddr,
    pod: &Place,
    source: IpAddr,
) -> bool {
    let Some(home) = cluster.nodes.iter().find(|n| n.pods.iter().any(|p| p.name == pod.name)) else {
        return false;
    };
    if from.name == cluster.client.name {
        // Kept, where the answer comes back through the node that was asked; else that node's own address.
        let shown = if home.number == asked.number { from } else { &asked.place };
        shown.addrs.has(source)
    } else if from.name == pod.name {
        // A pod that reaches itself must not see its own address: the answer would never leave it. Where its socket was
        // connected to itself from the start, no packet ever did.
        source == to.ip() || (cluster.options.hooks_in_pods() && from.addrs.has(source))
    } else if from.name == home.place.name {
        // A node's own choice of source address towards its own pods: that of the device between them.
        from.addrs.has(source) || home.gateway().has(source)
    } else {
        from.addrs.has(source)
    }
}
