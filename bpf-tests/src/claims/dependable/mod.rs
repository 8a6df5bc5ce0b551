//! Agents that are killed, restarted and replaced, and what else goes wrong around them.

mod away;
mod changed;
mod disk;
mod effective;
mod expiry;
mod foreign;
mod full;
pub(super) mod replaced;
mod strangers;
pub(super) mod web;
mod wire;

use super::{Claim, Topic};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "dependable",
    about: "agents that are killed and replaced under load, and what else goes wrong around them",
    programs: &["ip", "curl", "python3", "ss", "tcpdump", "openssl", "date"],
    claims: claims! {
        away::a_killed_agent_fails_closed: "while a killed agent is away, calls are refused at once; the next agent serves them through the same links and maps";
        away::a_killed_agent_is_answered_by_the_policy: "while a killed agent is away, what `[[away]]` says of a service answers its calls at once: refused, passed on at a real address, or sent to the fallback";
        away::a_hung_agent_is_answered_by_the_policy: "an agent that hangs is answered in the same way once capture.hung_after is over, until it goes on";
        away::a_reload_changes_the_policy: "a reload changes `[[away]]`, and a service is open at no virtual address, whatever it says";
        away::a_busy_machine_is_no_hang: "an agent that has to share its processors with many others is not taken for hung";
        away::a_broken_catalog_at_start_takes_nothing_away: "an agent that starts with a broken catalog file leaves in the kernel what that file said before";
        replaced::an_upgrade_loses_no_connection: "`sidestep upgrade` under load: no connection fails, and what was live ends with all its bytes";
        replaced::a_kill_costs_only_the_time_away: "kill -9 under load: connections fail only while an agent is away, and none reaches a wrong service";
        changed::changes_cost_no_connection: "changes of the catalog and reloads under load: no connection fails";
        changed::nothing_is_readable_meanwhile: "agents killed and replaced under load: nothing of an answer is readable on the wire";
        effective::an_effect_that_is_lost_is_told: "when somebody's program undoes capture, the agent says so within seconds";
        effective::a_cgroup_that_was_replaced_is_attached_anew: "a cgroup that was replaced by another of its name is captured in again, by itself";
        away::detach_leaves_a_clean_host: "`sidestep detach` refuses while an agent runs, and leaves nothing of one that has ended";
        full::a_catalog_too_large_takes_nothing_away: "a catalog with more virtual addresses than fit into the kernel's maps takes nothing away and is reported";
        full::a_socket_without_memory_is_refused: "a connect that the kernel has no memory to remember is refused, with the reason counted";
        full::refusals_that_nobody_reads_block_nothing: "while nobody reads what the programs report, connects are refused and captured as ever";
        disk::a_full_disk_keeps_nobody_from_calling: "a full disk under the agent's state keeps nobody from calling, is in the status, and is caught up on";
        disk::a_replaced_catalog_directory_is_followed: "a catalog directory that is moved away takes nothing away, and the one in its place is followed";
        expiry::an_authority_that_ran_out_fails_closed: "when what signs on a node runs out, calls go on until then, are refused after it and never plaintext, and go on when there is another";
        strangers::connections_that_say_nothing_are_cheap_and_end: "connections to the tunnel port that say nothing keep no call waiting, cost little, and are gone after tunnel.handshake_timeout";
        strangers::garbage_at_the_tunnel_port_harms_nobody: "whatever strangers send to the tunnel port ends their connections and no others";
        foreign::an_agent_starts_beside_others_or_says_why_not: "beside a program of somebody else an agent works, or ends with what to do about it, as `sidestep check` says before";
        foreign::others_that_come_later_take_nothing_away: "a program of somebody else that comes later takes no call away, and keeps no later agent out";
        wire::a_transfer_goes_on_when_the_link_is_back: "a transfer over a link that is down for a while arrives whole";
        wire::a_transfer_to_a_lost_node_ends: "a transfer over a link that stays down ends on both nodes as soon as Linux gives it up";
    },
};
