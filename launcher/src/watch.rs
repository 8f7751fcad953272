//! What heartbeats say about a job: who is slow, who has stopped, who hangs. Takes time as an argument, knows
//! neither sockets nor processes, and names ranks as people need them named.
//!
//! Ranks advance in lockstep, so one that stops moving stops them all. A job hangs when none of its ranks
//! has shown a sign of life for as long as the configuration allows: no progress, and no processor time of a
//! thread that trains. Then the one that the others wait for is the one that has begun fewer collectives. A
//! rank whose heartbeats stop is stopped, or its machine is cut off; one that is dead, mpirun tells of.

use configs::Heartbeat;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Before the first update of a start, and for a single operation that keeps a processor busy, hanging takes
/// this many times as long.
const PATIENT: u32 = 10;

/// Between two looks more time does not pass: a launcher that was stopped itself has heard nobody.
const MOST_BETWEEN_LOOKS: Duration = Duration::from_secs(2);

/// Heartbeats come twice a second; a rank that is silent this long is the one that others wait for.
const QUIET: Duration = Duration::from_secs(3);

/// A rank is slow when its own part of a step takes this many times the median, for so many steps.
const SLOW_FACTOR: f64 = 1.5;
const SLOW_STEPS: u32 = 8;
/// And this much longer.
const SLOW_MS: u64 = 20;

/// What is wrong with a job, and where.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// In one word: `dead`, `stopped`, `hung`, `host`, `job`.
    pub fault: &'static str,
    /// The rank, if it is one.
    pub rank: Option<usize>,
    /// Its machine, if known.
    pub host: Option<String>,
    /// Updates done by then.
    pub step: Option<u64>,
    /// What the rank was doing: phase, segment, collective.
    pub place: Option<String>,
    /// One sentence.
    pub what: String,
}

/// The ranks of a job, as their heartbeats show them.
#[derive(Debug)]
pub struct Watch {
    hang_timeout: Duration,
    ranks: usize,
    known: BTreeMap<usize, Rank>,
    /// Time that has passed for this watch.
    now: Duration,
    looked: Option<Instant>,
}

#[derive(Debug)]
struct Rank {
    last: Heartbeat,
    heard: Duration,
    /// When it last progressed, and when it last progressed or was seen computing.
    moved: Duration,
    alive: Duration,
    slow_steps: u32,
}

impl Watch {
    /// For a job of so many ranks.
    pub fn new(ranks: usize, hang_timeout: Duration) -> Watch {
        Watch { hang_timeout, ranks, known: BTreeMap::new(), now: Duration::ZERO, looked: None }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Instant) {
        let passed = self.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        self.now += passed.min(MOST_BETWEEN_LOOKS);
        self.looked = Some(now);
    }

    /// A heartbeat has come. Returns a warning if it shows that the rank is slow.
    pub fn hear(&mut self, beat: Heartbeat) -> Option<String> {
        if beat.rank >= self.ranks {
            return None;
        }
        let now = self.now;
        let Some(rank) = self.known.get_mut(&beat.rank) else {
            let rank = Rank { last: beat, heard: now, moved: now, alive: now, slow_steps: 0 };
            self.known.insert(rank.last.rank, rank);
            return None;
        };
        if beat.sequence <= rank.last.sequence && beat.pid == rank.last.pid {
            return None; // out of order, or sent again
        }
        rank.heard = now;
        if (beat.progress, beat.begun) != (rank.last.progress, rank.last.begun) {
            (rank.moved, rank.alive) = (now, now);
        } else if beat.alive != rank.last.alive {
            rank.alive = now;
        }
        let stepped = beat.own_steps > rank.last.own_steps;
        let who = beat.rank;
        rank.last = beat;
        if stepped { self.judge_speed(who) } else { None }
    }

    /// What is wrong with the job, if something is.
    pub fn verdict(&self) -> Option<Finding> {
        let started =
            self.known.values().all(|rank| rank.last.own_steps > 0) && self.known.len() == self.ranks;
        let since = |then: Duration| self.now.saturating_sub(then);
        if let Some(rank) = self.known.values().find(|rank| since(rank.heard) > self.hang_timeout) {
            if let Some(host) = self.silent_host()
                && let Some(finding) = self.host_finding(host, since(rank.heard))
            {
                return Some(finding);
            }
            let what = "has not been heard of";
            return Some(self.finding("stopped", rank, what, since(rank.heard)));
        }
        let limit = if started { self.hang_timeout } else { self.hang_timeout * PATIENT };
        if self.known.len() < self.ranks && self.now > limit {
            return Some(self.unheard());
        }
        if self.known.is_empty() {
            return None;
        }
        let newest = |of: fn(&Rank) -> Duration| self.known.values().map(of).max().unwrap_or_default();
        let (alive, moved) = (since(newest(|rank| rank.alive)), since(newest(|rank| rank.moved)));
        if alive <= limit && moved <= limit * PATIENT {
            return None;
        }
        let quiet = self.known.values().find(|rank| since(rank.heard) > QUIET);
        if let Some(rank) = quiet {
            return Some(self.finding("stopped", rank, "has not been heard of", since(rank.heard)));
        }
        let behind =
            self.known.values().min_by_key(|rank| (rank.last.begun, rank.last.collective.is_some()))?;
        Some(self.finding("hung", behind, "hangs: no progress", moved))
    }

    /// Where a rank was when it was last heard of.
    pub fn last(&self, rank: usize) -> Option<&Heartbeat> {
        self.known.get(&rank).map(|rank| &rank.last)
    }

    /// The machine that holds most of what is silent, if there are others that are not: a link that is down
    /// or a machine that is gone.
    pub fn silent_host(&self) -> Option<&str> {
        let silent = |rank: &&Rank| self.now.saturating_sub(rank.heard) > QUIET;
        let host = &self.known.values().find(|rank| silent(rank))?.last.host;
        let mut of_host = self.known.values().filter(|rank| rank.last.host == *host);
        let others = self.known.values().any(|rank| rank.last.host != *host && !silent(&rank));
        (others && of_host.all(|rank| silent(&rank))).then_some(host.as_str())
    }

    fn finding(&self, fault: &'static str, rank: &Rank, what: &str, for_so_long: Duration) -> Finding {
        let (beat, seconds) = (&rank.last, for_so_long.as_secs());
        let place = beat.place();
        Finding {
            fault,
            rank: Some(beat.rank),
            host: Some(beat.host.clone()),
            step: Some(beat.step),
            what: format!("rank {} on {} {what} for {seconds} s ({place})", beat.rank, beat.host),
            place: Some(place),
        }
    }

    /// Of a machine with several ranks, none of which is heard. Of a single one it cannot be told whether it is
    /// the rank or the machine.
    fn host_finding(&self, host: &str, for_so_long: Duration) -> Option<Finding> {
        let its: Vec<&Heartbeat> =
            self.known.values().map(|rank| &rank.last).filter(|beat| beat.host == host).collect();
        let first = its.first().filter(|_| its.len() > 1)?;
        let ranks: Vec<String> = its.iter().map(|beat| beat.rank.to_string()).collect();
        let what = format!(
            "host {host} is gone or cut off: none of its ranks ({}) has been heard of for {} s",
            ranks.join(", "),
            for_so_long.as_secs(),
        );
        let (step, place) = (Some(first.step), Some(first.place()));
        Some(Finding { fault: "host", rank: None, host: Some(host.to_string()), step, place, what })
    }

    fn unheard(&self) -> Finding {
        let missing = (0..self.ranks).filter(|rank| !self.known.contains_key(rank));
        let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
        let who =
            if self.known.is_empty() { "any rank".into() } else { format!("rank {}", missing.join(", ")) };
        let what = format!("no heartbeat of {who} in {} s", self.now.as_secs());
        Finding { fault: "job", rank: None, host: None, step: None, place: None, what }
    }

    /// Compares a rank that has just done a step with the others.
    fn judge_speed(&mut self, who: usize) -> Option<String> {
        let mut times: Vec<u64> = self.known.values().map(|rank| rank.last.own_ms).collect();
        times.sort_unstable();
        let median = times[(times.len() - 1) / 2];
        let several = self.ranks > 1;
        let rank = self.known.get_mut(&who)?;
        let own = rank.last.own_ms;
        let slow = several && own as f64 > median as f64 * SLOW_FACTOR && own > median + SLOW_MS;
        rank.slow_steps = if slow { rank.slow_steps + 1 } else { 0 };
        // Told again each time that it has been going on for twice as long.
        (rank.slow_steps >= SLOW_STEPS && rank.slow_steps.is_power_of_two()).then(|| {
            format!(
                "warning: rank {who} on {} is slow: its own part of step {} took {own} ms, the others' about \
                 {median} ms, {} steps in a row; all ranks wait for it",
                rank.last.host, rank.last.step, rank.slow_steps,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use configs::Doing;

    /// A watch of four ranks on two hosts with a limit of a minute, and its clock.
    struct Scene {
        watch: Watch,
        begin: Instant,
        second: u64,
        sequence: u64,
        beats: Vec<Heartbeat>,
    }

    impl Scene {
        fn new() -> Scene {
            let beat = |rank: usize| Heartbeat {
                rank,
                host: ["a", "b"][rank / 2].into(),
                step: 20,
                own_steps: 5,
                begun: 100,
                doing: Doing::Backward,
                segment: Some("h.1".into()),
                ..Heartbeat::default()
            };
            let watch = Watch::new(4, Duration::from_secs(60));
            Scene { watch, begin: Instant::now(), second: 0, sequence: 0, beats: (0..4).map(beat).collect() }
        }

        /// One second passes, in which those of `heard` send what they are.
        fn second(&mut self, heard: &[usize]) -> Option<Finding> {
            self.second += 1;
            self.sequence += 1;
            self.watch.tick(self.begin + Duration::from_secs(self.second));
            for &rank in heard {
                self.beats[rank].sequence = self.sequence;
                self.watch.hear(self.beats[rank].clone());
            }
            self.watch.verdict()
        }

        /// Seconds until something is found, and what.
        fn until_found(&mut self, heard: &[usize], limit: u64) -> Option<(u64, Finding)> {
            (1..=limit).find_map(|second| Some((second, self.second(heard)?)))
        }
    }

    const ALL: [usize; 4] = [0, 1, 2, 3];

    #[test]
    fn a_rank_whose_heartbeats_stop_is_stopped_and_named_with_what_it_was_doing() {
        let mut scene = Scene::new();
        scene.second(&ALL);
        let (seconds, found) = scene.until_found(&[0, 1, 3], 100).unwrap();
        assert!((60..=63).contains(&seconds), "{seconds}");
        assert_eq!((found.fault, found.rank, found.host.as_deref()), ("stopped", Some(2), Some("b")));
        assert_eq!(found.place.as_deref(), Some("step 21, backward of h.1"));
        assert!(found.what.starts_with("rank 2 on b has not been heard of for 6"), "{}", found.what);
    }

    #[test]
    fn where_all_stand_still_the_one_that_has_begun_fewer_collectives_hangs() {
        let mut scene = Scene::new();
        for rank in [0, 2, 3] {
            scene.beats[rank].begun = 101;
            scene.beats[rank].doing = Doing::Reduce;
            scene.beats[rank].collective = Some("all_reduce".into());
        }
        scene.second(&ALL);
        let (seconds, found) = scene.until_found(&ALL, 100).unwrap();
        assert!((60..=62).contains(&seconds), "{seconds}");
        assert_eq!((found.fault, found.rank), ("hung", Some(1)));
        assert!(found.what.contains("rank 1 on a hangs: no progress for 61 s (step 21, backward of h.1)"));
    }

    #[test]
    fn a_step_of_ten_minutes_is_no_hang() {
        let mut scene = Scene::new();
        // Others wait; rank 3 gets on by a segment every 50 s, then computes in one operation for 9 minutes.
        for second in 0..600 {
            scene.beats[3].progress = second / 50;
            assert_eq!(scene.second(&ALL), None);
        }
        for second in 0..540 {
            scene.beats[3].alive = second / 2;
            assert_eq!(scene.second(&ALL), None);
        }
        // A loop without an end is one all the same.
        let found = (0..100).find_map(|second| {
            scene.beats[3].alive = 1000 + second;
            scene.second(&ALL)
        });
        assert_eq!(found.unwrap().fault, "hung");
    }

    #[test]
    fn before_the_first_step_there_is_ten_times_as_much_time() {
        let mut scene = Scene::new();
        scene.beats.iter_mut().for_each(|beat| beat.own_steps = 0);
        let (seconds, _) = scene.until_found(&ALL, 1000).unwrap();
        assert!((600..=603).contains(&seconds), "{seconds}");
        let mut unheard = Scene::new();
        let (seconds, found) = unheard.until_found(&[0, 1, 2], 1000).unwrap();
        assert!(seconds >= 600 && found.what.contains("no heartbeat of rank 3"), "{found:?}");
    }

    #[test]
    fn a_launcher_that_was_stopped_itself_blames_nobody() {
        let mut scene = Scene::new();
        scene.second(&ALL);
        scene.second += 1000;
        assert_eq!(scene.second(&[]), None);
    }

    #[test]
    fn heartbeats_that_are_sent_again_are_no_sign_of_life() {
        let mut scene = Scene::new();
        scene.second(&ALL);
        let old = scene.beats[2].clone();
        let found = (0..70).find_map(|_| {
            scene.watch.hear(old.clone());
            scene.second(&[0, 1, 3])
        });
        assert_eq!(found.unwrap().rank, Some(2));
        assert_eq!(scene.watch.hear(Heartbeat { rank: 4, ..old }), None, "no such rank");
    }

    #[test]
    fn a_host_of_which_nobody_is_heard_is_told_from_a_rank_that_is_silent() {
        let mut scene = Scene::new();
        scene.second(&ALL);
        scene.until_found(&[0, 1, 3], 5);
        assert_eq!(scene.watch.silent_host(), None);
        scene.until_found(&[0, 1], 5);
        assert_eq!(scene.watch.silent_host(), Some("b"));
        let (_, found) = scene.until_found(&[0, 1], 70).unwrap();
        assert_eq!((found.fault, found.rank, found.host.as_deref()), ("host", None, Some("b")));
        assert!(found.what.starts_with("host b is gone or cut off: none of its ranks (2, 3)"), "{found:?}");
        for _ in 0..10 {
            scene.second(&[]);
        }
        assert_eq!(scene.watch.silent_host(), None, "then it is this machine that is cut off");
    }

    #[test]
    fn a_slow_rank_is_named_and_not_again_at_every_step() {
        let mut scene = Scene::new();
        scene.beats.iter_mut().for_each(|beat| beat.own_ms = 100);
        scene.beats[1].own_ms = 190;
        let mut told = Vec::new();
        for step in 1..=20 {
            for rank in ALL {
                scene.beats[rank].own_steps = 5 + step;
                scene.beats[rank].sequence = step;
                told.extend(scene.watch.hear(scene.beats[rank].clone()));
            }
        }
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("warning: rank 1 on a is slow"), "{told:?}");
        assert!(told[0].contains("took 190 ms, the others' about 100 ms, 8 steps"), "{told:?}");
    }
}
