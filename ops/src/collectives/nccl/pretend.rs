//! Ranks that are threads, with a pretended NCCL: it carries and adds in host memory what the real one would on
//! GPUs, and writes down what it was asked. So the backend is tried whole, at any number of ranks, without one
//! GPU; what is left is that NCCL does what its manual says.

use super::library::{Call, Event, Library, Span};
use super::{Group, Nccl};
use crate::collectives::{CommError, Communicator, Operation, Pending, Place, suite};
use std::sync::{Arc, Barrier, Mutex};
use tch::{Device, Kind, Tensor};

/// What a library was asked, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    /// Its stream is to go on after libtorch's.
    Follow,
    /// What is between the two was given to its stream.
    Enter,
    Leave,
    /// Calls, together: name, elements, dtype, and the root or the peer.
    Call(Vec<(&'static str, usize, Kind, Option<usize>)>),
    Event,
    /// libtorch's stream is to go on after an event.
    Block,
    /// The rank computes, as its schedule has it.
    Compute,
    Destroy,
}

/// Where ranks meet.
struct Meeting {
    rows: Mutex<Vec<Vec<u8>>>,
    all: Barrier,
}

impl Meeting {
    fn of(world_size: usize) -> Arc<Meeting> {
        Arc::new(Meeting { rows: Mutex::new(vec![Vec::new(); world_size]), all: Barrier::new(world_size) })
    }

    /// Every rank's bytes.
    fn exchange(&self, rank: usize, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        self.rows.lock().unwrap()[rank] = bytes;
        self.all.wait();
        let rows = self.rows.lock().unwrap().clone();
        self.all.wait();
        rows
    }
}

type Log = Arc<Mutex<Vec<Asked>>>;

struct Pretended {
    meeting: Arc<Meeting>,
    rank: usize,
    world_size: usize,
    log: Log,
}

fn bytes(span: Span) -> Vec<u8> {
    // SAFETY: a span of a live tensor in host memory, which its rank alone touches.
    unsafe { std::slice::from_raw_parts(span.data.cast::<u8>(), span.numel * span.width()) }.to_vec()
}

fn write(span: Span, bytes: &[u8]) {
    assert_eq!(bytes.len(), span.numel * span.width(), "what arrives has the length that is waited for");
    // SAFETY: as in `bytes`; the lengths are the same.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), span.data.cast::<u8>(), bytes.len()) };
}

/// The sum of rows of fp32, the last rank's first: no order that anybody may count on.
fn sum(rows: &[Vec<u8>]) -> Vec<u8> {
    let mut sum = vec![0f32; rows[0].len() / 4];
    for row in rows.iter().rev() {
        for (sum, value) in sum.iter_mut().zip(row.as_chunks().0) {
            *sum += f32::from_ne_bytes(*value);
        }
    }
    sum.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

impl Pretended {
    fn note(&self, asked: Asked) {
        self.log.lock().unwrap().push(asked);
    }

    fn one(&self, call: Call) {
        let meet = |mine: Vec<u8>| self.meeting.exchange(self.rank, mine);
        match call {
            Call::AllReduce(span) => write(span, &sum(&meet(bytes(span)))),
            Call::Broadcast { span, root } => write(span, &meet(bytes(span))[root]),
            Call::Reduce { span, root } => {
                let sum = sum(&meet(bytes(span)));
                // Elsewhere the buffer is left unspecified: here, spoiled.
                if root == self.rank { write(span, &sum) } else { write(span, &vec![0xff; sum.len()]) }
            }
            Call::ReduceScatter { from, to } => {
                let (sum, size) = (sum(&meet(bytes(from))), to.numel * to.width());
                write(to, &sum[self.rank * size..][..size]);
            }
            Call::AllGather { from, to } => write(to, &meet(bytes(from)).concat()),
            Call::Send { .. } | Call::Receive { .. } => panic!("alone it would wait for ever"),
        }
    }

    /// Sends and receives of one group: to the next rank, to the one after it, and so on.
    fn mail(&self, calls: &[Call]) {
        for distance in 1..self.world_size {
            let (next, before) = (
                (self.rank + distance) % self.world_size,
                (self.rank + self.world_size - distance) % self.world_size,
            );
            let sent = calls.iter().find_map(|call| match call {
                Call::Send { span, to } if *to == next => Some(bytes(*span)),
                _ => None,
            });
            let rows = self.meeting.exchange(self.rank, sent.unwrap_or_default());
            let expected = calls.iter().find_map(|call| match call {
                Call::Receive { span, from } if *from == before => Some(*span),
                _ => None,
            });
            match expected {
                Some(span) => write(span, &rows[before]),
                None => assert!(rows[before].is_empty(), "nobody receives what rank {before} sends"),
            }
        }
    }
}

fn described(call: &Call) -> (&'static str, usize, Kind, Option<usize>) {
    match *call {
        Call::AllReduce(span) => ("all_reduce", span.numel, span.kind, None),
        Call::Broadcast { span, root } => ("broadcast", span.numel, span.kind, Some(root)),
        Call::Reduce { span, root } => ("reduce", span.numel, span.kind, Some(root)),
        Call::ReduceScatter { from, to } => {
            assert_eq!(from.numel % to.numel, 0);
            ("reduce_scatter", to.numel, to.kind, None)
        }
        Call::AllGather { from, .. } => ("all_gather", from.numel, from.kind, None),
        Call::Send { span, to } => ("send", span.numel, span.kind, Some(to)),
        Call::Receive { span, from } => ("receive", span.numel, span.kind, Some(from)),
    }
}

impl Library for Pretended {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn follow(&self) -> Result<(), CommError> {
        self.note(Asked::Follow);
        Ok(())
    }

    fn within(&self, work: &mut dyn FnMut() -> Result<(), CommError>) -> Result<(), CommError> {
        self.note(Asked::Enter);
        let outcome = work();
        self.note(Asked::Leave);
        outcome
    }

    fn call(&self, calls: &[Call]) -> Result<(), CommError> {
        self.note(Asked::Call(calls.iter().map(described).collect()));
        let mail = |call: &Call| matches!(call, Call::Send { .. } | Call::Receive { .. });
        if calls.iter().any(mail) {
            assert!(calls.iter().all(mail));
            self.mail(calls);
        } else {
            calls.iter().for_each(|call| self.one(*call));
        }
        Ok(())
    }

    fn event(&self) -> Result<Box<dyn Event>, CommError> {
        self.note(Asked::Event);
        Ok(Box::new(Passed(Arc::clone(&self.log))))
    }

    fn healthy(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn destroy(&self) -> Result<(), CommError> {
        self.note(Asked::Destroy);
        Ok(())
    }
}

struct Passed(Log);

impl Event for Passed {
    fn block_current(&self) -> Result<(), CommError> {
        self.0.lock().unwrap().push(Asked::Block);
        Ok(())
    }

    fn synchronize(&self) -> Result<(), CommError> {
        Ok(())
    }
}

/// The group inside: bytes and barriers between threads.
struct Threads {
    place: Place,
    meeting: Arc<Meeting>,
}

impl Communicator for Threads {
    fn place(&self) -> &Place {
        &self.place
    }

    fn start(&self, _: Operation, _: &Tensor) -> Result<Pending, CommError> {
        panic!("buffers are NCCL's")
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        Ok(self.meeting.exchange(self.place.rank, bytes.to_vec()))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.meeting.all.wait();
        Ok(())
    }

    fn abort(&self, _: i32, why: &str) -> ! {
        panic!("{why}")
    }

    fn finalize(self: Box<Self>) -> Result<(), CommError> {
        Ok(())
    }
}

/// Runs `rank` on every rank of a world, with what it may note in its log.
fn on_ranks<T: Send>(world_size: usize, rank: impl Fn(Box<dyn Communicator>, Log) -> T + Sync) -> Vec<T> {
    let (meeting, inside) = (Meeting::of(world_size), Meeting::of(world_size));
    std::thread::scope(|scope| {
        let rank = &rank;
        let ranks = (0..world_size).map(|number| {
            let (meeting, inside) = (Arc::clone(&meeting), Arc::clone(&inside));
            scope.spawn(move || {
                let place = Place {
                    rank: number,
                    world_size,
                    local_rank: number,
                    local_size: world_size,
                    node: 0,
                    nodes: 1,
                    host: "here".into(),
                };
                let log = Log::default();
                let library = Pretended { meeting, rank: number, world_size, log: Arc::clone(&log) };
                let group = Group { library: Box::new(library), rank: number, world_size };
                rank(Box::new(Nccl::new(Box::new(Threads { place, meeting: inside }), group)), log)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn two_three_and_five_ranks_pass_the_behaviour_suite() {
    for world_size in [1, 2, 3, 5] {
        let checks = on_ranks(world_size, |comm, log| {
            let checks = suite::suite(&*comm);
            comm.finalize().unwrap();
            assert_eq!(log.lock().unwrap().last(), Some(&Asked::Destroy));
            checks
        });
        for check in checks.into_iter().flatten() {
            assert!(check.outcome.is_ok(), "{world_size} ranks: {check:?}");
        }
    }
}

mod schedule {
    //! A step's collectives in the order of the schedule, and what NCCL is asked for each.

    use super::*;
    use crate::collectives::{Wire, shard};
    use configs::{
        Act, Call as Scheduled, Cargo, Collective, ModelConfig, Setup, Shard, StepTraffic, step_acts,
    };
    use std::collections::HashMap;

    const SHARDS: [Shard; 4] = [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters];

    fn model() -> ModelConfig {
        ModelConfig {
            n_layer: 2,
            n_head: 2,
            n_embd: 64,
            seq_len: 64,
            vocab_size: 257,
            ..ModelConfig::default()
        }
    }

    /// The operation that a scheduled call is, and its buffer's dtype.
    fn operation(call: &Scheduled) -> (Operation, Kind) {
        let wire = if call.width == 2 { Wire::Bf16 } else { Wire::Fp32 };
        let shard_numel = call.slice_numel;
        match call.collective {
            Collective::AllReduce => (Operation::AllReduce { wire }, Kind::Float),
            Collective::ReduceScatter => (Operation::ReduceScatter { shard_numel, wire }, Kind::Float),
            Collective::AllGather => {
                let kind = if call.width == 2 { Kind::BFloat16 } else { Kind::Float };
                (Operation::AllGather { shard_numel }, kind)
            }
        }
    }

    /// One call of all ranks where slices are even, else one for each slice that is not empty.
    fn in_slices(
        names: [&'static str; 2],
        [numel, slice]: [usize; 2],
        kind: Kind,
        world_size: usize,
    ) -> Asked {
        if numel == slice * world_size {
            return Asked::Call(vec![(names[0], slice, kind, None)]);
        }
        let slices = (0..world_size).map(|owner| (shard(numel, slice, owner).len(), owner));
        let slices = slices.filter(|(numel, _)| *numel > 0);
        Asked::Call(slices.map(|(numel, owner)| (names[1], numel, kind, Some(owner))).collect())
    }

    /// What NCCL is to be asked for a scheduled call.
    fn expected(call: &Scheduled, rank: usize, world_size: usize) -> Vec<Asked> {
        let (operation, kind) = operation(call);
        let gather =
            |slice, kind| in_slices(["all_gather", "broadcast"], [call.numel, slice], kind, world_size);
        let mut asked = vec![Asked::Follow];
        match (call.collective, operation.wire()) {
            (Collective::AllGather, _) => asked.push(gather(call.slice_numel, kind)),
            (Collective::AllReduce, Wire::Fp32) => {
                asked.push(Asked::Call(vec![("all_reduce", call.numel, Kind::Float, None)]));
            }
            (Collective::ReduceScatter, Wire::Fp32) => {
                let sizes = [call.numel, call.slice_numel];
                asked.push(in_slices(["reduce_scatter", "reduce"], sizes, Kind::Float, world_size));
            }
            (sum, Wire::Bf16) => {
                let for_all = sum == Collective::AllReduce;
                let slice = if for_all { call.numel.div_ceil(world_size) } else { call.slice_numel };
                let len = |of: usize| shard(call.numel, slice, of).len();
                let peers = (0..world_size).filter(|&peer| peer != rank);
                let mail = peers.flat_map(|peer| [("send", len(peer), peer), ("receive", len(rank), peer)]);
                let mail = mail.filter(|(_, numel, _)| *numel > 0);
                let mail = mail.map(|(name, numel, peer)| (name, numel, Kind::BFloat16, Some(peer)));
                asked.extend([Asked::Enter, Asked::Call(mail.collect())]);
                asked.extend(for_all.then(|| gather(slice, Kind::BFloat16)));
                asked.push(Asked::Leave);
            }
        }
        asked.push(Asked::Event);
        asked
    }

    /// A rank's way through the schedule; what NCCL was asked, and the bytes that were counted.
    fn walk(acts: &[Act], comm: &dyn Communicator, log: &Log) -> (Vec<Asked>, [u64; 3]) {
        let mut under_way: HashMap<(bool, usize), Pending> = HashMap::new();
        let key = |cargo: Cargo, segment| (cargo == Cargo::Weights, segment);
        for act in acts {
            match act {
                Act::Compute(_) => log.lock().unwrap().push(Asked::Compute),
                Act::Start(call) => {
                    let (operation, kind) = operation(call);
                    let buffer = Tensor::zeros([call.numel as i64], (kind, Device::Cpu));
                    let pending = comm.start(operation, &buffer).unwrap();
                    under_way.insert(key(call.cargo, call.segment), pending);
                }
                Act::Wait(cargo, segment) => {
                    if let Some(pending) = under_way.remove(&key(*cargo, *segment)) {
                        pending.wait().unwrap();
                    }
                }
                Act::Agree => comm.all_reduce_f64(&mut [1.0]).unwrap(),
            }
        }
        let asked = log.lock().unwrap().clone();
        let traffic = comm.traffic();
        let sent = [traffic.all_reduce, traffic.reduce_scatter, traffic.all_gather];
        (asked, sent.map(|moved| moved.sent_bytes))
    }

    #[test]
    fn nccl_is_asked_what_the_schedule_says_in_its_order_sizes_and_dtypes_in_every_mode() {
        let mut names = std::collections::HashSet::new();
        for (world_size, shard) in (2..=8).flat_map(|world_size| SHARDS.map(|shard| (world_size, shard))) {
            for (bf16, reproducible) in [(false, false), (true, false), (true, true)] {
                let setup = Setup {
                    world_size,
                    shard,
                    bf16,
                    recompute: false,
                    reproducible,
                    micro_steps: 2,
                    micro_batch: 1,
                    gradients_stay: false,
                };
                let acts = step_acts(&model(), &setup);
                let walks = on_ranks(world_size, |comm, log| walk(&acts, &*comm, &log));
                let case = format!("{world_size} ranks, {shard:?}, bf16 {bf16}, reproducible {reproducible}");
                for (rank, (asked, _)) in walks.iter().enumerate() {
                    let mut wanted = Vec::new();
                    let mut started = std::collections::HashSet::new();
                    for act in &acts {
                        match act {
                            Act::Compute(_) => wanted.push(Asked::Compute),
                            Act::Start(call) => {
                                started.insert((call.cargo == Cargo::Weights, call.segment));
                                wanted.extend(expected(call, rank, world_size));
                            }
                            // Asked for, and once more when the buffer is let go.
                            Act::Wait(cargo, segment) => {
                                if started.remove(&(*cargo == Cargo::Weights, *segment)) {
                                    wanted.extend([Asked::Block, Asked::Block]);
                                }
                            }
                            Act::Agree => {}
                        }
                    }
                    let asked: Vec<Asked> = asked.iter().take(wanted.len()).cloned().collect();
                    assert!(asked == wanted, "{case}, rank {rank}: {asked:?}, expected {wanted:?}");
                    let calls = asked.iter().filter_map(|asked| match asked {
                        Asked::Call(calls) => Some(calls.iter().map(|call| call.0)),
                        _ => None,
                    });
                    names.extend(calls.flatten());
                }
                let traffic = StepTraffic::of(&model(), &setup);
                let theory = [traffic.all_reduce, traffic.reduce_scatter, traffic.all_gather];
                for (kind, theory) in theory.into_iter().enumerate() {
                    let mean = walks.iter().map(|(_, sent)| sent[kind]).sum::<u64>() / world_size as u64;
                    // Slices are cut at multiples, so some ranks send more than others; all of them do not.
                    assert!(
                        mean.abs_diff(theory) <= 64,
                        "{case}: {mean} bytes of kind {kind}, theory {theory}"
                    );
                }
            }
        }
        let all = ["all_gather", "all_reduce", "broadcast", "receive", "reduce", "reduce_scatter", "send"];
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_unstable();
        assert_eq!(names, all, "every kind of call occurs");
    }
}
