//! What `make dist` packs runs where it is put, with the libraries that came along.

use crate::Bench;
use crate::support::Command;
use std::path::Path;

#[test]
fn what_is_packed_trains_from_another_folder_with_its_own_libtorch() {
    let bench = Bench::new("packed", 4);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let away = bench.scratch.join("away/phalanx");
    Command::new(repository.join("scripts/dist"))
        .args(["--no-archive", &away.display().to_string()])
        .run()
        .expect_code(0);
    let libraries = Command::new("ldd").args([&away.join("phalanx-rank")]).run().expect_code(0);
    libraries.expect_stdout(&[&format!("{}/lib/libtorch_cpu.so", away.display())]);
    Command::new(away.join("phalanx"))
        .args(["train", "tiny.toml", "-n", "2", "--oversubscribe"])
        .current_dir(bench.scratch.path())
        .run()
        .expect_code(0);
    assert!(bench.left("tiny").checkpoint(4).exists());
    assert!(away.join("configs/gpt3-175b.toml").is_file());
}
