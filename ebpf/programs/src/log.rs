//! What the programs tell the agent's log, in the build with the feature `log` and while the agent asks for it.

#[cfg(not(feature = "log"))]
pub use off::{flow, verdict};
#[cfg(feature = "log")]
pub use on::{flow, verdict};

#[cfg(feature = "log")]
mod on {
    use aya_ebpf::programs::{SockAddrContext, SockOpsContext};
    use aya_log_ebpf::info;
    use sidestep_abi::{Address, FlowEvent, PortBe, Verdict};

    use crate::{
        context::{Ends, SockAddr, SockOps},
        maps, report,
    };

    #[inline(always)]
    fn is_on() -> bool {
        maps::config().is_some_and(|config| config.debug != 0)
    }

    /// What was decided on a connect.
    #[inline(always)]
    pub fn verdict(context: SockAddr, destination: &Address, port: PortBe, verdict: Verdict) {
        if !is_on() {
            return;
        }
        let caller = report::caller();
        info!(
            &SockAddrContext::new(context.0),
            "connect to {:i} port {}: {}, cgroup {}, process {}",
            destination.to_ipv6(),
            port.to_host(),
            verdict.as_str(),
            caller.cgroup,
            caller.process
        );
    }

    /// What became of the hand-over of a connection, seen from the socket at hand. Both ends are loopback
    /// addresses; with them the message would take more stack than a program has.
    #[inline(always)]
    pub fn flow(context: SockOps, ends: &Ends, event: FlowEvent) {
        if !is_on() {
            return;
        }
        info!(
            &SockOpsContext::new(context.0),
            "flow from port {} to port {}: {}",
            ends.local_port,
            ends.remote_port,
            event.as_str()
        );
    }
}

#[cfg(not(feature = "log"))]
mod off {
    use sidestep_abi::{Address, FlowEvent, PortBe, Verdict};

    use crate::context::{Ends, SockAddr, SockOps};

    #[inline(always)]
    pub fn verdict(_context: SockAddr, _destination: &Address, _port: PortBe, _verdict: Verdict) {}

    #[inline(always)]
    pub fn flow(_context: SockOps, _ends: &Ends, _event: FlowEvent) {}
}
