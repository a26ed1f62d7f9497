//! Every field of the type: `staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go` of Kubernetes v1.36, with
//! `component-base`'s ClientConnectionConfiguration and LoggingConfiguration.

/// How a field is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bool,
    /// From the first to the second.
    Int(i64, i64),
    Number,
    Text,
    Texts,
    /// A Go duration, such as `1h0m0s`.
    Duration,
    /// Also a number of nanoseconds, for history's sake.
    DurationOrNanoseconds,
    /// Names of features, each `true` or `false`.
    Switches,
    /// Anything: it is not looked into.
    Any,
}

/// What becomes of a field that is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It takes effect, always or in some cases; `effects.rs` says how, and names it where it does not.
    Used,
    /// It means nothing here. Named once at the start, unless it has its zero value or this one, kube-proxy's default.
    Ignored(&'static str),
    /// The same for a field whose zero value means zero and not "default" (a pointer in Go).
    IgnoredPointer(&'static str),
}

/// One field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// From the root of the document, as in `conntrack.udpTimeout`.
    pub path: &'static str,
    pub kind: Kind,
    pub usage: Use,
}

const fn field(path: &'static str, kind: Kind, usage: Use) -> Field {
    Field { path, kind, usage }
}

const INT32: Kind = Kind::Int(i32::MIN as i64, i32::MAX as i64);
const UINT32: Kind = Kind::Int(0, u32::MAX as i64);

use Kind::{Any, Bool, Duration, DurationOrNanoseconds, Number, Switches, Text, Texts};
use Use::{Ignored, IgnoredPointer, Used};

/// Sorted by path, which [`find`] relies on.
pub const FIELDS: &[Field] = &[
    field("apiVersion", Text, Used),
    field("bindAddress", Text, Used),
    field("bindAddressHardFail", Bool, Ignored("false")),
    field("clientConnection.acceptContentTypes", Text, Ignored("")),
    field("clientConnection.burst", INT32, Ignored("10")),
    field("clientConnection.contentType", Text, Ignored("application/vnd.kubernetes.protobuf")),
    field("clientConnection.kubeconfig", Text, Used),
    field("clientConnection.qps", Number, Ignored("5")),
    field("clusterCIDR", Text, Ignored("")),
    field("configSyncPeriod", Duration, Ignored("15m")),
    // 0 leaves the host's table as it is, which is what happens here anyway.
    field("conntrack.maxPerCore", INT32, Ignored("32768")),
    field("conntrack.min", INT32, Ignored("131072")),
    field("conntrack.tcpBeLiberal", Bool, Used),
    field("conntrack.tcpCloseWaitTimeout", Duration, Used),
    field("conntrack.tcpEstablishedTimeout", Duration, Used),
    field("conntrack.udpStreamTimeout", Duration, Used),
    field("conntrack.udpTimeout", Duration, Used),
    field("detectLocal.bridgeInterface", Text, Ignored("")),
    field("detectLocal.interfaceNamePrefix", Text, Used),
    field("detectLocalMode", Text, Used),
    field("enableProfiling", Bool, Ignored("false")),
    field("featureGates", Switches, Ignored("")),
    field("healthzBindAddress", Text, Used),
    field("hostnameOverride", Text, Used),
    field("iptables.localhostNodePorts", Bool, Used),
    field("iptables.masqueradeAll", Bool, Used),
    field("iptables.masqueradeBit", INT32, IgnoredPointer("14")),
    field("iptables.minSyncPeriod", Duration, Ignored("1s")),
    field("iptables.snatNodeInternalIP", Bool, Ignored("false")),
    field("iptables.syncPeriod", Duration, Ignored("30s")),
    field("ipvs.excludeCIDRs", Texts, Ignored("")),
    field("ipvs.minSyncPeriod", Duration, Ignored("0s")),
    field("ipvs.scheduler", Text, Ignored("rr")),
    field("ipvs.strictARP", Bool, Ignored("false")),
    field("ipvs.syncPeriod", Duration, Ignored("30s")),
    field("ipvs.tcpFinTimeout", Duration, Ignored("0s")),
    field("ipvs.tcpTimeout", Duration, Ignored("0s")),
    field("ipvs.udpTimeout", Duration, Ignored("0s")),
    field("kind", Text, Used),
    field("logging.flushFrequency", DurationOrNanoseconds, Ignored("5s")),
    field("logging.format", Text, Used),
    field("logging.options.json.infoBufferSize", Any, Ignored("0")),
    field("logging.options.json.splitStream", Bool, Ignored("false")),
    field("logging.options.text.infoBufferSize", Any, Ignored("0")),
    field("logging.options.text.splitStream", Bool, Ignored("false")),
    field("logging.verbosity", UINT32, Used),
    field("logging.vmodule", Any, Ignored("")),
    field("metricsBindAddress", Text, Used),
    field("mode", Text, Used),
    field("nftables.masqueradeAll", Bool, Used),
    field("nftables.masqueradeBit", INT32, IgnoredPointer("14")),
    field("nftables.minSyncPeriod", Duration, Ignored("1s")),
    field("nftables.syncPeriod", Duration, Ignored("30s")),
    field("nodePortAddresses", Texts, Used),
    field("oomScoreAdj", INT32, IgnoredPointer("-999")),
    field("portRange", Text, Ignored("")),
    field("showHiddenMetricsForVersion", Text, Ignored("")),
    field("windowsRunAsService", Bool, Ignored("false")),
    field("winkernel.enableDSR", Bool, Ignored("false")),
    field("winkernel.forwardHealthCheckVip", Bool, Ignored("false")),
    field("winkernel.networkName", Text, Ignored("")),
    field("winkernel.rootHnsEndpointName", Text, Ignored("")),
    field("winkernel.sourceVip", Text, Ignored("")),
];

/// The field of that path.
pub fn find(path: &str) -> Option<&'static Field> {
    FIELDS.binary_search_by(|f| f.path.cmp(path)).ok().map(|i| &FIELDS[i])
}

/// True for a mapping that fields are in.
pub fn is_section(path: &str) -> bool {
    FIELDS.iter().any(|f| f.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_each_field_is_found() {
        assert!(FIELDS.is_sorted_by(|a, b| a.path < b.path));
        assert!(FIELDS.iter().all(|f| find(f.path).is_some_and(|found| found.path == f.path)));
        assert!(is_section("logging") && is_section("logging.options.text") && !is_section("mode"));
    }
}
