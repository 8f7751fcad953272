//! Collectives under real mpirun: the behaviour suite on 1 to 4 ranks over every path, and how a
//! group of ranks ends when one of them fails.
//!
//! The ranks are this very executable: a test starts mpirun on it with `what_a_rank_does` selected, and
//! an environment variable says which body to run. Each start has a deadline.

#![allow(clippy::unwrap_used)] // unwrap is how a test fails

mod mpirun;

use mpirun::{Run, mpirun};
use ops::collectives::{self, Communicator, Options};
use rustix::process::{Signal, getpid, kill_process};
use std::time::Duration;

#[test]
fn every_number_of_ranks_passes_the_suite_through_shared_memory() {
    for ranks in 1..=4 {
        mpirun(ranks, "suite", &[]).assert_done();
    }
}

#[test]
fn ranks_without_shared_memory_pass_the_suite_by_messages() {
    for ranks in [2, 3, 4] {
        mpirun(ranks, "suite", &[("PHALANX_TEST_PATH", "messages")]).assert_done();
    }
}

#[test]
fn nodes_of_two_ranks_pass_the_suite() {
    for ranks in [3, 4] {
        mpirun(ranks, "suite", &[("PHALANX_TEST_PATH", "nodes of two")]).assert_done();
    }
}

#[test]
fn ranks_that_call_different_things_are_told_so_by_name() {
    mpirun(3, "mismatch", &[]).assert_done();
}

#[test]
fn a_panic_in_any_thread_of_one_rank_ends_all_and_is_named() {
    let run = mpirun(3, "panic", &[]);
    assert_eq!(run.code, Some(1), "{run}");
    assert!(run.took < Duration::from_secs(10), "{run}");
    for part in ["[rank 1] ", "the helper is lost", "tests/collectives/main.rs"] {
        assert!(run.output.contains(part), "no {part:?} in {run}");
    }
}

#[test]
fn abort_gives_its_code_to_mpirun() {
    let run = mpirun(2, "abort", &[]);
    assert_eq!(run.code, Some(2), "{run}");
    assert!(run.output.contains("[rank 1] the shard is damaged"), "{run}");
}

#[test]
fn a_rank_that_ends_without_finalize_ends_the_job() {
    let run = mpirun(2, "leave", &[]);
    assert_ne!(run.code, Some(0), "{run}");
    assert!(run.took < Duration::from_secs(10), "{run}");
}

#[test]
fn a_killed_rank_ends_the_job() {
    let run = mpirun(2, "kill", &[]);
    assert_ne!(run.code, Some(0), "{run}");
    assert!(run.took < Duration::from_secs(15), "{run}");
}

#[test]
fn one_process_without_mpirun_is_one_rank() {
    Run::alone("alone", &[]).assert_done();
}

#[test]
fn tasks_without_a_common_world_are_refused_with_a_hint() {
    // Slurm without PMIx, and a launcher that speaks another PMI than this MPI.
    for env in [[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")], [("PMI_RANK", "1"), ("PMI_SIZE", "2")]] {
        let run = Run::alone("alone", &env);
        assert_eq!(run.code, Some(2), "{run}");
        assert!(run.output.contains("2 processes were started together"), "{run}");
        assert!(run.output.contains("hint: start them with `srun --mpi=pmix` or with mpirun"), "{run}");
    }
}

/// What a rank does; without a body in the environment this is no rank and there is nothing to do.
#[test]
fn what_a_rank_does() {
    let Ok(body) = std::env::var(mpirun::BODY) else { return };
    let options = match std::env::var("PHALANX_TEST_PATH").as_deref() {
        Err(_) => Options::default(),
        Ok("messages") => Options { shared_memory: false, piece_bytes: 64 << 10, ..Options::default() },
        Ok("nodes of two") => {
            Options { ranks_per_node: Some(2), piece_bytes: 64 << 10, ..Options::default() }
        }
        Ok(other) => panic!("unknown path {other:?}"),
    };
    let comm = match collectives::init_with(&options) {
        Ok(comm) => comm,
        Err(error) => {
            mpirun::say(&error.to_string());
            std::process::exit(2);
        }
    };
    collectives::abort_on_panic(&*comm);
    match body.as_str() {
        "suite" => suite(&*comm),
        "mismatch" => mismatch(&*comm),
        "alone" => assert_eq!((comm.rank(), comm.world_size()), (0, 1)),
        failure => fail(comm, failure),
    }
    comm.finalize().unwrap();
}

fn suite(comm: &dyn Communicator) {
    let place = comm.place();
    let launched: usize = std::env::var("OMPI_COMM_WORLD_SIZE").unwrap().parse().unwrap();
    assert_eq!(place.world_size, launched);
    assert!(place.rank < launched && place.local_rank < place.local_size && place.node < place.nodes);
    for check in collectives::suite::suite(comm) {
        assert!(check.outcome.is_ok(), "{}: {:?}", check.name, check.outcome);
    }
}

fn mismatch(comm: &dyn Communicator) {
    let numel = if comm.rank() == 2 { 7 } else { 8 };
    let buffer = tch::Tensor::zeros([numel], (tch::Kind::Float, tch::Device::Cpu));
    let error = comm.all_reduce(&buffer).unwrap_err().to_string();
    let expected = "rank 2 all_reduce of 7 elements where rank 0 all_reduce of 8 elements";
    assert!(error.contains(expected), "{error}");
    let error = if comm.rank() == 1 { comm.barrier() } else { comm.all_reduce(&buffer) };
    assert!(error.unwrap_err().to_string().contains("rank 1 barrier"));
}

/// The last rank, or rank 1, fails; the others wait for it in a barrier.
fn fail(comm: Box<dyn Communicator>, how: &str) -> ! {
    if comm.rank() != 1 {
        let _ = comm.barrier();
        panic!("rank {} was not ended", comm.rank());
    }
    match how {
        "panic" => {
            let helper = std::thread::spawn(|| -> () { panic!("the helper is lost") });
            let _ = helper.join();
        }
        "abort" => comm.abort(2, "the shard is damaged"),
        "leave" => {
            drop(comm);
            std::process::exit(0);
        }
        "kill" => kill_process(getpid(), Signal::KILL).unwrap(),
        other => panic!("unknown body {other:?}"),
    }
    panic!("rank 1 outlived its end");
}
