//! Collectives under real mpirun: the behaviour suite on 1 to 4 ranks over every path, and how a
//! group of ranks ends when one of them fails.
//!
//! The ranks are this very executable: a test starts mpirun on it with `what_a_rank_does` selected, and
//! an environment variable says which body to run. Each start has a deadline.

#![allow(clippy::unwrap_used)] // unwrap is how a test fails

#[path = "../support/nodes.rs"]
#[allow(dead_code, unreachable_pub)] // as above
mod nodes;
#[path = "../support/process.rs"]
#[allow(dead_code, unreachable_pub)] // as in tests/support/mod.rs: each target uses its own part
mod process;

mod huge;
mod places;

use ops::collectives::{self, Communicator, Options, Staged};
use process::{Command, Finished};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Makes a process a rank, and says what it does.
const BODY: &str = "PHALANX_TEST_BODY";
/// How its ranks talk.
const PATH: &str = "PHALANX_TEST_PATH";

#[test]
fn every_number_of_ranks_passes_the_suite_through_shared_memory() {
    for ranks in 1..=4 {
        mpirun(ranks, "suite", "default").expect_code(0);
    }
}

#[test]
fn ranks_without_shared_memory_pass_the_suite_by_messages() {
    for ranks in [2, 3, 4] {
        mpirun(ranks, "suite", "messages").expect_code(0);
    }
}

#[test]
fn nodes_of_two_ranks_pass_the_suite() {
    for ranks in [3, 4] {
        mpirun(ranks, "suite", "nodes of two").expect_code(0);
    }
}

#[test]
fn ranks_with_buffers_on_a_device_pass_the_suite_through_host_memory() {
    // The device is the CPU here, with the copies of one that is not; host memory is buffers that ranks
    // made together, so this is also the suite over these.
    for ranks in [2, 3, 4] {
        mpirun(ranks, "suite", "staged").expect_code(0);
    }
    mpirun(4, "suite", "staged nodes of two").expect_code(0);
}

#[test]
fn ranks_that_call_different_things_are_told_so_by_name() {
    mpirun(3, "mismatch", "default").expect_code(0);
}

#[test]
fn a_panic_in_any_thread_of_one_rank_ends_all_and_is_named() {
    let ended = mpirun(3, "panic", "default").expect_code(1);
    assert!(ended.elapsed < Duration::from_secs(10), "{ended:?}");
    ended.expect_stderr(&[
        "[rank 1] ",
        "the helper is lost",
        "tests/collectives/main.rs",
        "collectives::fail",
    ]);
}

#[test]
fn abort_gives_its_code_to_mpirun() {
    let ended = mpirun(2, "abort", "default").expect_code(2);
    ended.expect_stderr(&["[rank 1] the shard is damaged"]);
}

#[test]
fn a_rank_that_ends_without_finalize_ends_the_job() {
    let ended = mpirun(2, "leave", "default");
    assert_ne!(ended.code, Some(0), "{ended:?}");
    assert!(ended.elapsed < Duration::from_secs(10), "{ended:?}");
}

#[test]
fn a_killed_rank_ends_the_job() {
    let ended = mpirun(2, "kill", "default");
    assert_ne!(ended.code, Some(0), "{ended:?}");
    assert!(ended.elapsed < Duration::from_secs(10), "{ended:?}");
}

#[test]
fn one_process_without_mpirun_is_one_rank() {
    rank("alone").run().expect_code(0);
}

#[test]
fn tasks_without_a_common_world_are_refused_with_a_hint() {
    // Slurm without PMIx, and a launcher that speaks another PMI than this MPI.
    for env in [[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")], [("PMI_RANK", "1"), ("PMI_SIZE", "2")]] {
        let alone = env.iter().fold(rank("alone"), |command, (name, value)| command.env(name, value));
        alone.run().expect_code(2).expect_stderr(&[
            "2 processes were started together",
            "hint: start them with `srun --mpi=pmix` or with mpirun",
        ]);
    }
}

/// Ends what it starts, and leaves nobody behind.
fn mpirun(ranks: usize, body: &str, path: &str) -> Finished {
    // One start at a time: ranks poll, and cores are few.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let command = Command::new("mpirun").args(mpirun_arguments(ranks));
    let ended = as_ranks(command, body, path).run();
    assert!(ended.survivors.is_empty(), "left behind {ended:?}");
    ended
}

fn mpirun_arguments(ranks: usize) -> [String; 5] {
    ["-n", &ranks.to_string(), "--oversubscribe", "--bind-to", "none"].map(str::to_owned)
}

/// A command that starts processes, given this executable as ranks.
fn as_ranks(command: Command, body: &str, path: &str) -> Command {
    command.args([std::env::current_exe().unwrap()]).args(SELECT).env(BODY, body).env(PATH, path)
}

/// This executable as a rank without mpirun.
fn rank(body: &str) -> Command {
    Command::new(std::env::current_exe().unwrap()).args(SELECT).env(BODY, body).env(PATH, "default")
}

const SELECT: [&str; 3] = ["--exact", "what_a_rank_does", "--nocapture"];

/// Without a body in the environment this is no rank, and there is nothing to do.
#[test]
fn what_a_rank_does() {
    let Ok(body) = std::env::var(BODY) else { return };
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let small = Options { piece_bytes: Some(64 << 10), ..Options::default() }; // many pieces
    let options = match std::env::var(PATH).unwrap().as_str() {
        "default" | "staged" => Options::default(),
        "messages" => Options { shared_memory: false, ..small },
        "nodes of two" | "staged nodes of two" => Options { ranks_per_node: Some(2), ..small },
        other => panic!("unknown path {other:?}"),
    };
    let comm = match collectives::init_with(&options) {
        Ok(comm) => comm,
        Err(error) => {
            use std::io::Write;
            writeln!(std::io::stderr(), "{error}").unwrap();
            std::process::exit(2);
        }
    };
    let comm: Box<dyn Communicator> = match std::env::var(PATH).unwrap().as_str() {
        path if path.starts_with("staged") => Box::new(Staged::new(comm, tch::Device::Cpu)),
        _ => comm,
    };
    collectives::abort_on_panic(&*comm);
    match body.as_str() {
        "suite" => suite(&*comm),
        "huge" => huge::gather(&*comm),
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
    let expected = "rank 2 all_reduce of 7 elements in fp32 where rank 0 all_reduce of 8 elements in fp32";
    assert!(error.contains(expected), "{error}");
    let outcome = if comm.rank() == 1 { comm.barrier() } else { comm.all_reduce(&buffer) };
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("rank 1 barrier"), "{error}");
}

/// Rank 1 fails; the others wait for it in a barrier.
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
        "kill" => {
            let kill = format!("kill -KILL {}", std::process::id());
            let _ = std::process::Command::new("sh").args(["-c", &kill]).status();
        }
        other => panic!("unknown body {other:?}"),
    }
    panic!("rank 1 outlived its end");
}
