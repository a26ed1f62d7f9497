use proptest::prelude::*;

use super::*;

fn names(parsed: &Parsed) -> Vec<String> {
    parsed.objects.iter().map(|o| o.reference().to_string()).collect()
}

fn rejections(parsed: &Parsed) -> Vec<String> {
    parsed.rejected.iter().map(ToString::to_string).collect()
}

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  ports:
  - {name: http, port: 80, targetPort: http, protocol: TCP}
  - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
";

#[test]
fn reads_all_kinds_of_a_stream() {
    let text = format!(
        "# a comment\n---\n{SERVICE}--- # the slice\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata:\n  name: web-1\naddressType: IPv4\nendpoints:\n- addresses: [10.1.0.1]\nports: []\n\
         ---\n---\napiVersion: v1\nkind: Node\nmetadata: {{name: n1, namespace: ignored}}\n...\n"
    );
    let parsed = parse(&text, Format::Yaml);
    assert_eq!(rejections(&parsed), [""; 0]);
    assert_eq!(names(&parsed), ["Service shop/web", "EndpointSlice default/web-1", "Node n1"]);
    let Object::Service(service) = &parsed.objects[0] else { panic!() };
    let ports = service.spec.as_ref().unwrap().ports.as_ref().unwrap();
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    assert_eq!(ports[0].target_port, Some(IntOrString::String("http".into())));
    assert_eq!(ports[1].target_port, Some(IntOrString::Int(5353)));
}

#[test]
fn a_wrong_document_is_named_with_its_line_and_spoils_no_other() {
    let text = format!(
        "{SERVICE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: bad}}\nspec:\n  ports:\n  - port: eighty\n\
         ---\nkind: [unclosed\n---\n{}",
        SERVICE.replace("web", "after")
    );
    let parsed = parse(&text, Format::Yaml);
    assert_eq!(names(&parsed), ["Service shop/web", "Service shop/after"]);
    let [typed, syntax] = &parsed.rejected[..] else { panic!("{:?}", parsed.rejected) };
    // SERVICE has 8 lines, so the second document begins on line 9; `port: eighty` is its seventh line.
    assert_eq!((typed.document, typed.line), (2, Some(15)), "{typed}");
    assert_eq!(typed.object.as_ref().unwrap().to_string(), "Service default/bad");
    assert!(typed.reason.contains("eighty") || typed.reason.contains("i32"), "{typed}");
    assert_eq!((syntax.document, &syntax.object), (3, &None));
    assert!(syntax.line.is_some_and(|line| (17..=18).contains(&line)), "{syntax}");
}

#[test]
fn says_what_is_missing_or_not_supported() {
    for (text, reason) in [
        ("apiVersion: v1\nmetadata: {name: a}", "kind is missing"),
        ("kind: Service\nmetadata: {name: a}", "apiVersion is missing"),
        ("apiVersion: v1\nkind: Service\nmetadata: {}", "metadata.name is missing"),
        (
            "apiVersion: v2\nkind: Service\nmetadata: {name: a}",
            "apiVersion v2 of Service is not supported, only v1",
        ),
        (
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: a}",
            "apiVersion discovery.k8s.io/v1beta1 of EndpointSlice is not supported, only discovery.k8s.io/v1",
        ),
    ] {
        for format in [Format::Yaml, Format::Json] {
            let text = match format {
                Format::Yaml => text.to_owned(),
                Format::Json => serde_saphyr::from_str::<serde_json::Value>(text).unwrap().to_string(),
            };
            let parsed = parse(&text, format);
            assert_eq!(parsed.rejected.len(), 1, "{text}");
            assert_eq!(parsed.rejected[0].reason, reason);
        }
    }
}

#[test]
fn other_kinds_and_other_proxies_are_left_alone() {
    let text = "\
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: not-ours}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
---
apiVersion: v1
kind: Service
metadata: {name: theirs, labels: {service.kubernetes.io/service-proxy-name: other}}
---
apiVersion: v1
kind: Service
metadata: {name: headless, labels: {service.kubernetes.io/headless: \"\"}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: theirs-x, labels: {service.kubernetes.io/service-proxy-name: other}}
addressType: IPv4
endpoints: []
";
    let parsed = parse(text, Format::Yaml);
    // C7: what is not ours to serve is not ours to drop either, so its ClusterIP matters.
    assert_eq!(names(&parsed), ["Service default/theirs"]);
    assert_eq!((parsed.skipped.len(), parsed.rejected.len()), (4, 0));
}

#[test]
fn service_cidrs_have_no_namespace() {
    let text = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes, namespace: x}\nspec: {cidrs: [10.96.0.0/16]}\n";
    let json = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDRList", "items": [{"metadata": {"name": "kubernetes"}}]}"#;
    for (text, format) in [(text, Format::Yaml), (json, Format::Json)] {
        let parsed = parse(text, format);
        assert_eq!((names(&parsed), parsed.rejected.len()), (vec!["ServiceCIDR kubernetes".to_owned()], 0));
    }
}

#[test]
fn a_rejected_slice_says_whose_it_is_if_it_can() {
    let slice = |labels: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s{labels}}}\nendpoints: 5\n"
        )
    };
    let said = |labels| parse(&slice(labels), Format::Yaml).rejected[0].slice_of.clone();
    assert_eq!(said(", labels: {kubernetes.io/service-name: web}").as_deref(), Some("web"));
    assert_eq!(said(""), None);
    assert_eq!(said(", labels: [nonsense]"), None);
}

#[test]
fn lists_are_unpacked_and_their_items_judged_one_by_one() {
    let json = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": 5}},
        {"apiVersion": "v1", "kind": "List", "items": []},
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}}]}
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": [
        {"metadata": {"name": "c"}, "addressType": "IPv4", "endpoints": []}]}"#;
    for (text, format) in [(json.to_owned(), Format::Json), (json.replace("]}\n", "]}\n---\n"), Format::Yaml)]
    {
        let parsed = parse(&text, format);
        assert_eq!(names(&parsed), ["Service default/a", "Node n", "EndpointSlice default/c"], "{format:?}");
        let places: Vec<_> = parsed.rejected.iter().map(|r| (r.document, r.item)).collect();
        assert_eq!(places, [(1, Some(1)), (1, Some(2))], "{format:?}");
        assert_eq!(parsed.rejected[0].object.as_ref().unwrap().name, "b");
    }
}

#[test]
fn json_syntax_errors_have_a_line() {
    let parsed = parse(
        "{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"n\"}}\n{\n]",
        Format::Json,
    );
    assert_eq!(names(&parsed), ["Node n"]);
    assert_eq!((parsed.rejected[0].document, parsed.rejected[0].line), (2, Some(3)));
}

#[test]
fn files_without_documents_are_fine() {
    for text in ["", "\n", "# only a comment\n", "---\n---\n", "%YAML 1.2\n---\n...\n", "\u{feff}"] {
        let parsed = parse(text, Format::Yaml);
        assert!(parsed.objects.is_empty() && parsed.rejected.is_empty(), "{text:?}: {parsed:?}");
    }
    assert!(parse(" \n", Format::Json).rejected.is_empty());
}

#[test]
fn markers_within_scalars_and_windows_line_ends() {
    let text =
        SERVICE.replace('\n', "\r\n") + "---\r\n" + &SERVICE.replace("web", "b---b").replace('\n', "\r\n");
    let parsed = parse(&text, Format::Yaml);
    assert_eq!(rejections(&parsed), [""; 0]);
    assert_eq!(names(&parsed), ["Service shop/web", "Service shop/b---b"]);
}

#[test]
fn a_few_lines_do_not_become_gigabytes() {
    let mut bomb = String::from("a: &a [x, x, x, x, x, x, x, x, x]\n");
    for (this, last) in ('b'..='k').zip('a'..) {
        bomb += &format!(
            "{this}: &{this} [*{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}]\n"
        );
    }
    let parsed = parse(&format!("apiVersion: v1\nkind: List\nitems: []\n{bomb}"), Format::Yaml);
    assert_eq!(parsed.rejected.len(), 1, "{parsed:?}");
}

proptest! {
    #[test]
    fn any_text_is_read_without_a_panic(text in "(?s)[-a-z{}\\[\\]:&*\"'|>#%! \n\t]{0,200}") {
        parse(&text, Format::Yaml);
        parse(&text, Format::Json);
    }

    /// Each document of a stream begins on the line that is said, and together they are the stream.
    #[test]
    fn documents_are_cut_at_lines(lines in proptest::collection::vec("(---|--- |a: 1|#|  ---|----)", 0..20)) {
        let text = lines.join("\n");
        for (line, document) in documents(&text) {
            let skipped = text.lines().skip(line as usize - 1).collect::<Vec<_>>().join("\n");
            prop_assert!(skipped.starts_with(document.trim_end()), "{line}: {document:?} in {text:?}");
            prop_assert!(document.contains("a: 1") || document.contains("---"));
        }
    }
}

/// The API server's default for `ports[].name`; without it the port would match no Service port (rule A8).
#[test]
fn an_endpoint_slice_port_without_a_name_gets_the_empty_one() {
    let text = "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1\nmetadata: {name: web-1}\naddressType: IPv4\n\
                endpoints: []\nports: [{port: 80}, {port: 81, name: b}]\n";
    let parsed = parse(text, Format::Yaml);
    let [Object::EndpointSlice(slice)] = parsed.objects.as_slice() else { panic!("one slice") };
    let names: Vec<_> = slice.ports.iter().flatten().map(|p| p.name.as_deref()).collect();
    assert_eq!(names, [Some(""), Some("b")]);
}
