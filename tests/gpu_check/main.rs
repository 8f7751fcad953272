//! `scripts/gpu-check` where no GPU is: what it packs runs, with the CPU in the place of the GPU its parts
//! hold and make a report, and what is missing is refused with 2.

#![allow(clippy::unwrap_used)] // unwrap is how a test fails

#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Command, Finished, Scratch, phalanx_rank};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/gpu-check")
}

fn gpu_check(script: &Path, scratch: &Scratch, arguments: &[&str]) -> Finished {
    let binary = phalanx_rank();
    let command = Command::new(script).args(arguments).current_dir(scratch.path());
    let packed = script.with_file_name("bin").exists();
    let command = if packed { command } else { command.args([Path::new("--binary"), &binary]) };
    command.deadline(Duration::from_secs(110)).run()
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { size(&path) } else { path.metadata().unwrap().len() }).sum()
}

#[test]
fn what_is_packed_runs_and_reports_with_the_cpu_in_the_place_of_a_gpu() {
    let scratch = Scratch::new("gpu-check");
    gpu_check(&script(), &scratch, &["--pack", "pack"]).expect_code(0);
    let pack = scratch.join("pack");
    for part in ["bin/phalanx-rank", "bin/mpirun", "lib/libmpi.so.40", "step.py"] {
        assert!(pack.join(part).exists(), "{part} was not packed");
    }
    let torch = std::fs::read_dir(pack.join("lib")).unwrap();
    let torch = torch.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("torch"));
    assert_eq!(torch.count(), 0, "libtorch comes with PyTorch, not with the pack");
    assert!(size(&pack) < 64 << 20, "{} bytes are packed", size(&pack));

    gpu_check(&pack.join("gpu-check"), &scratch, &["--device", "cpu", "--out", "out"]).expect_code(0);
    let report = std::fs::read_to_string(scratch.join("out/gpu-check.md")).unwrap();
    for line in [
        "All 24 checks held.",
        "| device | the CPU in the place of a GPU: a trial of the check |",
        "| forward and backward in fp32 are the CPU's | held |",
        "| 4 steps in bf16 follow the CPU's curve | held |",
        "| 2 ranks on one device pass the behaviour suite through host memory | held |",
        "| 2 ranks on one device follow the CPU's curve of 4 steps in fp32 | held | farthest loss 0 (at most ",
        "| residual and layer norm in bf16 is float64's | held |",
        "| two runs have the same bits | held | farthest loss 0 (at most 0) |",
        "| a run goes on from a CPU's checkpoint on the device, and from the device's on a CPU | held | farthest loss 0 (",
        "| a step at the tiny shape by phase | held | forward ",
        "| tiny | fp32 | 2 x 64 | phalanx |",
    ] {
        assert!(report.contains(line), "no {line:?} in\n{report}");
    }
    let json = std::fs::read_to_string(scratch.join("out/gpu-check.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["checks"].as_array().unwrap().len(), 24);
    assert!(json["speeds"][0]["mfu"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_part_that_breaks_off_is_in_the_report_and_exits_1() {
    let scratch = Scratch::new("broken-part");
    gpu_check(&script(), &scratch, &["--pack", "pack"]).expect_code(0);
    scratch.write_script("pack/bin/mpirun", "#!/bin/sh\nexit 7\n");
    scratch.write_script("pack/step.py", "raise SystemExit('no PyTorch')\n");
    let ended = gpu_check(&scratch.join("pack/gpu-check"), &scratch, &["--device", "cpu", "--out", "out"]);
    ended.expect_code(1);
    let report = std::fs::read_to_string(scratch.join("out/gpu-check.md")).unwrap();
    for line in
        ["**1 of 22 checks failed.**", "| the part ranks comes to its end | **failed** | exit code 7 |"]
    {
        assert!(report.contains(line), "no {line:?} in\n{report}");
    }
}

/// The seconds at which parts end, in the order of the script.
fn ends() -> Vec<u64> {
    let text = std::fs::read_to_string(script()).unwrap();
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let parts = words.filter(|words| {
        words.first().is_some_and(|first| ["part", "ranks", "pytorch", "until_second"].contains(first))
    });
    parts.filter_map(|words| words.get(1)?.parse().ok()).collect()
}

#[test]
fn every_part_has_a_while_of_its_own_and_the_last_ends_before_ten_minutes() {
    let ends = ends();
    assert_eq!(ends.len(), 9, "parts of a GPU, that of the trial and the report: {ends:?}");
    assert!(ends.windows(2).all(|pair| pair[0] < pair[1] || pair == [580, 440]), "{ends:?}");
    assert!(ends[ends.len() - 1] + 5 < 600, "with the grace of the last: {ends:?}");
}

#[test]
fn what_does_not_end_when_it_is_told_to_is_ended_at_its_second() {
    let scratch = Scratch::new("late");
    let text = std::fs::read_to_string(script()).unwrap();
    let begin = text.find("grace=5").unwrap();
    let end = text[begin..].find("\n}\n").unwrap() + begin + 3;
    let limits = text[begin..end].replace("grace=5", "grace=1");
    let stubborn = "bash -c 'trap : TERM; while :; do sleep 0.1; done'";
    let late = format!(
        "{limits}\ncode=0\nuntil_second 1 {stubborn} || code=$?\necho $code\nuntil_second 1 true || echo late\n"
    );
    scratch.write_script("late", &format!("#!/usr/bin/env bash\nset -euo pipefail\n{late}"));
    let started = std::time::Instant::now();
    let ended = Command::new(scratch.join("late")).deadline(Duration::from_secs(20)).run();
    ended.expect_code(0).expect_stdout(&["137", "late"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn without_a_gpu_it_says_so_and_exits_2() {
    if std::process::Command::new("nvidia-smi").output().is_ok_and(|output| output.status.success()) {
        use std::io::Write;
        writeln!(std::io::stderr(), "skipped: there is a GPU").unwrap();
        return;
    }
    let scratch = Scratch::new("no-gpu");
    gpu_check(&script(), &scratch, &["--out", "out"])
        .expect_code(2)
        .expect_stderr(&["no GPU to check: ", "hint: "]);
    assert!(!scratch.join("out/gpu-check.md").exists(), "there is nothing to report");
}

#[test]
fn what_is_not_torch_2_11_is_refused_with_a_hint() {
    let scratch = Scratch::new("other-torch");
    scratch.write("torch/version.py", "__version__ = '2.10.0+cu130'\n");
    for torch in ["torch", "nowhere"] {
        let told = ["no torch 2.11.0 in", "hint: "];
        gpu_check(&script(), &scratch, &["--torch", torch]).expect_code(2).expect_stderr(&told);
    }
    gpu_check(&script(), &scratch, &["--pcak", "x"]).expect_code(2).expect_stderr(&["unknown flag --pcak"]);
}
