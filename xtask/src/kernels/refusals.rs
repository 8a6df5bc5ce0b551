//! What kernels below the minimum are known to refuse, and why.

/// A program that kernels of one series do not take.
#[derive(Debug)]
pub(crate) struct Refusal {
    series: &'static str,
    program: &'static str,
    /// Among what the verifier says.
    says: &'static str,
    /// For people.
    pub(crate) reason: &'static str,
}

const NO_SET_RETVAL: &str = "no bpf_set_retval() at connect(), which says why: Linux 6.1";

const ALL: [Refusal; 3] = [
    Refusal {
        series: "5.10",
        program: "sidestep_conn4",
        says: "invalid func unknown#187",
        reason: NO_SET_RETVAL,
    },
    Refusal {
        series: "5.10",
        program: "sidestep_conn6",
        says: "invalid func unknown#187",
        reason: NO_SET_RETVAL,
    },
    Refusal {
        series: "5.10",
        program: "sidestep_flows",
        says: "unknown func bpf_get_netns_cookie",
        reason: "no bpf_get_netns_cookie() in sock_ops, which tells namespaces apart: Linux 5.15",
    },
];

/// Whether kernels of this series are known to refuse this program.
pub(crate) fn known(series: &str, program: &str) -> Option<&'static Refusal> {
    ALL.iter()
        .find(|refusal| refusal.series == series && refusal.program == program)
}

impl Refusal {
    /// Whether what the verifier said means this.
    pub(crate) fn explains(&self, error: &str) -> bool {
        error.contains(self.says)
    }
}
