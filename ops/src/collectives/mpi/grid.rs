//! Reducing and gathering flat buffers over a grid of nodes x ranks per node, in the order of the tree.
//!
//! Owns the pipeline and its scratch memory. Refuses to know jobs, tensors and who asked.
//!
//! A buffer is cut into one slice per rank, a slice into pieces. A piece passes up to six stages: ranks
//! *publish* to their node what others will sum; each *sums* its slices over the node; these are
//! *exchanged* with their owners on other nodes, which *merge* them; the sums go back and are *spread*
//! on each node; each rank *collects* them. All ranks run round after round, a different piece at each
//! stage, and wait in each round for the messages of the one before, and for their node. What one stage
//! writes another reads a round later, so two slots of scratch suffice, alternating with the piece.
//!
//! Ranks of a node that can reach into each other's buffers need neither publish nor collect, nor wait
//! for each other but at the end: a slice is summed from all buffers and spread to all of them by
//! the one rank of the node that handles it, and nobody else touches it. They sum before they wait,
//! so that messages travel meanwhile.

use super::pass::{Pass, Piece};
use super::raw::{self, Comm, Request};
use super::shared::Shared;
use super::sums::{Rows, Sum, sum};
use crate::collectives::CommError;
use std::sync::atomic::{Ordering, fence};

/// Into how many pieces a slice that goes between nodes is cut at least, unless they had fewer elements than
/// `SHORTEST_PIECE`: messages have to pay for their latency.
const FEWEST_PIECES: usize = 4;
const SHORTEST_PIECE: usize = 128 << 10;
/// Elements that are summed before messages are looked after again.
const PART: usize = 64 << 10;

/// Which of a pass's messages one is. Between two ranks those of a kind arrive in order.
const CONTRIBUTION: i32 = 1;
const COMPLETE: i32 = 2;

/// The ranks as nodes x ranks per node. World rank = node x local_size + local_rank.
pub(super) struct Grid {
    /// Ranks of this node; used only if there are several.
    node_comm: Comm,
    /// Ranks with this local rank on all nodes; used only if there are several nodes.
    peers: Comm,
    node: usize,
    nodes: usize,
    local_rank: usize,
    local_size: usize,
    /// `None`: one rank per node.
    shared: Option<Shared>,
    /// Elements of a slice that make a piece, P.
    piece: usize,
    scratch: Scratch,
    sent_bytes: u64,
}

/// Rows of P elements of up to four bytes, two slots each; N = nodes.
struct Scratch {
    /// This node's sums of the peers' slices, and of the own one, [2, N, P].
    sums: Vec<f32>,
    /// Other nodes' sums of this rank's slice, [2, N, P].
    parts: Vec<f32>,
    /// This rank's slice, complete, as bf16, [2, P].
    own: Vec<f32>,
    /// The peers' slices, complete, as bf16, [2, N, P].
    complete: Vec<f32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Publish,
    SumNode,
    Exchange,
    Merge,
    Spread,
    Collect,
}

/// Stages with the number of rounds by which each follows the first.
type Schedule = Vec<(Stage, usize)>;

impl Grid {
    /// A grid whose pieces hold about `piece_bytes` of the buffer. Collective over all its ranks.
    /// `node_comm` of more than one rank comes with `shared` of [`Grid::shared_bytes`].
    pub(super) fn new(
        node_comm: Comm,
        peers: Comm,
        shared: Option<Shared>,
        piece_bytes: usize,
    ) -> Result<Grid, CommError> {
        let (local_rank, local_size) = node_comm.rank_and_size()?;
        let (node, nodes) = peers.rank_and_size()?;
        let piece = Grid::piece_numel(piece_bytes, nodes * local_size);
        let rows = |rows: usize| vec![0.0; if nodes > 1 { 2 * rows * piece } else { 0 }];
        let scratch = Scratch { sums: rows(nodes), parts: rows(nodes), own: rows(1), complete: rows(nodes) };
        Ok(Grid {
            node_comm,
            peers,
            node,
            nodes,
            local_rank,
            local_size,
            shared,
            piece,
            scratch,
            sent_bytes: 0,
        })
    }

    /// Elements of a slice in a piece of `piece_bytes` of the buffer: whole cache lines.
    fn piece_numel(piece_bytes: usize, world_size: usize) -> usize {
        (piece_bytes / size_of::<f32>() / world_size).next_multiple_of(32).max(32)
    }

    /// Bytes of shared memory that each rank needs: two slots of what it publishes, one slice per rank,
    /// and of what it spreads, one slice per node.
    pub(super) fn shared_bytes(piece_bytes: usize, nodes: usize, local_size: usize) -> usize {
        let piece = Grid::piece_numel(piece_bytes, nodes * local_size);
        2 * (nodes * local_size + nodes) * piece * size_of::<f32>()
    }

    /// The ranks of this node, if there are several that share memory.
    pub(super) fn shares(&self) -> Option<Comm> {
        self.shared.is_some().then_some(self.node_comm)
    }

    /// Runs a pass; says how many bytes this rank has sent. Collective; all ranks are known to have
    /// begun it, on buffers that all reach or none.
    ///
    /// # Safety
    /// Each of `pass.buffers` addresses `pass.numel` elements, aligned, that nobody touches until this has
    /// returned on all ranks of the node, but for these passes.
    pub(super) unsafe fn run(&mut self, pass: &Pass) -> Result<u64, CommError> {
        if self.nodes * self.local_size == 1 {
            return Ok(0);
        }
        fence(Ordering::SeqCst); // what others wrote into their buffers before they began
        self.sent_bytes = self.shown_bytes(pass);
        let copied = pass.buffers.len() < self.local_size;
        let (before, after) = self.schedule(pass);
        let last_lag = before.iter().chain(&after).map(|&(_, lag)| lag).max().unwrap_or(0);
        let pieces = pass.slice_numel.min(pass.numel).div_ceil(self.piece_of(pass));
        let mut requests = Vec::new();
        for round in 0..(if pieces == 0 { 0 } else { pieces + last_lag }) {
            // SAFETY: by this function's contract; stages run one after the other.
            unsafe { self.stages(&before, pass, round, &mut requests) }?;
            raw::wait(&mut requests)?;
            fence(Ordering::SeqCst);
            // SAFETY: as above.
            unsafe { self.stages(&after, pass, round, &mut requests) }?;
            if copied {
                fence(Ordering::SeqCst);
                requests.push(self.node_comm.start_barrier()?);
            }
        }
        raw::wait(&mut requests)?;
        fence(Ordering::SeqCst);
        if !copied {
            self.node_barrier()?;
        }
        Ok(self.sent_bytes)
    }

    /// Returns when all ranks of the node have come, and what they wrote before is seen.
    pub(super) fn node_barrier(&self) -> Result<(), CommError> {
        if self.local_size == 1 {
            return Ok(());
        }
        fence(Ordering::SeqCst);
        raw::wait(&mut vec![self.node_comm.start_barrier()?])?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// The stages a pass needs, and how many rounds after the first each is: those that need nothing of the
    /// round before, and those that do.
    fn schedule(&self, pass: &Pass) -> (Schedule, Schedule) {
        let copied = pass.buffers.len() < self.local_size;
        let (on_node, between) = (usize::from(copied), usize::from(self.nodes > 1));
        let (mut stages, mut lag) = (Vec::new(), 0);
        if pass.reduce {
            stages.extend([(Stage::Publish, 0), (Stage::SumNode, on_node), (Stage::Exchange, on_node)]);
            lag = on_node + between;
        }
        if pass.reduce || pass.gather {
            stages.push((Stage::Merge, lag));
        }
        if pass.gather {
            stages.extend([(Stage::Spread, lag + between), (Stage::Collect, lag + between + on_node)]);
        }
        stages.retain(|(stage, _)| match stage {
            Stage::Publish | Stage::Collect => copied,
            Stage::Exchange | Stage::Merge => self.nodes > 1,
            Stage::SumNode | Stage::Spread => true,
        });
        stages.into_iter().partition(|&(stage, _)| stage == Stage::SumNode && !copied)
    }

    /// # Safety
    /// As [`Grid::run`]; scratch and shared memory are used as the module header says.
    unsafe fn stages(
        &mut self,
        schedule: &Schedule,
        pass: &Pass,
        round: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), CommError> {
        let most = self.piece_of(pass);
        let pieces = pass.slice_numel.min(pass.numel).div_ceil(most);
        for &(stage, lag) in schedule {
            let Some(index) = round.checked_sub(lag).filter(|&index| index < pieces) else { continue };
            let offset = index * most;
            let numel = most.min(pass.slice_numel - offset);
            let piece = &Piece { pass, offset, numel, slot: index % 2 };
            // SAFETY: handed on.
            unsafe {
                match stage {
                    Stage::Publish => self.publish(piece),
                    Stage::SumNode => self.sum_node(piece, requests)?,
                    Stage::Exchange => self.exchange(piece, requests)?,
                    Stage::Merge => self.merge(piece, requests)?,
                    Stage::Spread => self.spread(piece, requests)?,
                    Stage::Collect => self.collect(piece),
                }
            }
        }
        Ok(())
    }

    /// Elements of a pass's pieces: between nodes a short slice makes several too, so that one is summed while
    /// another travels.
    fn piece_of(&self, pass: &Pass) -> usize {
        let slice = pass.slice_numel.min(pass.numel);
        let several = slice.div_ceil(FEWEST_PIECES).next_multiple_of(32).max(SHORTEST_PIECE);
        if self.nodes == 1 { self.piece } else { self.piece.min(several) }
    }

    fn rank_of(&self, node: usize, local_rank: usize) -> usize {
        node * self.local_size + local_rank
    }

    fn rank(&self) -> usize {
        self.rank_of(self.node, self.local_rank)
    }

    /// Where rank `rank`'s slice lies in this rank's buffer.
    fn own(&self, piece: &Piece, rank: usize) -> *mut u8 {
        let buffers = &piece.pass.buffers;
        piece.at(buffers[if buffers.len() == 1 { 0 } else { self.local_rank }], rank)
    }

    /// Puts the slices that other ranks of this node sum into shared memory.
    unsafe fn publish(&self, piece: &Piece) {
        let Some(shared) = &self.shared else { return };
        for rank in self.others_on_node() {
            let to = self.published(shared, self.local_rank, rank, piece.slot);
            // SAFETY: `to` was last read two pieces ago, before a barrier that all have passed.
            unsafe { copy(self.own(piece, rank), to, piece.len(rank) * piece.pass.width) };
        }
    }

    /// Sums over the node the slices of the ranks with this local rank, one per node: into all copies on the
    /// only node, else into scratch memory, unless one rank's fp32 is the sum already.
    unsafe fn sum_node(&mut self, piece: &Piece, requests: &mut Vec<Request>) -> Result<(), CommError> {
        let pass = piece.pass;
        let kind = if pass.rounds() { Rows::Rounded } else { Rows::Fp32 };
        for node in 0..self.nodes {
            let rank = self.rank_of(node, self.local_rank);
            let (numel, rows) = (piece.len(rank), self.contributions(piece, rank));
            let (mut copies, mut bf16) = (Vec::new(), std::ptr::null_mut());
            if self.nodes == 1 {
                copies = self.copies(piece, rank);
                copies.truncate(if pass.gather { copies.len() } else { 1 });
            } else if pass.rounds() {
                bf16 = self.row(Of::Sums, piece.slot, node).cast();
            } else if self.local_size > 1 {
                copies.push(self.row(Of::Sums, piece.slot, node).cast());
            } else {
                continue;
            }
            let to = Sum { fp32: &copies, bf16, round: pass.rounds() && pass.gather };
            // SAFETY: contributions were published a round ago, or are in buffers of ranks that have begun;
            // this slice is this rank's to handle on this node, and no message in flight uses this slot.
            unsafe { sum_by_parts(&rows, kind, numel, to, requests) }?;
        }
        Ok(())
    }

    /// Starts sending the node's sums to their owners, and receiving the other nodes' sums of this
    /// rank's slice.
    unsafe fn exchange(&mut self, piece: &Piece, requests: &mut Vec<Request>) -> Result<(), CommError> {
        let (here, width) = (self.node, piece.pass.wire_width);
        let own_bytes = piece.len(self.rank()) * width;
        for node in (0..self.nodes).filter(|&node| node != here) {
            let rank = self.rank_of(node, self.local_rank);
            let (from, to) = (self.node_sum(piece, node), self.row(Of::Parts, piece.slot, node));
            // Sends first: with receives first Open MPI 4.1 uses a TCP link in one direction at a time.
            // SAFETY: rows of this slot, or slices of the buffer, that are used again when the requests are
            // complete.
            unsafe {
                self.send(from, piece.len(rank) * width, node, CONTRIBUTION, requests)?;
                self.peers.start_receive(to, own_bytes, node, CONTRIBUTION, requests)?;
            }
        }
        Ok(())
    }

    /// Where the node's sum is of the slice of this rank's peer on another node, or of its own.
    fn node_sum(&mut self, piece: &Piece, node: usize) -> *mut u8 {
        if self.local_size > 1 || piece.pass.rounds() {
            self.row(Of::Sums, piece.slot, node)
        } else {
            self.own(piece, self.rank_of(node, self.local_rank))
        }
    }

    /// Sums the nodes' sums of this rank's slice, and starts sending the slice to its peers and receiving
    /// theirs.
    unsafe fn merge(&mut self, piece: &Piece, requests: &mut Vec<Request>) -> Result<(), CommError> {
        let (pass, numel, here) = (piece.pass, piece.len(self.rank()), self.node);
        let own = self.own(piece, self.rank());
        let wire = self.row(Of::Own, piece.slot, 0);
        if pass.reduce {
            let rows: Vec<*const u8> = (0..self.nodes)
                .map(|node| match node == here {
                    true => self.node_sum(piece, node).cast_const(),
                    false => self.row(Of::Parts, piece.slot, node).cast_const(),
                })
                .collect();
            let kind = if pass.rounds() { Rows::Bf16 } else { Rows::Fp32 };
            let rounds = pass.rounds() && pass.gather;
            let bf16 = if rounds { wire.cast() } else { std::ptr::null_mut() };
            // SAFETY: received or summed a round ago; this slice is this rank's to handle.
            unsafe {
                let to = Sum { fp32: &[own.cast()], bf16, round: rounds };
                sum_by_parts(&rows, kind, numel, to, requests)
            }?;
        }
        if !pass.gather {
            return Ok(());
        }
        for node in (0..self.nodes).filter(|&node| node != here) {
            let rank = self.rank_of(node, self.local_rank);
            let from = if pass.rounds() { wire } else { own };
            let to =
                if pass.rounds() { self.row(Of::Complete, piece.slot, node) } else { self.own(piece, rank) };
            // SAFETY: rows of this slot, or slices of the buffer that only this rank handles and that have
            // left; they are used again when this round's requests are complete.
            unsafe {
                self.send(from, numel * pass.wire_width, node, COMPLETE, requests)?;
                self.peers.start_receive(to, piece.len(rank) * pass.wire_width, node, COMPLETE, requests)?;
            }
        }
        Ok(())
    }

    /// Gives the peers' slices and the own one to this rank's buffer and to its node.
    unsafe fn spread(&mut self, piece: &Piece, requests: &mut Vec<Request>) -> Result<(), CommError> {
        if self.nodes == 1 && piece.pass.reduce {
            return Ok(()); // `sum_node` has written all copies
        }
        for node in 0..self.nodes {
            let rank = self.rank_of(node, self.local_rank);
            let (copies, numel) = (self.copies(piece, rank), piece.len(rank));
            if piece.pass.rounds() && node != self.node {
                let from = self.row(Of::Complete, piece.slot, node).cast_const();
                let fp32: Vec<*mut f32> = copies.iter().map(|copy| copy.cast()).collect();
                // SAFETY: received a round ago; the copies are this rank's to write.
                unsafe {
                    let to = Sum { fp32: &fp32, bf16: std::ptr::null_mut(), round: false };
                    sum_by_parts(&[from], Rows::Bf16, numel, to, requests)
                }?;
                continue;
            }
            let own = self.own(piece, rank);
            for to in copies.into_iter().map(|copy| copy.cast::<u8>()).filter(|&to| to != own) {
                // SAFETY: as above; the copies do not overlap.
                unsafe { copy(own, to, numel * piece.pass.width) };
            }
        }
        Ok(())
    }

    /// Copies from shared memory the slices that other ranks of this node have put there.
    unsafe fn collect(&self, piece: &Piece) {
        let Some(shared) = &self.shared else { return };
        for rank in self.others_on_node() {
            let (node, local_rank) = (rank / self.local_size, rank % self.local_size);
            let from = self.spreading(shared, local_rank, node, piece.slot);
            // SAFETY: written a round ago, before a barrier, and not again before the next.
            unsafe { copy(from, self.own(piece, rank), piece.len(rank) * piece.pass.width) };
        }
    }

    /// Where the contributions of this node's ranks to rank `rank`'s slice are, in rank order.
    fn contributions(&self, piece: &Piece, rank: usize) -> Vec<*const u8> {
        let reached = &piece.pass.buffers;
        if reached.len() == self.local_size {
            return reached.iter().map(|&buffer| piece.at(buffer, rank).cast_const()).collect();
        }
        let published = |local_rank: usize| match &self.shared {
            Some(shared) if local_rank != self.local_rank => {
                self.published(shared, local_rank, rank, piece.slot).cast_const()
            }
            _ => self.own(piece, rank).cast_const(),
        };
        (0..self.local_size).map(published).collect()
    }

    /// Where rank `rank`'s complete slice goes on this node: this rank's buffer first, then the others', or
    /// the memory they collect it from.
    fn copies(&self, piece: &Piece, rank: usize) -> Vec<*mut f32> {
        let own = self.own(piece, rank);
        let mut copies = vec![own.cast()];
        match &self.shared {
            Some(shared) if piece.pass.buffers.len() < self.local_size => {
                let node = rank / self.local_size;
                copies.push(self.spreading(shared, self.local_rank, node, piece.slot).cast());
            }
            _ => copies.extend(
                piece
                    .pass
                    .buffers
                    .iter()
                    .map(|&b| piece.at(b, rank))
                    .filter(|&to| to != own)
                    .map(<*mut u8>::cast),
            ),
        }
        copies
    }

    /// Ranks whose slices other ranks of this node handle.
    fn others_on_node(&self) -> impl Iterator<Item = usize> + use<> {
        let (local_rank, local_size) = (self.local_rank, self.local_size);
        (0..self.nodes * local_size).filter(move |rank| rank % local_size != local_rank)
    }

    /// Where a local rank publishes rank `rank`'s slice, of [2, nodes x local_size, P].
    fn published(&self, shared: &Shared, local_rank: usize, rank: usize, slot: usize) -> *mut u8 {
        let row = slot * self.nodes * self.local_size + rank;
        shared.part(local_rank).wrapping_add(row * self.piece * size_of::<f32>())
    }

    /// Where a local rank spreads the slice of its peer on node `node`, of [2, nodes, P].
    fn spreading(&self, shared: &Shared, local_rank: usize, node: usize, slot: usize) -> *mut u8 {
        let row = (2 * self.local_size + slot) * self.nodes + node;
        shared.part(local_rank).wrapping_add(row * self.piece * size_of::<f32>())
    }

    /// A row of the scratch memory. Goes by the pointer, so that MPI's use of other rows stands.
    fn row(&mut self, of: Of, slot: usize, node: usize) -> *mut u8 {
        let (rows, row) = match of {
            Of::Sums => (&mut self.scratch.sums, slot * self.nodes + node),
            Of::Parts => (&mut self.scratch.parts, slot * self.nodes + node),
            Of::Own => (&mut self.scratch.own, slot),
            Of::Complete => (&mut self.scratch.complete, slot * self.nodes + node),
        };
        assert!((row + 1) * self.piece <= rows.len(), "a row lies within the scratch memory");
        rows.as_mut_ptr().wrapping_add(row * self.piece).cast()
    }

    /// Starts sending to the peer on another node.
    ///
    /// # Safety
    /// As [`Comm::start_send`].
    unsafe fn send(
        &mut self,
        from: *const u8,
        bytes: usize,
        node: usize,
        tag: i32,
        requests: &mut Vec<Request>,
    ) -> Result<(), CommError> {
        self.sent_bytes += bytes as u64;
        // SAFETY: handed on.
        unsafe { self.peers.start_send(from, bytes, node, tag, requests) }
    }

    /// Bytes that other ranks of this node read from this one, or get written by it.
    fn shown_bytes(&self, pass: &Pass) -> u64 {
        let all = Piece { pass, offset: 0, numel: pass.slice_numel, slot: 0 };
        let contributed: usize = self.others_on_node().map(|rank| all.len(rank)).sum();
        let handled: usize = (0..self.nodes).map(|node| all.len(self.rank_of(node, self.local_rank))).sum();
        let given = handled * (self.local_size - 1);
        let elements = usize::from(pass.reduce) * contributed + usize::from(pass.gather) * given;
        (elements * pass.width) as u64
    }
}

/// The parts of the scratch memory.
#[derive(Clone, Copy)]
enum Of {
    Sums,
    Parts,
    Own,
    Complete,
}

/// Sums the first `numel` elements, and lets messages travel meanwhile.
///
/// # Safety
/// As [`sum`].
unsafe fn sum_by_parts(
    rows: &[*const u8],
    kind: Rows,
    numel: usize,
    to: Sum,
    requests: &mut Vec<Request>,
) -> Result<(), CommError> {
    for start in (0..numel).step_by(PART) {
        // SAFETY: handed on.
        unsafe { sum(rows, kind, start..numel.min(start + PART), to) };
        raw::complete(requests)?;
    }
    Ok(())
}

/// # Safety
/// Both address `bytes` bytes, which do not overlap and which nobody else changes meanwhile.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: by this function's contract.
    unsafe { to.copy_from_nonoverlapping(from, bytes) };
}
