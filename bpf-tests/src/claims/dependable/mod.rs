//! Agents that are killed, restarted and replaced.

mod away;
mod changed;
mod effective;
mod replaced;

use super::{Claim, Topic};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "dependable",
    about: "agents that are killed, restarted and replaced under load",
    programs: &["ip", "curl", "tcpdump"],
    claims: claims! {
        away::a_killed_agent_fails_closed: "while a killed agent is away, calls are refused at once; the next agent serves them through the same links and maps";
        away::a_broken_catalog_at_start_takes_nothing_away: "an agent that starts with a broken catalog file leaves in the kernel what that file said before";
        replaced::an_upgrade_loses_no_connection: "`sidestep upgrade` under load: no connection fails, and what was live ends with all its bytes";
        replaced::a_kill_costs_only_the_time_away: "kill -9 under load: connections fail only while an agent is away, and none reaches a wrong service";
        changed::changes_cost_no_connection: "changes of the catalog and reloads under load: no connection fails";
        changed::nothing_is_readable_meanwhile: "agents killed and replaced under load: nothing of an answer is readable on the wire";
        effective::an_effect_that_is_lost_is_told: "when somebody's program undoes capture, the agent says so within seconds";
        effective::a_cgroup_that_was_replaced_is_attached_anew: "a cgroup that was replaced by another of its name is captured in again, by itself";
        away::detach_leaves_a_clean_host: "`sidestep detach` refuses while an agent runs, and leaves nothing of one that has ended";
    },
};
