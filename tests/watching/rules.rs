//! Our files for Prometheus by its own judgement. Where promtool is not installed a test says so and passes.

use super::support::Command;
use super::web;
use std::path::{Path, PathBuf};

/// A file of `configs/monitoring`.
pub(crate) fn ours(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/monitoring").join(name)
}

#[test]
fn our_files_pass_promtools_checks_and_test_cases() {
    let Some(promtool) = web::program("promtool") else { return };
    for arguments in [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules/recording.yml"],
        ["check", "rules", "rules/alerts.yml"],
        ["test", "rules", "rules/test.yml"],
    ] {
        Command::new(&promtool).args(arguments).current_dir(ours("")).run().expect_code(0);
    }
}
