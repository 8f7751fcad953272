//! How ranks lie on nodes, as arithmetic on the list of who shares memory with whom.

/// Where a rank is, and whether the ranks lie so that a node's sum is a subtree of the whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) node: usize,
    pub(super) nodes: usize,
    pub(super) local_rank: usize,
    pub(super) local_size: usize,
    /// One node; or nodes of consecutive ranks, all equally many and a power of two.
    pub(super) nested: bool,
}

impl Layout {
    /// Of rank `rank`, given for each rank the lowest rank on its node.
    pub(super) fn new(leaders: &[usize], rank: usize) -> Layout {
        let heads: Vec<usize> = (0..leaders.len()).filter(|&r| leaders[r] == r).collect();
        let leader = leaders[rank];
        let on_node = |r: &usize| leaders[*r] == leader;
        let local_size = (0..leaders.len()).filter(on_node).count();
        let even = leaders.len() == heads.len() * local_size
            && (0..leaders.len()).all(|r| leaders[r] == r - r % local_size);
        Layout {
            node: heads.iter().position(|&head| head == leader).unwrap_or(0),
            nodes: heads.len(),
            local_rank: (0..rank).filter(on_node).count(),
            local_size,
            nested: heads.len() == 1 || even && local_size.is_power_of_two(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_blocks_of_a_power_of_two_nest() {
        let layout = Layout::new(&[0, 0, 2, 2, 4, 4], 3);
        assert_eq!((layout.node, layout.nodes), (1, 3));
        assert_eq!((layout.local_rank, layout.local_size, layout.nested), (1, 2, true));
        assert!(Layout::new(&[0, 0, 0], 2).nested, "one node, whatever its size");
        assert!(Layout::new(&[0, 1, 2], 2).nested, "a rank per node");
    }

    #[test]
    fn other_layouts_do_not_nest_on_any_rank() {
        for leaders in [&[0, 1, 0, 1][..], &[0, 0, 2], &[0, 0, 0, 3, 3, 3], &[0, 0, 2, 3]] {
            for rank in 0..leaders.len() {
                assert!(!Layout::new(leaders, rank).nested, "{leaders:?} rank {rank}");
            }
        }
        let layout = Layout::new(&[0, 1, 0, 1], 3);
        assert_eq!((layout.node, layout.local_rank, layout.local_size), (1, 1, 2));
    }
}
