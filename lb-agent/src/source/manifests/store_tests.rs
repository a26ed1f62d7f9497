use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::source::Kind;

fn service(name: &str, ip: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}}}\n---\n")
}

struct Bed {
    dir: TempDir,
    store: Store,
    changes: Changes,
}

impl Bed {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let store = Store::new(dir.path().to_owned());
        Self { dir, store, changes: Changes::default() }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// `+name=ip` and `-name` for each event of a scan.
    fn scan(&mut self) -> Vec<String> {
        self.changes = self.store.scan(&BTreeSet::new());
        let text = |event: &Event| match event {
            Event::Apply(Object::Service(s)) => format!(
                "+{}={}",
                s.metadata.name.as_deref().unwrap(),
                s.spec.as_ref().unwrap().cluster_ip.as_deref().unwrap()
            ),
            Event::Delete(r) => format!("-{}", r.name),
            other => panic!("{other:?}"),
        };
        self.changes.events.iter().map(text).collect()
    }

    fn findings(&self) -> usize {
        self.changes.findings.len()
    }
}

#[test]
fn tells_only_what_changed() {
    let mut bed = Bed::new();
    bed.write("a.yaml", &(service("a", "1") + &service("b", "2")));
    bed.write("readme.txt", "kind: Service");
    bed.write(".hidden.yaml", &service("hidden", "1"));
    assert_eq!(bed.scan(), ["+a=1", "+b=2"]);
    assert_eq!(bed.scan(), [""; 0]);
    bed.write("a.yaml", &(service("a", "1") + &service("b", "3") + &service("c", "4")));
    assert_eq!(bed.scan(), ["+b=3", "+c=4"]);
    bed.write("a.yaml", &service("c", "4"));
    assert_eq!(bed.scan(), ["-a", "-b"]);
    fs::remove_file(bed.dir.path().join("a.yaml")).unwrap();
    assert_eq!(bed.scan(), ["-c"]);
    assert!(bed.store.owners.is_empty() && bed.store.files.is_empty());
}

#[test]
fn an_invalid_document_leaves_the_last_good_state_of_its_object() {
    let mut bed = Bed::new();
    bed.write("a.yaml", &(service("a", "1") + &service("b", "2") + &service("c", "3")));
    bed.scan();
    let bad = "apiVersion: v1\nkind: Service\nmetadata: {name: b}\nspec: {ports: 5}\n";
    bed.write("a.yaml", &(service("a", "9") + bad));
    // b is spoilt and stays, c is not there any more.
    assert_eq!(bed.scan(), ["+a=9", "-c"]);
    let [Finding::Rejected { file, rejected }] = &bed.changes.findings[..] else {
        panic!("{:?}", bed.changes)
    };
    assert_eq!((&**file, rejected.object.as_ref().unwrap().name.as_str()), ("a.yaml", "b"));
    // Said once.
    bed.scan();
    assert_eq!(bed.findings(), 0);
    bed.write("a.yaml", &service("a", "9"));
    assert_eq!(bed.scan(), ["-b"]);
}

#[test]
fn a_document_that_cannot_be_named_takes_nothing_away() {
    let mut bed = Bed::new();
    bed.write("a.yaml", &(service("a", "1") + &service("b", "2")));
    bed.scan();
    bed.write("a.yaml", &(service("a", "9") + "kind: [unclosed\n"));
    assert_eq!(bed.scan(), ["+a=9"]);
    bed.write("a.yaml", &(service("a", "9") + &service("b", "2")));
    assert_eq!(bed.scan(), [""; 0]);
}

#[test]
fn of_two_files_with_an_object_the_first_by_name_counts() {
    let mut bed = Bed::new();
    bed.write("b.yaml", &service("x", "2"));
    assert_eq!(bed.scan(), ["+x=2"]);
    bed.write("c.yaml", &service("x", "3"));
    assert_eq!(bed.scan(), [""; 0]);
    let duplicate = |file: &str, counts: &str| Finding::Duplicate {
        file: file.into(),
        object: ObjectRef { kind: Kind::Service, namespace: "default".into(), name: "x".into() },
        counts: counts.into(),
    };
    assert_eq!(bed.changes.findings, [duplicate("c.yaml", "b.yaml")]);
    bed.write("a.yaml", &service("x", "1"));
    assert_eq!(bed.scan(), ["+x=1"]);
    bed.write("b.yaml", "");
    assert_eq!(bed.scan(), [""; 0]);
    fs::remove_file(bed.dir.path().join("a.yaml")).unwrap();
    assert_eq!(bed.scan(), ["+x=3"]);
    // Both at once, and twice in one file.
    bed.write("a.yaml", &(service("x", "1") + &service("x", "9")));
    fs::remove_file(bed.dir.path().join("c.yaml")).unwrap();
    assert_eq!(bed.scan().last().unwrap(), "+x=1");
    assert!(bed.changes.findings.contains(&duplicate("a.yaml", "a.yaml")));
}

#[test]
fn what_cannot_be_read_stays() {
    let mut bed = Bed::new();
    bed.write("a.yaml", &service("a", "1"));
    bed.scan();
    // Not UTF-8.
    fs::write(bed.dir.path().join("a.yaml"), b"kind: \xff").unwrap();
    assert_eq!(bed.scan(), [""; 0]);
    assert!(matches!(&bed.changes.findings[..], [Finding::Unreadable { file, .. }] if file == "a.yaml"));
    bed.scan();
    assert_eq!(bed.findings(), 0);
    // A directory, and a link to nowhere, where the file was.
    fs::remove_file(bed.dir.path().join("a.yaml")).unwrap();
    fs::create_dir(bed.dir.path().join("a.yaml")).unwrap();
    assert_eq!(bed.scan(), [""; 0]);
    fs::remove_dir(bed.dir.path().join("a.yaml")).unwrap();
    symlink("/nowhere/at/all", bed.dir.path().join("a.yaml")).unwrap();
    assert_eq!(bed.scan(), [""; 0]);
    // The whole directory.
    let aside = bed.dir.path().with_extension("aside");
    fs::rename(bed.dir.path(), &aside).unwrap();
    assert_eq!(bed.scan(), [""; 0]);
    assert!(bed.store.is_unreadable());
    bed.scan();
    assert_eq!(bed.findings(), 0);
    fs::rename(&aside, bed.dir.path()).unwrap();
    fs::remove_file(bed.dir.path().join("a.yaml")).unwrap();
    bed.write("a.yaml", &service("a", "1"));
    assert_eq!(bed.scan(), [""; 0]);
    fs::remove_file(bed.dir.path().join("a.yaml")).unwrap();
    assert_eq!(bed.scan(), ["-a"]);
}

#[test]
fn a_file_that_is_being_written_is_left_alone() {
    let mut bed = Bed::new();
    bed.write("a.yaml", &service("a", "1"));
    bed.write("b.yaml", &service("b", "1"));
    bed.scan();
    bed.write("a.yaml", "");
    bed.write("b.yaml", &service("b", "2"));
    let busy = BTreeSet::from(["a.yaml".to_owned()]);
    let changes = bed.store.scan(&busy);
    assert_eq!(changes.events.len(), 1);
    assert_eq!(bed.scan(), ["-a"]);
}

#[test]
fn a_config_map_is_swapped_whole() {
    let mut bed = Bed::new();
    let dir = bed.dir.path().to_owned();
    let version = |n: &str, ip: &str| {
        fs::create_dir(dir.join(n)).unwrap();
        fs::write(dir.join(n).join("a.yaml"), service("a", ip)).unwrap();
    };
    version("..1", "1");
    symlink("..1", dir.join("..data")).unwrap();
    symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    assert_eq!(bed.scan(), ["+a=1"]);
    version("..2", "2");
    symlink("..2", dir.join("..data_tmp")).unwrap();
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    assert_eq!(bed.scan(), ["+a=2"]);
}

fn spoilt(name: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: 5}}\n---\n")
}

/// The names of missing Services, and `?` if something cannot be named.
fn missing(bed: &Bed) -> Vec<String> {
    let missing = bed.store.missing();
    let unknown = missing.unknown.then(|| "?".to_owned());
    missing.services.into_iter().map(|(_, name)| name).chain(unknown).collect()
}

#[test]
fn what_was_never_good_is_missing_until_it_is_good_or_gone() {
    let mut bed = Bed::new();
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {name: x, labels: {kubernetes.io/service-name: web}}\nendpoints: 5\n---\n";
    bed.write("a.yaml", &(spoilt("a") + &service("b", "2") + slice));
    bed.write("z.yaml", &spoilt("z"));
    bed.scan();
    assert_eq!(missing(&bed), ["a", "web", "z"]);
    // What was good once has a last good state.
    bed.write("a.yaml", &(spoilt("a") + &spoilt("b")));
    bed.scan();
    assert_eq!(missing(&bed), ["a", "z"]);
    // Another file has it.
    bed.write("c.yaml", &service("a", "1"));
    bed.scan();
    assert_eq!(missing(&bed), ["z"]);
    // New and spoilt is no loss: nobody ever knew it.
    bed.write("a.yaml", &(spoilt("new") + &service("b", "2")));
    fs::remove_file(bed.dir.path().join("z.yaml")).unwrap();
    bed.scan();
    assert_eq!(missing(&bed), [""; 0]);
}

#[test]
fn a_file_that_cannot_be_understood_or_read_may_hold_anything() {
    let mut bed = Bed::new();
    bed.write("a.yaml", "kind: [unclosed\n");
    bed.scan();
    assert_eq!(missing(&bed), ["?"]);
    // Now it can be said what it was.
    bed.write("a.yaml", &spoilt("a"));
    bed.scan();
    assert_eq!(missing(&bed), ["a"]);
    bed.write("a.yaml", "kind: [unclosed\n");
    bed.scan();
    assert_eq!(missing(&bed), ["a"]);
    bed.write("a.yaml", &service("a", "1"));
    bed.scan();
    assert_eq!(missing(&bed), [""; 0]);
    bed.write("a.yaml", "kind: [unclosed\n");
    bed.scan();
    assert_eq!(missing(&bed), [""; 0], "its last good state stays");
    symlink("nowhere", bed.dir.path().join("b.yaml")).unwrap();
    bed.scan();
    assert_eq!(missing(&bed), ["?"]);
}
