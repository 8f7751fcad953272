//! `phalanx data` as a person uses it: killed and started again, fed through a pipe, asked for ids.

use crate::support::{Scratch, phalanx, tiny_run};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// `phalanx data` with these arguments, split at spaces, in the scratch folder.
fn data(scratch: &Scratch, arguments: &str) -> Command {
    let mut command = Command::new(phalanx());
    command.arg("data").args(arguments.split(' ')).current_dir(scratch.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn told(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// All files below a folder, with a checksum of their bytes.
fn tree(folder: &Path) -> BTreeMap<PathBuf, u32> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = PathBuf::from(entry.file_name().unwrap());
        if entry.is_dir() {
            files.extend(tree(&entry).into_iter().map(|(path, sum)| (name.join(path), sum)));
        } else {
            files.insert(name, crc32fast::hash(&std::fs::read(&entry).unwrap()));
        }
    }
    files
}

#[test]
fn a_preparation_killed_ten_times_ends_with_the_bytes_of_an_undisturbed_one() {
    let scratch = Scratch::new("killed");
    let line =
        |i: usize| format!("{{\"text\": \"Document {i} says that the river ran under old stones.\"}}\n");
    scratch.write("a.jsonl", (0..120_000).map(line).collect::<String>());
    let arguments = "prepare a.jsonl --tokenizer gpt2 --shard-tokens 40000 --out";
    let began = Instant::now();
    told(&data(&scratch, &format!("{arguments} whole")).output().unwrap());
    let whole_ms = began.elapsed().as_millis() as u64;

    let mut killed = 0;
    for attempt in 0..200u64 {
        let mut child = data(&scratch, &format!("{arguments} out")).spawn().unwrap();
        // After a tenth to nine tenths of what it takes: here it is fast, there it is slow.
        let wait = if killed < 10 { whole_ms * (10 + attempt * 37 % 80) / 100 } else { 60_000 };
        for _ in 0..wait {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        killed += usize::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        let done = child.wait().unwrap().success();
        // The folder appears in one moment, after which a kill changes nothing.
        if done || scratch.join("out").exists() {
            break;
        }
    }
    assert!(killed > 0, "it was done before it could be killed");
    assert!(tree(&scratch.join("whole")) == tree(&scratch.join("out")), "after {killed} kills");
    assert!(!scratch.join("out.tmp").exists());
}

#[test]
fn ids_are_printed_one_document_a_line_from_a_pipe() {
    let scratch = Scratch::new("ids");
    let mut child = data(&scratch, "tokenize - --tokenizer gpt2").stdin(Stdio::piped()).spawn().unwrap();
    let text = "{\"text\": \"Hello, world!\"}\n{\"text\": \"<|endoftext|>\"}\n";
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let printed = told(&child.wait_with_output().unwrap());
    assert_eq!(printed, "[15496, 11, 995, 0]\n[27, 91, 437, 1659, 5239, 91, 29]\n");
}

#[test]
fn each_stage_of_curation_is_a_command_with_a_report() {
    let scratch = Scratch::new("curation");
    let good = |i: usize| {
        format!(
            "{{\"text\": \"The king of river {i} spoke, and his people heard him.\", \"score\": {}}}\n",
            i % 6
        )
    };
    let raw =
        |i: usize| format!("{{\"text\": \"click here to buy cheap offer {i} now now now\", \"score\": 1}}\n");
    scratch.write("good.jsonl", (0..100).map(good).collect::<String>());
    scratch.write("raw.jsonl", (0..100).map(raw).collect::<String>());
    let run = |arguments: &str| told(&data(&scratch, arguments).output().unwrap());

    let printed = run("filter good.jsonl --min score=3 --out votes.jsonl");
    assert!(
        printed.contains("100 documents, 49 kept") && printed.contains("51 dropped: filter: score below 3"),
        "{printed}"
    );
    let report = std::fs::read_to_string(scratch.join("votes.jsonl.report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["kept"], report["examples"].as_array().unwrap().len()), (&49.into(), 5));

    let printed = run("train-classifier --good good.jsonl --raw raw.jsonl --out c.classifier");
    assert!(printed.contains("100 good and 100 other documents; right about 100.0 %"), "{printed}");
    let printed = run("classify raw.jsonl --classifier c.classifier --out kept.jsonl.gz");
    assert!(printed.contains("dropped: classify: a low score"), "{printed}");
    let printed = run("dedup good.jsonl good.jsonl --out once.jsonl.zst");
    assert!(printed.contains("200 documents, 100 kept") || printed.contains("dropped: dedup"), "{printed}");
    let printed = run("decontaminate good.jsonl --against raw.jsonl --words 5 --out clean.jsonl");
    assert!(printed.contains("100 documents, 100 kept"), "{printed}");
    let printed =
        run("prepare good.jsonl raw.jsonl --min score=3 --decontaminate raw.jsonl --dedup --out out");
    assert!(printed.contains("out/train"), "{printed}");
    assert!(scratch.join("out.curation.json").exists());
}

#[test]
fn a_data_set_goes_to_other_formats_and_is_inspected_and_verified_there() {
    let scratch = Scratch::new("convert");
    scratch.write("a.txt", "In the beginning was the word.\n".repeat(100));
    let run = |arguments: &str| told(&data(&scratch, arguments).output().unwrap());
    run("prepare a.txt --tokenizer gpt2 --val-fraction 0 --out out");
    for (format, file) in [("llm-c", "l.bin"), ("nanogpt", "n.bin"), ("megatron", "m.bin")] {
        run(&format!("convert out/train --to {format} --out {file}"));
        assert!(run(&format!("inspect {file}")).contains("In the beginning was the word."), "{format}");
        assert!(run(&format!("verify {file}")).contains("whole"), "{format}");
        run(&format!("convert {file} --to phalanx --out back-{format}"));
        let shard = |folder: &str| std::fs::read(scratch.join(folder).join("shard-00000.tokens")).unwrap();
        // But for the record, which only our own data sets have.
        assert_eq!(shard("out/train").len(), shard(&format!("back-{format}")).len());
    }
}

#[test]
fn which_lists_the_documents_of_a_step() {
    let scratch = Scratch::new("which");
    tiny_run(&scratch, 10);
    let config = std::fs::read_to_string(scratch.join("tiny.toml")).unwrap();
    let resolved = configs::load(&scratch.write("r/config.in.toml", config), &[], &|_| Ok(257)).unwrap();
    scratch.write("r/config.toml", resolved.to_toml());
    let run = |arguments: &str| told(&data(&scratch, arguments).output().unwrap());
    let printed = run("which r --step 3");
    assert_eq!(printed.lines().count(), 16); // samples of one document
    assert!(printed.starts_with("sample 32: corpus.txt record 1, tokens "), "{printed}");
    let json: serde_json::Value =
        serde_json::from_str(run("which r --step 1 --json").lines().next().unwrap()).unwrap();
    assert_eq!((&json["sample"], &json["file"]), (&0.into(), &"corpus.txt".into()));
}
