//! Tells the linker where the binary finds libtorch at run time: beside itself when packed, else where
//! `scripts/setup` put it. Nobody sets LD_LIBRARY_PATH.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = std::env::var("LIBTORCH")
        .expect("LIBTORCH is not set; hint: .cargo/config.toml sets it, build from within the repository");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/lib:{libtorch}/lib");
}
