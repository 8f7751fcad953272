//! Compiles the C++ shim against libtorch and tells the linker where libtorch is at run time.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=kernels");
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
    attention_tiles();
    products();
    kernels_on_host();
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("csrc/allocator.cpp")
        .file("csrc/attention.cpp")
        .file("csrc/documents.cpp")
        .file("csrc/linear.cpp")
        .file("csrc/outside.cpp")
        .file("csrc/shim.cpp")
        .file("csrc/optimizer.cpp")
        .file("csrc/device_optimizer.cpp")
        .file("csrc/device_memory.cpp")
        .file("csrc/stream.cpp")
        .file("csrc/windowed.cpp")
        // Each file includes the operators that it calls: libtorch's headers then leave out all others.
        .define("AT_PER_OPERATOR_HEADERS", None)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        // Products and sums are rounded one by one, so that a result does not depend on whether an
        // element fell into the vectorised part of a loop or into its tail.
        .flag("-ffp-contract=off")
        .flag_if_supported("-Wno-unused-parameter")
        // Without it libtorch's `parallel_for` is a loop on one thread.
        .flag("-fopenmp")
        .opt_level(3)
        .compile("phalanx_shim");
    // The OpenMP that libtorch brings and loads: a second one would have threads of its own.
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
    // The rest of the workspace that links this crate needs the same path: see trainer/build.rs.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libtorch.join("lib").display());
}

/// The tiles of attention once for each instruction set; the program takes the best that the CPU has. They
/// include no header that other objects share, so that no instruction gets into those.
fn attention_tiles() {
    let plain: (&str, &[&str]) = ("plain", &[]);
    let avx2: (&str, &[&str]) = ("avx2", &["-DPHX_AVX2", "-mavx2", "-mfma"]);
    let avx512: (&str, &[&str]) = ("avx512", &["-DPHX_AVX512", "-mavx512f", "-mavx512vl", "-mfma"]);
    let x86 = std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");
    for (name, flags) in if x86 { vec![plain, avx2, avx512] } else { vec![plain] } {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3);
        build.file("csrc/attention_tiles.cpp").file("csrc/attention_half.cpp");
        // A product and the sum it goes into are rounded once, in every register block alike.
        build.flag("-ffp-contract=fast");
        allow_undefined_vectors(&mut build);
        flags.iter().for_each(|flag| {
            build.flag(flag);
        });
        build.compile(&format!("phalanx_attention_{name}"));
    }
}

/// The products and the attention of the CPU's matrix unit, where the compiler knows it; without it there are
/// none, and the program says so to itself.
fn products() {
    let flags =
        ["-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma"];
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).file("csrc/product_amx.cpp").file("csrc/attention_amx.cpp");
    let x86 = std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");
    if x86 && flags.iter().all(|flag| build.is_flag_supported(flag).unwrap_or(false)) {
        build.define("PHX_AVX512", None);
        allow_undefined_vectors(&mut build);
        flags.iter().for_each(|flag| {
            build.flag(flag);
        });
    }
    build.compile("phalanx_products");
}

/// What the intrinsics leave undefined on purpose is no mistake here.
fn allow_undefined_vectors(build: &mut cc::Build) {
    build.flag_if_supported("-Wno-maybe-uninitialized").flag_if_supported("-Wno-uninitialized");
}

/// The kernels of GPUs, compiled for the host: tests run them there. Programs do not refer to them, so the
/// linker leaves them out.
fn kernels_on_host() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .file("kernels/host.cpp")
        // As on a GPU: several numbers are read as one, and products and sums are rounded one by one.
        .flag("-fno-strict-aliasing")
        .flag("-ffp-contract=off")
        .compile("phalanx_kernels_on_host");
}
