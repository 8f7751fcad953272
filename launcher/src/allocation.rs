//! Machines that a batch system has given to this process: Slurm's and PBS's, read from the environment.
//! Knows what their variables look like and asks them nothing.

use crate::{Host, Hosts, LaunchError};

/// What the environment says of an allocation. None outside of one, and where it is this machine alone, whose
/// cores are counted better.
///
/// # Errors
/// Variables or files that do not read as they should.
pub fn from_environment(
    env: impl Fn(&str) -> Option<String>,
    is_this_machine: impl Fn(&str) -> bool,
) -> Result<Option<Hosts>, LaunchError> {
    let found = if let Some(list) = env("SLURM_JOB_NODELIST") {
        let counts = ["SLURM_TASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE"];
        let (name, counts) = counts
            .iter()
            .find_map(|&name| Some((name, env(name)?)))
            .unwrap_or(("SLURM_TASKS_PER_NODE", "1".into()));
        Some(("Slurm", slurm(&list, name, &counts)?))
    } else if let Some(file) = env("PBS_NODEFILE") {
        Some(("PBS", pbs(&file)?))
    } else {
        None
    };
    Ok(match found {
        Some((by, hosts)) if hosts.len() > 1 || !hosts.iter().all(|host| is_this_machine(&host.name)) => {
            Some(Hosts::Allocated { by, hosts })
        }
        _ => None,
    })
}

fn wrong(place: String, what: String) -> LaunchError {
    LaunchError::Hosts { place, what, hint: "name the hosts yourself, with --hosts or --hostfile" }
}

/// `node[1-3,7]` and `2(x3),1`.
fn slurm(list: &str, name: &str, counts: &str) -> Result<Vec<Host>, LaunchError> {
    let place = || format!("SLURM_JOB_NODELIST={list}");
    let names = expand(list).ok_or_else(|| wrong(place(), "does not read as a list of nodes".into()))?;
    let slots = repeat(counts).filter(|slots| slots.len() == names.len() || slots.len() == 1);
    let slots = slots.ok_or_else(|| {
        wrong(format!("{name}={counts}"), format!("does not fit the {} nodes", names.len()))
    })?;
    let slots = slots.iter().chain(std::iter::repeat(&slots[slots.len() - 1]));
    Ok(names.into_iter().zip(slots).map(|(name, &slots)| Host { name, slots: Some(slots) }).collect())
}

/// One line a slot.
fn pbs(file: &str) -> Result<Vec<Host>, LaunchError> {
    let place = format!("PBS_NODEFILE={file}");
    let text = std::fs::read_to_string(file);
    let text = text.map_err(|error| wrong(place.clone(), format!("cannot be read: {error}")))?;
    let mut hosts: Vec<Host> = Vec::new();
    for name in text.lines().map(str::trim).filter(|name| !name.is_empty()) {
        match hosts.iter_mut().find(|host| host.name == name) {
            Some(host) => host.slots = host.slots.map(|slots| slots + 1),
            None => hosts.push(Host { name: name.to_string(), slots: Some(1) }),
        }
    }
    if hosts.is_empty() { Err(wrong(place, "lists no host".into())) } else { Ok(hosts) }
}

/// The names that a list with ranges in brackets stands for.
fn expand(list: &str) -> Option<Vec<String>> {
    let mut names = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let end = end_of_item(rest)?;
        let (item, after) = rest.split_at(end);
        rest = after.strip_prefix(',').unwrap_or(after);
        names.extend(expand_item(item)?);
    }
    (!names.is_empty()).then_some(names)
}

/// Where an item ends: at a comma outside of brackets.
fn end_of_item(list: &str) -> Option<usize> {
    let mut inside = false;
    for (at, character) in list.char_indices() {
        match character {
            '[' if !inside => inside = true,
            ']' if inside => inside = false,
            '[' | ']' => return None,
            ',' if !inside => return Some(at),
            _ => {}
        }
    }
    (!inside).then_some(list.len())
}

fn expand_item(item: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = item.split_once('[') else {
        return (!item.is_empty()).then(|| vec![item.to_string()]);
    };
    let (ranges, after) = rest.split_once(']')?;
    let mut names = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (from, to): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if to < from || to - from > 100_000 {
            return None;
        }
        let width = first.len();
        for number in from..=to {
            // Several brackets in one name stand for all combinations.
            names.extend(expand_item(&format!("{before}{number:0width$}{after}"))?);
        }
    }
    Some(names)
}

/// The numbers that `2(x3),1` stands for.
fn repeat(counts: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for item in counts.split(',') {
        let (count, times) = match item.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (item, 1),
        };
        let count = count.parse().ok().filter(|&count: &usize| count > 0)?;
        all.extend(std::iter::repeat_n(count, usize::min(times, 100_000)));
    }
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Hosts>, LaunchError> {
        let env = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        from_environment(env, |name| name == "here")
    }

    fn told(pairs: &[(&str, &str)]) -> Vec<(String, usize)> {
        let hosts = read(pairs).unwrap().expect("an allocation");
        hosts.list().iter().map(|host| (host.name.clone(), host.slots.unwrap())).collect()
    }

    #[test]
    fn outside_of_an_allocation_and_on_this_machine_alone_there_is_none() {
        assert_eq!(read(&[]).unwrap(), None);
        let alone = [("SLURM_JOB_NODELIST", "here"), ("SLURM_TASKS_PER_NODE", "4")];
        assert_eq!(read(&alone).unwrap(), None);
    }

    #[test]
    fn slurms_nodes_are_expanded_with_their_tasks() {
        let pairs = [("SLURM_JOB_NODELIST", "node[08-10,12],gpu1"), ("SLURM_TASKS_PER_NODE", "4(x3),2,8")];
        let expected = [("node08", 4), ("node09", 4), ("node10", 4), ("node12", 2), ("gpu1", 8)];
        assert_eq!(told(&pairs), expected.map(|(name, slots)| (name.to_string(), slots)));
        let combined = [("SLURM_JOB_NODELIST", "r[1-2]n[1-2]"), ("SLURM_JOB_CPUS_PER_NODE", "16(x4)")];
        assert_eq!(told(&combined)[3], ("r2n2".to_string(), 16));
        assert_eq!(told(&[("SLURM_JOB_NODELIST", "there")]), [("there".to_string(), 1)]);
    }

    #[test]
    fn what_does_not_read_is_refused_with_the_variable() {
        for (list, counts) in [("node[1-", "1"), ("node[2-1]", "1"), ("", "1"), ("a,b,c", "1,2"), ("a", "x")]
        {
            let error = read(&[("SLURM_JOB_NODELIST", list), ("SLURM_TASKS_PER_NODE", counts)]).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("SLURM_") && error.contains("hint: "), "{list} {counts}: {error}");
        }
        assert!(
            read(&[("PBS_NODEFILE", "/no/such/file")]).unwrap_err().to_string().contains("cannot be read")
        );
    }

    #[test]
    fn pbs_lists_a_host_once_for_each_slot() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("nodes");
        std::fs::write(&file, "a\na\nb\n\na\n").unwrap();
        let pairs = [("PBS_NODEFILE", file.to_str().unwrap())];
        assert_eq!(told(&pairs), [("a".to_string(), 3), ("b".to_string(), 1)]);
    }
}
