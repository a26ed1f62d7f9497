//! The manifests source on a real directory.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use lb_agent::source::{Event, manifests, status::SourceStatus};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

/// Only a test that fails waits for it.
const DEADLINE: Duration = Duration::from_secs(30);

struct Bed {
    dir: TempDir,
    rx: mpsc::Receiver<Event>,
    status: Arc<SourceStatus>,
    task: JoinHandle<Result<(), manifests::Error>>,
}

fn node(name: &str, cidr: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: {cidr}}}\n")
}

/// A directory with one node in it, being watched, and everything known at start received.
async fn start() -> Bed {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("a.yaml"), node("a", "10.0.0.0/24")).unwrap();
    let (tx, rx) = mpsc::channel(4);
    let status = Arc::new(SourceStatus::default());
    let task = tokio::spawn(manifests::run(dir.path().to_owned(), tx, status.clone()));
    let mut bed = Bed { dir, rx, status, task };
    assert_eq!(bed.next().await, "+a=10.0.0.0/24");
    assert_eq!(bed.next().await, "synced");
    bed
}

impl Bed {
    async fn next(&mut self) -> String {
        let event =
            timeout(DEADLINE, self.rx.recv()).await.expect("no event in time").expect("the source ended");
        match event {
            Event::Apply(lb_agent::source::Object::Node(node)) => {
                let cidr = node.spec.unwrap().pod_cidr.unwrap();
                format!("+{}={cidr}", node.metadata.name.unwrap())
            }
            Event::Delete(reference) => format!("-{}", reference.name),
            Event::Synced => "synced".into(),
            other => panic!("{other:?}"),
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

#[tokio::test]
async fn follows_writers_editors_and_removal() {
    let mut bed = start().await;
    assert!(bed.status.connected());
    fs::write(
        bed.path("b.json"),
        r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"b"},"spec":{"podCIDR":"1"}}"#,
    )
    .unwrap();
    assert_eq!(bed.next().await, "+b=1");
    // In place.
    fs::write(bed.path("a.yaml"), node("a", "2")).unwrap();
    assert_eq!(bed.next().await, "+a=2");
    // As editors do: a new file takes the name.
    fs::write(bed.path(".a.yaml.swp"), node("a", "3")).unwrap();
    fs::rename(bed.path(".a.yaml.swp"), bed.path("a.yaml")).unwrap();
    assert_eq!(bed.next().await, "+a=3");
    fs::remove_file(bed.path("b.json")).unwrap();
    assert_eq!(bed.next().await, "-b");
}

#[tokio::test]
async fn waits_for_a_writer_to_finish() {
    use std::io::Write as _;
    let mut bed = start().await;
    // `command > a.yaml`: empty until the command has something to say.
    let mut file = fs::File::create(bed.path("a.yaml")).unwrap();
    fs::write(bed.path("b.yaml"), node("b", "1")).unwrap();
    // Had the empty file been read with the other one, this would be "-a".
    assert_eq!(bed.next().await, "+b=1");
    let text = node("a", "2");
    let (begin, rest) = text.split_at(text.len() / 2);
    file.write_all(begin.as_bytes()).unwrap();
    fs::write(bed.path("c.yaml"), node("c", "1")).unwrap();
    assert_eq!(bed.next().await, "+c=1");
    file.write_all(rest.as_bytes()).unwrap();
    drop(file);
    assert_eq!(bed.next().await, "+a=2");
    assert_eq!(bed.status.rejected(), 0);
}

#[tokio::test]
async fn an_invalid_file_changes_nothing_and_is_counted() {
    let mut bed = start().await;
    fs::write(bed.path("a.yaml"), "kind: [").unwrap();
    fs::write(bed.path("b.yaml"), node("b", "1")).unwrap();
    // Only the valid one is heard of.
    assert_eq!(bed.next().await, "+b=1");
    assert_eq!(bed.status.rejected(), 1);
    fs::write(bed.path("a.yaml"), node("a", "5")).unwrap();
    assert_eq!(bed.next().await, "+a=5");
}

/// Puts a new version of a volume in place as the kubelet does (pkg/volume/util/atomic_writer.go).
fn swap(volume: &Path, version: &str, cidr: &str) {
    fs::create_dir(volume.join(version)).unwrap();
    fs::write(volume.join(version).join("c.yaml"), node("c", cidr)).unwrap();
    std::os::unix::fs::symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

#[tokio::test]
async fn follows_a_config_map() {
    let mut bed = start().await;
    fs::remove_file(bed.path("a.yaml")).unwrap();
    swap(bed.dir.path(), "..1", "1");
    std::os::unix::fs::symlink("..data/c.yaml", bed.path("c.yaml")).unwrap();
    let events: BTreeSet<_> = [bed.next().await, bed.next().await].into();
    assert_eq!(events, ["+c=1", "-a"].map(String::from).into());
    swap(bed.dir.path(), "..2", "2");
    assert_eq!(bed.next().await, "+c=2");
}

#[tokio::test]
async fn outlives_the_directory() {
    let mut bed = start().await;
    let aside = bed.dir.path().with_extension("aside");
    fs::rename(bed.dir.path(), &aside).unwrap();
    let lost = async {
        while bed.status.connected() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, lost).await.expect("never noticed");
    assert!(bed.rx.try_recv().is_err(), "objects went with the directory");
    // Another directory takes the path, complete from the first moment.
    let new = bed.dir.path().with_extension("new");
    fs::create_dir(&new).unwrap();
    fs::write(new.join("a.yaml"), node("a", "7")).unwrap();
    fs::rename(&new, bed.dir.path()).unwrap();
    assert_eq!(bed.next().await, "+a=7");
    // The new directory is watched too.
    fs::remove_file(bed.path("a.yaml")).unwrap();
    assert_eq!(bed.next().await, "-a");
    fs::remove_dir_all(aside).unwrap();
}

#[tokio::test]
async fn a_slow_receiver_loses_nothing() {
    let mut bed = start().await;
    let text: String = (0..100).map(|i| node(&format!("n{i:03}"), "1") + "---\n").collect();
    fs::write(bed.path("b.yaml"), text).unwrap();
    for i in 0..100 {
        assert_eq!(bed.next().await, format!("+n{i:03}=1"));
    }
}

#[tokio::test]
async fn ends_with_its_receiver() {
    let bed = start().await;
    drop(bed.rx);
    timeout(DEADLINE, bed.task).await.expect("still running").unwrap().unwrap();
}

#[tokio::test]
async fn a_missing_directory_is_an_error_at_start() {
    for (path, reason) in [("/nowhere/at/all", "No such file"), ("/proc/self/status", "Not a directory")] {
        let (tx, _rx) = mpsc::channel(1);
        let error =
            manifests::run(Path::new(path).to_owned(), tx, Arc::default()).await.unwrap_err().to_string();
        assert!(error.contains(path) && error.contains(reason), "{error}");
    }
}
