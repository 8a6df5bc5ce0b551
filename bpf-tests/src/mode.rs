//! By what the labs of a thread capture: claims are the same in every mode.

use std::cell::Cell;

/// `capture.mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// eBPF programs.
    #[default]
    Ebpf,
    /// iptables rules by way of nftables.
    IptablesNft,
    /// iptables rules in the older tables.
    IptablesLegacy,
}

thread_local! {
    static MODE: Cell<Mode> = const { Cell::new(Mode::Ebpf) };
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ebpf, Self::IptablesNft, Self::IptablesLegacy];

    /// As the configuration calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
        }
    }

    /// Makes labs of this thread capture so from now on.
    pub fn choose(self) {
        MODE.set(self);
    }

    /// By what a lab made here and now captures.
    pub fn chosen() -> Self {
        MODE.get()
    }
}
