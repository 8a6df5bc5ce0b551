//! What was decided and what became of flows: one counter each, one label each.

/// `ECONNREFUSED`: somebody owns the destination and does not take the connection.
pub const ECONNREFUSED: i32 = 111;
/// `EHOSTUNREACH`: nobody owns the destination.
pub const EHOSTUNREACH: i32 = 113;

macro_rules! counted {
    (
        $(#[$meta:meta])* $name:ident starts at $first:literal {
            $($(#[$doc:meta])* $variant:ident = $slot:literal, $label:literal;)*
        }
    ) => {
        $(#[$meta])*
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$doc])* $variant = $slot,)*
        }

        impl $name {
            /// All of them, in the order of their slots.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its slot in the counter map.
            #[inline(always)]
            pub const fn slot(self) -> u32 {
                self as u32
            }

            /// Its label in metrics and logs.
            #[inline(always)]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)*
                }
            }

            /// The one with this slot.
            pub const fn from_slot(slot: u32) -> Option<Self> {
                match slot {
                    $($slot => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                formatter.write_str(self.as_str())
            }
        }
    };
}

counted! {
    /// What became of a `connect()`.
    Verdict starts at 0 {
        /// Sent to the agent's listener.
        Captured = 0, "captured";
        /// Not an address of the mesh.
        PassedOther = 1, "passed_other";
        /// To the host itself.
        PassedLoopback = 2, "passed_loopback";
        /// Not TCP.
        PassedProtocol = 3, "passed_protocol";
        /// The agent's own.
        PassedAgent = 4, "passed_agent";
        /// The service does not have this port.
        RefusedUnknownPort = 5, "refused_unknown_port";
        /// The service has no instance that may be called.
        RefusedNoEndpoint = 6, "refused_no_endpoint";
        /// In a virtual range, but no service has this address.
        RefusedUnknownVip = 7, "refused_unknown_vip";
        /// The agent does not listen in this network namespace.
        RefusedNetns = 8, "refused_netns";
        /// The agent itself called a virtual address.
        RefusedAgent = 9, "refused_agent";
        /// The destination could not be remembered on the socket (`net.core.optmem_max`, memory).
        RefusedStorage = 10, "refused_storage";
        /// A map element changed twice while it was read.
        RefusedTorn = 11, "refused_torn";
        /// The socket is bound to an interface and could not be moved to loopback or back.
        RefusedDevice = 12, "refused_device";
        /// The agent has not configured the programs.
        RefusedUnconfigured = 13, "refused_unconfigured";
        /// The kernel gave no socket to remember the destination on.
        RefusedNoSocket = 14, "refused_no_socket";
        /// No agent takes it, and the service is open then.
        PassedOpen = 15, "passed_open";
        /// No agent takes it, and it was sent to the service's fallback.
        Fallback = 16, "fallback";
        /// The agent listens, but has not shown that it runs for too long.
        RefusedHung = 17, "refused_hung";
        /// A DNS query, sent to the agent: a connect, or a datagram of a socket that is not connected.
        QueryCaptured = 18, "query_captured";
        /// A DNS query that no agent takes, or that could not be kept for one: to its server.
        QueryPassed = 19, "query_passed";
    }
}

impl Verdict {
    /// Whether the connect goes on, to wherever.
    #[inline(always)]
    pub const fn is_refusal(self) -> bool {
        self.errno() != 0
    }

    /// What `connect()` fails with; 0 if it goes on.
    #[inline(always)]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Captured
            | Self::PassedOther
            | Self::PassedLoopback
            | Self::PassedProtocol
            | Self::PassedAgent
            | Self::PassedOpen
            | Self::Fallback
            | Self::QueryCaptured
            | Self::QueryPassed => 0,
            Self::RefusedUnknownVip | Self::RefusedAgent => EHOSTUNREACH,
            Self::RefusedUnknownPort
            | Self::RefusedNoEndpoint
            | Self::RefusedNetns
            | Self::RefusedStorage
            | Self::RefusedTorn
            | Self::RefusedDevice
            | Self::RefusedUnconfigured
            | Self::RefusedNoSocket
            | Self::RefusedHung => ECONNREFUSED,
        }
    }
}

counted! {
    /// What became of the hand-over from the application's socket to the agent's, and of questions about it.
    FlowEvent starts at 32 {
        /// Published as the SYN was about to leave.
        Published = 32, "published";
        /// Moved to the accepted socket.
        Moved = 33, "moved";
        /// Removed with the application's socket: nobody accepted.
        Removed = 34, "removed";
        /// Not published: the map is full. The agent closes the connection.
        Full = 35, "full";
        /// Not published: the socket connects elsewhere than it was sent.
        Stale = 36, "stale";
        /// Not moved: no memory for the accepted socket. The agent closes the connection.
        MoveFailed = 37, "move_failed";
        /// `getpeername()` answered with the original destination.
        PeerShown = 38, "peer_shown";
        /// `SO_ORIGINAL_DST` answered.
        DestinationShown = 39, "destination_shown";
        /// A refusal was not reported: the ring buffer is full.
        ReportLost = 40, "report_lost";
    }
}

const _: () = assert!(
    Verdict::ALL.len() <= 32,
    "the slots from 32 on are for flow events"
);
