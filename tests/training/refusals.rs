//! What a run refuses, with exit code 2, and how one rank's trouble ends all.

use crate::Bench;
use crate::support::{Command, phalanx};
use std::time::Duration;

/// A second data set, made of other text.
fn prepare_other_data(bench: &Bench) {
    bench.scratch.write("other.txt", "entirely different words\n".repeat(2000));
    Command::new(phalanx())
        .args(["data", "prepare", "other.txt", "--out", "other", "--val-fraction", "0.1"])
        .current_dir(bench.scratch.path())
        .run()
        .expect_code(0);
}

#[test]
fn a_configuration_that_differs_in_what_is_fixed_is_refused_with_both_values() {
    let bench = Bench::new("fixed", 5);
    prepare_other_data(&bench);
    bench.train_alone("run", "").run().expect_code(0);
    let fixed = "--set model.n_layer=3 --set model.attention=[\"banded:8\"] --set run.seed=7 \
                 --set batch.global_batch_tokens=1024 --set optim.lr=1e-4 --set data.document_mask=true \
                 --set data.train=other/train --set data.val=other/val --set schedule.max_steps=9";
    bench.train_alone("run", fixed).run().expect_code(2).expect_stderr(&[
        "checkpoints/step-00000005 was made with another configuration",
        "model.n_layer is 3, the checkpoint was made with 2",
        "model.attention is [\"banded:8\"], the checkpoint was made with [\"dense\"]",
        "run.seed is 7, the checkpoint was made with 1337",
        "batch.global_batch_tokens is 1024, the checkpoint was made with 512",
        "optim.lr is 0.0001, the checkpoint was made with 0.001",
        "data.document_mask is true, the checkpoint was made with false",
        "data.train has the digest ",
        "data.val has the digest ",
        "--fresh",
    ]);
    let free = "--set schedule.max_steps=6 --set eval.every_steps=2 --set checkpoint.keep_last=1 \
                --set metrics.every_steps=1 --set checkpoint.every_steps=5";
    bench.train_alone("run", free).run().expect_code(0).expect_stderr(&["at step 5"]);
}

#[test]
fn a_vocabulary_smaller_than_the_datas_is_refused() {
    let told = ["model.vocab_size = 100", "data/train has 257 different tokens", "hint:"];
    let bench = Bench::new("vocabulary", 5);
    bench.train_alone("run", "--set model.vocab_size=100").run().expect_code(2).expect_stderr(&told);
    assert!(!bench.left("run").folder().exists());
}

#[test]
fn without_a_gpu_cuda_is_refused_by_name_and_auto_takes_the_cpu() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return; // what a GPU does is for scripts/gpu-check
    }
    let bench = Bench::new("cuda", 1);
    let told = ["parallel.device = \"cuda\": libcuda.so.1", "hint:", "parallel.device = \"cpu\" or \"auto\""];
    bench.train_alone("run", "--set parallel.device=cuda").run().expect_code(2).expect_stderr(&told);
    assert!(!bench.left("run").folder().exists());
    let told = ["computing on the CPU: libcuda.so.1"];
    bench.train_alone("run", "--set parallel.device=auto").run().expect_code(0).expect_stderr(&told);
}

#[test]
fn ranks_without_a_common_world_are_refused_before_anything_is_written() {
    let bench = Bench::new("srun", 5);
    for rank in ["0", "1"] {
        let task = bench.train_alone("run", "").env("SLURM_NTASKS", "2").env("SLURM_PROCID", rank);
        task.run().expect_code(2).expect_stderr(&["of 2", "hint:", "mpirun"]);
    }
    assert!(!bench.scratch.join("runs").exists());
}

#[test]
fn a_loss_that_is_no_number_stops_every_rank_before_the_update() {
    let bench = Bench::new("diverged", 20);
    let told = ["not finite, no rank made the update", "the samples were ", "the learning rate"];
    let ended = bench.train("run", 2, "--set optim.lr=1e30").run().expect_code(2).expect_stderr(&told);
    assert_eq!(ended.survivors, Vec::<String>::new());
    let losses = bench.left("run").of_steps("loss");
    assert!(losses.len() < 20 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    // What the message names is the step after the last one reported, and its samples.
    let (step, first) = (losses.len() as u64 + 1, losses.len() as u64 * 16);
    ended.expect_stderr(&[&format!("step {step}: loss"), &format!("{first}..{}", first + 16)]);
}

#[test]
fn an_error_on_one_rank_ends_all_within_seconds_and_names_the_rank() {
    let bench = Bench::new("error", 1000);
    std::fs::create_dir_all(bench.scratch.join("runs/run/logs/rank-00001.log")).unwrap();
    let told = ["[rank 1]", "runs/run/logs/rank-00001.log", "the same command goes on"];
    let ended = bench.train("run", 2, "").run().expect_code(1).expect_stderr(&told);
    assert!(ended.elapsed < Duration::from_secs(15), "{:?}", ended.elapsed);
    assert_eq!(ended.survivors, Vec::<String>::new());
}
