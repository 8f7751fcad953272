//! Reducing and gathering flat buffers over a grid of nodes x ranks per node, in the order of the tree.
//!
//! Owns the pipeline and its scratch memory. Refuses to know jobs, tensors and who asked.
//!
//! A buffer is cut into one slice per rank, a slice into pieces. A piece passes five stages: ranks
//! *publish* to their node what others will sum; each *sums* its slices over the node; slices go to
//! their owners on other nodes, which *merge* them; the sums go back and are *spread* on each node;
//! each rank *collects* them. All ranks run round after round, a different piece at each stage, and
//! wait at the end of a round for its messages and for their node. What one stage writes another
//! reads a round later, so two slots of scratch suffice, alternating with the piece.
//!
//! Within a node this is sums through shared memory; with one rank per node it is all-to-all, sum,
//! all-gather; one pipeline does both.

use super::raw::{self, Comm, Request, Shared};
use crate::collectives::{CommError, shard, tree_sum};
use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

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
}

/// Two slots each; N = nodes, P = piece.
struct Scratch {
    /// This node's sums of the peers' slices, [2, N, P].
    sums: Vec<f32>,
    /// All nodes' sums of this rank's slice, [2, N, P].
    parts: Vec<f32>,
    /// This rank's slice, complete, [2, P].
    own: Vec<f32>,
    /// The peers' slices, complete, [2, N, P].
    complete: Vec<f32>,
}

/// What a pass over a buffer does.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// The buffer's first element.
    pub(super) data: *mut f32,
    /// Its elements.
    pub(super) numel: usize,
    /// Elements per slice; rank r owns slice r.
    pub(super) slice_numel: usize,
    /// Sum the slices, or take each as its owner has it.
    pub(super) reduce: bool,
    /// Give the slices to all, or leave each with its owner.
    pub(super) gather: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Publish,
    SumNode,
    Merge,
    Spread,
    Collect,
}

/// A piece of every slice.
#[derive(Clone, Copy)]
struct Piece {
    pass: Pass,
    /// Offset within a slice.
    offset: usize,
    /// Elements; slices at the end of the buffer may have fewer.
    numel: usize,
    /// Which half of the scratch memory: 0 or 1.
    slot: usize,
}

impl Piece {
    /// Elements of the buffer that belong to rank `rank`'s slice.
    fn of(&self, rank: usize) -> Range<usize> {
        let slice = shard(self.pass.numel, self.pass.slice_numel, rank);
        let start = (slice.start + self.offset).min(slice.end);
        start..(start + self.numel).min(slice.end)
    }

    /// The buffer's elements of rank `rank`'s slice, to be changed.
    ///
    /// # Safety
    /// No other reference to these elements is alive; the buffer is (see [`Grid::run`]).
    unsafe fn slice_mut<'a>(&self, rank: usize) -> &'a mut [f32] {
        let range = self.of(rank);
        if range.is_empty() {
            return &mut []; // an empty buffer's pointer may be null
        }
        // SAFETY: `of` stays within the buffer's `numel` elements; the rest is the caller's duty.
        unsafe { from_raw_parts_mut(self.pass.data.add(range.start), range.len()) }
    }
}

impl Grid {
    /// A grid whose pieces hold about `piece_bytes` of the buffer. Collective over all its ranks.
    /// `node_comm` of more than one rank comes with `shared` of [`Grid::shared_numel`] floats.
    pub(super) fn new(
        node_comm: Comm,
        peers: Comm,
        shared: Option<Shared>,
        piece_bytes: usize,
    ) -> Result<Grid, CommError> {
        let (local_rank, local_size) = node_comm.rank_and_size()?;
        let (node, nodes) = peers.rank_and_size()?;
        let piece = Grid::piece_numel(piece_bytes, nodes * local_size);
        let row = if nodes > 1 { 2 * nodes * piece } else { 0 };
        let scratch = Scratch {
            sums: vec![0.0; row],
            parts: vec![0.0; row],
            own: vec![0.0; if nodes > 1 { 2 * piece } else { 0 }],
            complete: vec![0.0; row],
        };
        Ok(Grid { node_comm, peers, node, nodes, local_rank, local_size, shared, piece, scratch })
    }

    /// Elements of a slice in a piece of `piece_bytes` of the buffer: whole cache lines.
    fn piece_numel(piece_bytes: usize, world_size: usize) -> usize {
        (piece_bytes / size_of::<f32>() / world_size).next_multiple_of(16).max(16)
    }

    /// Floats of shared memory that each rank needs: two slots of what it publishes, one slice per
    /// rank, and of what it spreads, one slice per node.
    pub(super) fn shared_numel(piece_bytes: usize, nodes: usize, local_size: usize) -> usize {
        let piece = Grid::piece_numel(piece_bytes, nodes * local_size);
        // Whole pages, so that ranks write to different ones.
        (2 * (nodes * local_size + nodes) * piece).next_multiple_of(1024)
    }

    /// Gives the shared memory back. Collective.
    pub(super) fn free(self) -> Result<(), CommError> {
        self.shared.map_or(Ok(()), Shared::free)
    }

    /// Runs a pass. Collective; all ranks are known to have begun it.
    ///
    /// # Safety
    /// `pass.data` addresses `pass.numel` floats that nobody else touches until this returns.
    pub(super) unsafe fn run(&mut self, pass: Pass) -> Result<(), CommError> {
        if self.nodes * self.local_size == 1 {
            return Ok(());
        }
        let schedule = self.schedule(pass);
        let last_lag = schedule.iter().map(|&(_, lag)| lag).max().unwrap_or(0);
        let pieces = pass.slice_numel.min(pass.numel).div_ceil(self.piece);
        let mut requests = Vec::new();
        for round in 0..(if pieces == 0 { 0 } else { pieces + last_lag }) {
            let mut touched_node = false;
            for &(stage, lag) in &schedule {
                let Some(index) = round.checked_sub(lag).filter(|&index| index < pieces) else { continue };
                let offset = index * self.piece;
                let numel = self.piece.min(pass.slice_numel - offset);
                let piece = Piece { pass, offset, numel, slot: index % 2 };
                touched_node |= stage != Stage::Merge;
                // SAFETY: by this function's contract; stages run one after the other.
                requests.extend(unsafe { self.stage(stage, &piece) }?);
            }
            if let Some(shared) = self.shared.as_ref().filter(|_| touched_node) {
                shared.sync()?;
                requests.push(self.node_comm.start_barrier()?);
            }
            raw::wait(&mut requests)?;
            if let Some(shared) = &self.shared {
                shared.sync()?;
            }
        }
        Ok(())
    }

    /// The stages a pass needs, and how many rounds after the first each is.
    fn schedule(&self, pass: Pass) -> Vec<(Stage, usize)> {
        let (on_node, between) = (usize::from(self.local_size > 1), usize::from(self.nodes > 1));
        let (mut stages, mut lag) = (Vec::new(), 0);
        if pass.reduce {
            stages.extend([(Stage::Publish, 0), (Stage::SumNode, on_node)]);
            lag = on_node + between;
        }
        if pass.reduce && self.nodes > 1 || pass.gather {
            stages.push((Stage::Merge, lag));
        }
        if pass.gather {
            stages.extend([(Stage::Spread, lag + between), (Stage::Collect, lag + between + on_node)]);
        }
        stages
    }

    /// # Safety
    /// As [`Grid::run`]; the shared memory is used as the module header says.
    unsafe fn stage(&mut self, stage: Stage, piece: &Piece) -> Result<Option<Request>, CommError> {
        // SAFETY: handed on.
        unsafe {
            match stage {
                Stage::Publish => self.publish(piece),
                Stage::SumNode => return self.sum_node(piece),
                Stage::Merge => return self.merge(piece),
                Stage::Spread => self.spread(piece),
                Stage::Collect => self.collect(piece),
            }
        }
        Ok(None)
    }

    fn rank_of(&self, node: usize, local_rank: usize) -> usize {
        node * self.local_size + local_rank
    }

    fn rank(&self) -> usize {
        self.rank_of(self.node, self.local_rank)
    }

    /// Puts the slices that other ranks of this node sum into shared memory.
    unsafe fn publish(&self, piece: &Piece) {
        let Some(shared) = &self.shared else { return };
        let mine = self.published(shared, self.local_rank, piece.slot);
        for rank in self.others_on_node() {
            // SAFETY: nobody else refers to the buffer. Row `rank` of this rank's slot was last read two
            // pieces ago, before a barrier that all have passed.
            unsafe {
                let from = piece.slice_mut(rank);
                from_raw_parts_mut(mine.add(rank * self.piece), from.len()).copy_from_slice(from);
            }
        }
    }

    /// Sums over the node the slices of the ranks with this local rank, one per node; with several
    /// nodes, starts sending them to these ranks. This rank's own contribution is read where it is.
    unsafe fn sum_node(&mut self, piece: &Piece) -> Result<Option<Request>, CommError> {
        for node in 0..self.nodes {
            let rank = self.rank_of(node, self.local_rank);
            // SAFETY: nobody else refers to the buffer.
            let own = unsafe { piece.slice_mut(rank) };
            let rows: Vec<&[f32]> = (0..self.local_size)
                .map(|local_rank| match &self.shared {
                    // SAFETY: written a round ago, before a barrier, and not again before the next.
                    Some(shared) if local_rank != self.local_rank => unsafe {
                        let row = self.published(shared, local_rank, piece.slot).add(rank * self.piece);
                        from_raw_parts(row, own.len())
                    },
                    _ => &*own,
                })
                .collect();
            if let (Some(shared), 1) = (&self.shared, self.nodes) {
                let sum = self.spreading(shared, self.local_rank, piece.slot);
                // SAFETY: this rank's part, last read two pieces ago, before a barrier that all passed.
                let sum = unsafe { from_raw_parts_mut(sum, own.len()) };
                tree_sum(&rows, sum);
                own.copy_from_slice(sum);
            } else {
                let start = piece.slot * self.nodes * self.piece + node * piece.numel;
                // SAFETY: no message in flight uses this slot.
                tree_sum(&rows, unsafe { row(&mut self.scratch.sums, start, own.len()) });
            }
        }
        if self.nodes == 1 {
            return Ok(None);
        }
        let (start, numel) = (piece.slot * self.nodes * self.piece, self.nodes * piece.numel);
        // SAFETY: both rows hold `nodes` times `piece.numel` floats, live as long as the grid, and belong
        // to this slot, which is used again two rounds on, when the round has waited for the request.
        unsafe {
            let send = row(&mut self.scratch.sums, start, numel).as_ptr();
            let recv = row(&mut self.scratch.parts, start, numel).as_mut_ptr();
            self.peers.start_all_to_all(send, recv, piece.numel).map(Some)
        }
    }

    /// Sums the nodes' sums of this rank's slice, and starts sending the slice to its peers.
    unsafe fn merge(&mut self, piece: &Piece) -> Result<Option<Request>, CommError> {
        if self.nodes == 1 {
            return Ok(None);
        }
        // SAFETY: nobody else refers to the buffer.
        let own = unsafe { piece.slice_mut(self.rank()) };
        let start = piece.slot * self.nodes * self.piece;
        if piece.pass.reduce {
            let rows: Vec<&[f32]> = (0..self.nodes)
                // SAFETY: received a round ago; no message in flight uses this slot.
                .map(|node| unsafe { &*row(&mut self.scratch.parts, start + node * piece.numel, own.len()) })
                .collect();
            tree_sum(&rows, own);
        }
        if !piece.pass.gather {
            return Ok(None);
        }
        // SAFETY: as in `sum_node`; the first row is copied from before anything is sent.
        unsafe {
            let send = row(&mut self.scratch.own, piece.slot * self.piece, piece.numel);
            send[..own.len()].copy_from_slice(own);
            let recv = row(&mut self.scratch.complete, start, self.nodes * piece.numel).as_mut_ptr();
            self.peers.start_all_gather(send.as_ptr(), recv, piece.numel).map(Some)
        }
    }

    /// Takes over the peers' slices, and puts them and the own one into shared memory.
    unsafe fn spread(&mut self, piece: &Piece) {
        let start = piece.slot * self.nodes * self.piece;
        for node in 0..self.nodes {
            // SAFETY: nobody else refers to the buffer.
            let slice = unsafe { piece.slice_mut(self.rank_of(node, self.local_rank)) };
            if node != self.node {
                let from = start + node * piece.numel;
                // SAFETY: received a round ago; no message in flight uses this slot.
                slice.copy_from_slice(unsafe { row(&mut self.scratch.complete, from, slice.len()) });
            }
            let Some(shared) = &self.shared else { continue };
            if self.nodes == 1 && piece.pass.reduce {
                continue; // `sum_node` has put it there
            }
            let to = self.spreading(shared, self.local_rank, piece.slot);
            // SAFETY: this rank's part, last read two pieces ago, before a barrier that all have passed.
            unsafe { from_raw_parts_mut(to.add(node * self.piece), slice.len()) }.copy_from_slice(slice);
        }
    }

    /// Copies from shared memory the slices that other ranks of this node have put there.
    unsafe fn collect(&self, piece: &Piece) {
        let Some(shared) = &self.shared else { return };
        for rank in self.others_on_node() {
            let (node, local_rank) = (rank / self.local_size, rank % self.local_size);
            // SAFETY: nobody else refers to the buffer. The row was written a round ago, before a barrier,
            // and not again before the next.
            unsafe {
                let slice = piece.slice_mut(rank);
                let from = self.spreading(shared, local_rank, piece.slot).add(node * self.piece);
                slice.copy_from_slice(from_raw_parts(from, slice.len()));
            }
        }
    }

    /// Ranks whose slices other ranks of this node handle.
    fn others_on_node(&self) -> impl Iterator<Item = usize> + use<> {
        let (local_rank, local_size) = (self.local_rank, self.local_size);
        (0..self.nodes * local_size).filter(move |rank| rank % local_size != local_rank)
    }

    /// Where a local rank publishes, [nodes x local_size, P].
    fn published(&self, shared: &Shared, local_rank: usize, slot: usize) -> *mut f32 {
        shared.part(local_rank).wrapping_add(slot * self.nodes * self.local_size * self.piece)
    }

    /// Where a local rank spreads, [nodes, P].
    fn spreading(&self, shared: &Shared, local_rank: usize, slot: usize) -> *mut f32 {
        let published = 2 * self.nodes * self.local_size;
        shared.part(local_rank).wrapping_add((published + slot * self.nodes) * self.piece)
    }
}

/// Some elements of scratch memory. Goes by the pointer, so that MPI's use of other elements stands.
///
/// # Safety
/// No reference to these elements is alive, no message in flight uses them, and the scratch memory
/// outlives the result.
unsafe fn row<'a>(scratch: &mut Vec<f32>, start: usize, numel: usize) -> &'a mut [f32] {
    assert!(start + numel <= scratch.len(), "a row lies within the scratch memory");
    // SAFETY: within the vector, as just checked; the rest is the caller's duty.
    unsafe { from_raw_parts_mut(scratch.as_mut_ptr().add(start), numel) }
}
