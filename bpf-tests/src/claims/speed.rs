//! How fast, as ratios within one run. The small size is for a busy machine and an agent that was not optimised: it shows
//! that what is promised is not turned around, not by how much it holds.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Claim, Finding, Size, Topic};
use crate::bench::{
    capture::{self, ADDED, ADDED_OTHERS, CONNECT, Variant},
    mesh::{self, Load, Way},
    recording::{Recording, Subject},
    statistics::median,
};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "speed",
    about: "how fast, beside iptables, Envoy and no mesh at all; `cargo xtask bench` has all figures",
    programs: &[
        "ip",
        "iptables-nft-save",
        "nginx",
        "wrk",
        "openssl",
        "envoy",
    ],
    claims: claims! {
        self::capture_costs_less_than_rules: "capture by eBPF adds at most half as much to connect() as one service by iptables";
        self::capture_is_flat: "with 100,000 services connect() takes no more than 10 % longer than with one";
        self::others_pay_nothing: "a connect that is not captured takes at most 1.5 us longer";
        self::bulk: "bytes, by either tunnel: 0.30 of a direct connection's rate with one stream, 0.33 with 8, for 1.5 CPU seconds per GB at most";
        self::requests: "requests over connections that stay, by hbone: 0.40 of the direct rate with 32, 0.45 with one";
        self::new_connections: "new connections with a byte each way, by hbone: 0.30 of the direct rate with one client and under 8 times its time, 0.40 with 32";
        self::faster_than_sidecars: "every rate is higher than by iptables and Envoy in the same run, by either tunnel";
        self::beside_bulk: "a question beside 8 streams of bulk takes at most half as long (median) as by iptables and Envoy, by either tunnel";
        self::memory: "by either tunnel, an idle agent takes 15 MiB, and an open idle connection 6 KiB on each node";
    },
};

/// Of the order within rounds: a fixed one, so that a run can be repeated.
const SEED: u64 = 6;

/// A median, which must be there.
fn of(recording: &Recording, measure: &'static str, subject: &Subject) -> Result<f64> {
    let values = recording.values(measure, subject);
    median(values)
        .with_context(|| format!("no {measure} of {subject:?} in {}", recording.to_json()))
}

fn captured(size: Size, variants: &[Variant], services: &[u32]) -> Result<Recording> {
    let plan = capture::Plan {
        variants: variants.to_vec(),
        services: services.to_vec(),
        rounds: size.pick(3, 10),
        time: Duration::from_millis(size.pick(200, 2_000)),
        seed: SEED,
        established: false,
        changes: false,
    };
    capture::run(&plan, &mut |_progress| Ok(()))
}

fn capture_costs_less_than_rules(size: Size) -> Result<Finding> {
    let services = size.pick(1_000, 1);
    let variants = [Variant::None, Variant::Ebpf, Variant::IptablesNft];
    let recording = captured(size, &variants, &[services])?;
    let added = |variant| of(&recording, ADDED, &capture::subject(variant, services));
    let (ebpf, rules) = (added(Variant::Ebpf)?, added(Variant::IptablesNft)?);
    // What single loads differ by on a busy machine.
    let (share, doubt) = size.pick((1.0, 30.0), (0.5, 0.0));
    let most = rules * share + doubt;
    Ok(Finding::new(
        ebpf <= most,
        format!(
            "eBPF adds {ebpf:.1} us, iptables-nft {rules:.1} us, services: {services} each (at most {most:.1})"
        ),
    ))
}

fn capture_is_flat(size: Size) -> Result<Finding> {
    let (few, many) = (1, size.pick(2_000, 100_000));
    let recording = captured(size, &[Variant::Ebpf], &[few, many])?;
    let took = |services| {
        of(
            &recording,
            CONNECT,
            &capture::subject(Variant::Ebpf, services),
        )
    };
    let (with_few, with_many) = (took(few)?, took(many)?);
    let most = size.pick(3.0, 1.1);
    Ok(Finding::new(
        with_many <= with_few * most,
        format!(
            "{with_few:.1} us with {few} service, {with_many:.1} us with {many} (at most {most} times that)"
        ),
    ))
}

fn others_pay_nothing(size: Size) -> Result<Finding> {
    let services = 1_000;
    let recording = captured(size, &[Variant::None, Variant::Ebpf], &[services])?;
    let added = of(
        &recording,
        ADDED_OTHERS,
        &capture::subject(Variant::Ebpf, services),
    )?;
    let most = size.pick(50.0, 1.5);
    Ok(Finding::new(
        added <= most,
        format!("{added:+.2} us, with {services} services beside (at most {most})"),
    ))
}

/// Figures of some ways under some loads.
struct Measured {
    recording: Recording,
    size: Size,
}

impl Measured {
    fn new(size: Size, ways: &[Way], loads: &[Load]) -> Result<Self> {
        let plan = mesh::Plan {
            ways: ways.to_vec(),
            against: None,
            loads: loads.to_vec(),
            rounds: size.pick(1, 10),
            time: Duration::from_millis(size.pick(500, 2_000)),
            seed: SEED,
            idle_seconds: u64::from(loads.is_empty()),
        };
        let recording = mesh::run(&plan, &mut |_progress| Ok(()))?;
        Ok(Self { recording, size })
    }

    fn of(&self, measure: &'static str, way: Way) -> Result<f64> {
        of(&self.recording, measure, &way.subject())
    }

    fn ratio(&self, measure: &'static str, way: Way) -> Result<f64> {
        let direct = self.of(measure, Way::Direct)?;
        ensure!(direct > 0.0, "nothing was done directly");
        Ok(self.of(measure, way)? / direct)
    }

    /// Whether the ratio to direct is at least `wanted`; at the small size a thousandth is enough.
    fn reaches(&self, measure: &'static str, way: Way, wanted: f64) -> Result<(bool, String)> {
        let ratio = self.ratio(measure, way)?;
        let least = self.size.pick(0.001, wanted);
        let holds = ratio >= least;
        let figure = format!("{measure}, {} {ratio:.2} (at least {least})", way.name());
        Ok((holds, figure))
    }

    /// Whether the figure is at most `wanted`; at the small size 100 times that.
    fn within(&self, measure: &'static str, way: Way, wanted: f64) -> Result<(bool, String)> {
        let value = self.of(measure, way)?;
        let most = self.size.pick(wanted * 100.0, wanted);
        let holds = value <= most;
        let figure = format!("{measure}, {} {value:.2} (at most {most})", way.name());
        Ok((holds, figure))
    }

    /// How much the figure is of Envoy's, also in words.
    fn to_envoy(&self, measure: &'static str, way: Way) -> Result<(f64, String)> {
        let envoy = self.of(measure, Way::Envoy)?;
        ensure!(envoy > 0.0, "nothing was done through Envoy");
        let ratio = self.of(measure, way)? / envoy;
        let name = way.name();
        Ok((ratio, format!("{measure}, {name} {ratio:.2} times Envoy's")))
    }
}

fn all(parts: Vec<(bool, String)>) -> Finding {
    let holds = parts.iter().all(|(holds, _)| *holds);
    let figures: Vec<String> = parts.into_iter().map(|(_, figure)| figure).collect();
    Finding::new(holds, figures.join("; "))
}

const TUNNELS: [Way; 2] = [Way::Connect, Way::Hbone];

fn bulk(size: Size) -> Result<Finding> {
    let ways = [Way::Direct, Way::Connect, Way::Hbone];
    let it = Measured::new(size, &ways, &[Load::Bulk(1), Load::Bulk(8)])?;
    let mut parts = vec![];
    for way in TUNNELS {
        parts.push(it.reaches("bulk, 1 stream", way, 0.30)?);
        parts.push(it.reaches("bulk, 8 streams", way, 0.33)?);
        parts.push(it.within("processor time per GB, 1 stream", way, 1.5)?);
        parts.push(it.within("processor time per GB, 8 streams", way, 1.5)?);
    }
    Ok(all(parts))
}

fn requests(size: Size) -> Result<Finding> {
    let (ways, way) = ([Way::Direct, Way::Hbone], Way::Hbone);
    let it = Measured::new(size, &ways, &[Load::Requests(1), Load::Requests(32)])?;
    Ok(all(vec![
        it.reaches("requests per second, 32 connections", way, 0.40)?,
        it.reaches("requests per second, 1 connection", way, 0.45)?,
    ]))
}

fn new_connections(size: Size) -> Result<Finding> {
    let (ways, way) = ([Way::Direct, Way::Hbone], Way::Hbone);
    let it = Measured::new(size, &ways, &[Load::Calls(1), Load::Calls(32)])?;
    let times = it.ratio("new connection with a byte each way, 1 client, p50", way)?;
    let most = size.pick(10_000.0, 8.0);
    Ok(all(vec![
        it.reaches("new connections per second, 1 client", way, 0.30)?,
        it.reaches("new connections per second, 32 clients", way, 0.40)?,
        (
            times < most,
            format!("{times:.1} times the time of one (below {most})"),
        ),
    ]))
}

fn faster_than_sidecars(size: Size) -> Result<Finding> {
    let ways = [Way::Connect, Way::Hbone, Way::Envoy];
    let loads = match size {
        Size::Quick => vec![Load::Calls(1)],
        Size::Full => vec![
            Load::Calls(1),
            Load::Calls(32),
            Load::Requests(1),
            Load::Requests(32),
            Load::Bulk(1),
            Load::Bulk(8),
        ],
    };
    let it = Measured::new(size, &ways, &loads)?;
    let rates = [
        "new connections per second, 1 client",
        "new connections per second, 32 clients",
        "requests per second, 1 connection",
        "requests per second, 32 connections",
        "bulk, 1 stream",
        "bulk, 8 streams",
    ];
    let measured = size.pick(1, rates.len());
    // An agent that was not optimised, beside an Envoy that was.
    let least = size.pick(0.01, 1.0);
    let mut parts = vec![];
    for measure in rates.into_iter().take(measured) {
        for way in TUNNELS {
            let (ratio, figure) = it.to_envoy(measure, way)?;
            parts.push((ratio >= least, format!("{figure} (at least {least})")));
        }
    }
    Ok(all(parts))
}

fn beside_bulk(size: Size) -> Result<Finding> {
    let ways = [Way::Connect, Way::Hbone, Way::Envoy];
    let it = Measured::new(size, &ways, &[Load::Beside(8)])?;
    // An agent that was not optimised, beside an Envoy that was.
    let most = size.pick(10.0, 0.5);
    let mut parts = vec![];
    for way in TUNNELS {
        let measure = "round trip of 1 KiB beside 8 streams of bulk, p50";
        let (ratio, figure) = it.to_envoy(measure, way)?;
        parts.push((ratio <= most, format!("{figure} (at most {most})")));
    }
    Ok(all(parts))
}

fn memory(size: Size) -> Result<Finding> {
    let it = Measured::new(size, &TUNNELS, &[])?;
    let mut parts = vec![];
    for way in TUNNELS {
        parts.push(it.within("memory while idle, calling node", way, 15.0)?);
        parts.push(it.within("memory while idle, called node", way, 15.0)?);
        parts.push(it.within("memory per idle connection, calling node", way, 6.0)?);
        parts.push(it.within("memory per idle connection, called node", way, 6.0)?);
    }
    Ok(all(parts))
}
