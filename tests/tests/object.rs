//! The kernel object as a file.

use lb_agent::datapath::OBJECT;
use object::{Object as _, ObjectSymbol as _};

/// Code that may panic (indexing, division, unwrap) pulls in `core::panicking`, whose functions do not return: the object
/// builds, and then does not load.
#[test]
fn object_contains_no_panic_path() {
    let file = object::File::parse(OBJECT).unwrap();
    let names: Vec<_> = file.symbols().filter_map(|s| s.name().ok()).collect();
    assert!(names.iter().any(|n| n.contains("lb_")), "no program in the object: {names:?}");
    let panics: Vec<_> = names.iter().filter(|n| n.to_lowercase().contains("panic")).collect();
    assert_eq!(panics, Vec::<&&str>::new());
}
