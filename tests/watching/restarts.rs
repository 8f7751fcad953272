//! What is shown when a run starts again, and when it ends for good.

mod whole_table {
    use crate::Watched;
    use crate::support::{metrics, of_kind};
    use crate::web::{get, sample};
    use std::time::Duration;

    #[test]
    fn after_a_restart_targets_follow_the_new_ranks_and_the_launcher_counts_it() {
        let run = Watched::start("follow", "--set checkpoint.every_steps=20");
        let first = run.targets(3);
        run.until("a checkpoint", || {
            run.scratch.join("runs/tiny/checkpoints/step-00000020").exists().then_some(())
        });
        run.job.signal_rank(1, "KILL");
        run.targets(1);
        let second = run.targets(3);
        assert_eq!(first[0], second[0], "the launcher stays where it is");
        let launcher = get(&second[0].1, "/metrics");
        assert_eq!(sample(&launcher, "phalanx_restarts_total"), Some(1.0));
        assert_eq!(sample(&launcher, "phalanx_failures_total{fault=\"dead\"}"), Some(1.0));
        assert!(sample(&launcher, "phalanx_checkpoint_age_seconds").is_some_and(|age| age < 60.0));
        let tokens = run.until("tokens", || sample(&get(&second[1].1, "/metrics"), "phalanx_tokens_total"));
        assert!(tokens >= 20.0 * 512.0, "the run's total, not the start's: {tokens}");
        run.job.signal("TERM");
        run.job.finish().expect_code(3);
    }

    #[test]
    fn of_a_run_that_fails_the_last_numbers_are_served_to_whoever_looks_regularly() {
        let run = Watched::start("nan", "--inject nan@step=40,rank=1 --allow-faults");
        let launcher = run.targets(3)[0].1.clone();
        let failed = run.until("the failure", || {
            std::thread::sleep(Duration::from_millis(400));
            sample(&get(&launcher, "/metrics"), "phalanx_run_failed{fault=\"not_finite\"}")
        });
        assert_eq!(failed, 1.0);
        run.job.finish().expect_code(2);
        let events = metrics(&run.scratch.join("runs/tiny"));
        assert_eq!(of_kind(&events, "failure")[0]["fault"], "not_finite");
    }
}
