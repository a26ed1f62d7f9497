//! Compiles lb-ebpf for the BPF target; `datapath.rs` embeds the object.
//!
//! `LB_EBPF_TOOLCHAIN` names the toolchain (a rustup name or a path such as `/usr`). Without it, Debian's own compiler is
//! used where its BPF standard library is installed, and rustup's nightly elsewhere. `cargo xtask setup` installs either.

use std::path::Path;

use anyhow::Context as _;
use aya_build::{Package, Toolchain};

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-env-changed=LB_EBPF_TOOLCHAIN");
    let wanted = std::env::var("LB_EBPF_TOOLCHAIN").ok();
    let toolchain = match wanted.as_deref() {
        Some(named) => Toolchain::Custom(named),
        None if Path::new("/usr/lib/rustlib/bpfel-unknown-none/lib").is_dir() => Toolchain::Custom("/usr"),
        None => Toolchain::Nightly,
    };
    if matches!(toolchain, Toolchain::Custom("/usr")) && std::env::var_os("RUSTC_BOOTSTRAP").is_none() {
        // SAFETY: a build script is single-threaded at this point.
        // aya-ebpf uses one unstable feature (asm_experimental_arch); allowing it for that crate alone keeps the
        // precompiled core library usable.
        unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf") };
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-ebpf");
    let root_dir = root.to_str().context("path of lb-ebpf is not UTF-8")?;
    aya_build::build_ebpf([Package { name: "lb-ebpf", root_dir, ..Default::default() }], toolchain)
        .context("cannot build the kernel programs; `cargo xtask setup` installs what that needs")
}
