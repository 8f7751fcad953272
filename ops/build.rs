//! Compiles the C++ shim against libtorch and tells the linker where libtorch is at run time.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch =
        PathBuf::from(std::env::var("LIBTORCH").expect(
            "LIBTORCH is not set; hint: .cargo/config.toml sets it, build from within the repository",
        ));
    assert!(
        libtorch.join("lib/libtorch_cpu.so").exists(),
        "no libtorch in {}; hint: run scripts/setup, which installs it",
        libtorch.display()
    );
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("csrc/shim.cpp")
        .file("csrc/optimizer.cpp")
        .file("csrc/device_optimizer.cpp")
        .file("csrc/stream.cpp")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        // Products and sums are rounded one by one, so that a result does not depend on whether an
        // element fell into the vectorised part of a loop or into its tail.
        .flag("-ffp-contract=off")
        .flag_if_supported("-Wno-unused-parameter")
        .opt_level(3)
        .compile("phalanx_shim");
    // The rest of the workspace that links this crate needs the same path: see trainer/build.rs.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libtorch.join("lib").display());
}
