//! Programs as they are, which know of Sidestep only what `resolv.conf` says.

use anyhow::{Context as _, Result, ensure};

use super::{LISTENER, dig, dns, with_resolv_conf, write_resolv_conf};
use crate::{
    claims::{Finding, Size},
    mesh::{Mesh, local, vip},
    services,
    wait::SOON,
    workload::Kind,
};

/// Where the agent takes what was captured.
const CAPTURE_PORT: u16 = 15001;

pub(super) fn programs_resolve_and_connect(_size: Size) -> Result<Finding> {
    let mut mesh = Mesh::new("names")?;
    let place = mesh.place("web", "web-1", Kind::Cgroup)?;
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    mesh.keep(services::nginx(&place, local(8080), "page of web-1")?);
    dns(&mut mesh.lab.a, "listen = \"127.0.0.1:53\"\nupstreams = []");
    mesh.start()?;
    let resolv_conf = write_resolv_conf(mesh.shop.directory(), LISTENER)?;
    let address = vip(1, 80).ip().to_string();

    let getent = ["getent", "ahostsv4", "web.virtual.consul"];
    let python = [
        "python3",
        "-c",
        "import socket; print(socket.gethostbyname('WEB.service.consul'))",
    ];
    let search = [
        "env",
        "LOCALDOMAIN=virtual.consul",
        "getent",
        "ahostsv4",
        "web",
    ];
    let dig_short = ["dig", "+short", "web.service.dc1.consul"];
    for command in [&getent[..], &python, &search, &dig_short] {
        let said = with_resolv_conf(&mesh.shop, &resolv_conf, command).run(SOON)?;
        ensure!(said.starts_with(&address), "{command:?} said {said:?}");
    }
    let unknown = ["getent", "hosts", "nothing.virtual.consul"];
    let unknown = with_resolv_conf(&mesh.shop, &resolv_conf, &unknown).output(SOON)?;
    ensure!(unknown.code() == Some(2), "{unknown:?}");
    let mut pages = 0;
    for name in [
        "web.virtual.consul",
        "web.service.consul",
        "web.connect.consul",
    ] {
        let url = format!("http://{name}/");
        let curl = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "20",
            &url,
        ];
        let page = with_resolv_conf(&mesh.shop, &resolv_conf, &curl)
            .run(SOON)
            .with_context(|| mesh.lab.a.agent_said())?;
        ensure!(page == "page of web-1\n", "{name}: {page:?}");
        pages += 1;
    }
    let reverse = dig(&mesh.lab.a, &format!("+short -x {address}"))?;
    ensure!(reverse.trim() == "web.virtual.consul.", "{reverse:?}");
    Ok(Finding::new(
        true,
        format!("4 ways to resolve, {pages} pages by name, and the address has its name"),
    ))
}

pub(super) fn large_answers_come_whole(_size: Size) -> Result<Finding> {
    let instances = 100;
    let mut mesh = Mesh::new("names-large")?;
    let entries: Vec<String> = (1..=instances)
        .map(|n| format!("{{ id: many-{n}, name: many, address: \"192.0.2.{n}\", port: 80 }}"))
        .collect();
    let file = format!(
        "node: {{ name: far, address: 192.0.2.254 }}\nservices: [{}]\n",
        entries.join(", ")
    );
    mesh.lab.catalog.write("many.yaml", &file)?;
    dns(
        &mut mesh.lab.a,
        "listen = \"127.0.0.1:53\"\nservice_answers = \"instances\"\nupstreams = []",
    );
    mesh.start()?;

    let mut sizes = vec![];
    for (words, most) in [
        ("+noedns +ignore", 512),
        ("+bufsize=700 +ignore", 700),
        ("+bufsize=4096 +ignore", 1232),
        ("+bufsize=4096 +dnssec +ignore", 1232),
    ] {
        let said = dig(&mesh.lab.a, &format!("{words} many.service.consul"))?;
        let size = size(&said)?;
        ensure!(
            said.contains(" tc ") || said.contains(" tc;"),
            "not cut: {said}"
        );
        ensure!(size <= most && size > most / 2, "{words}: {size} bytes");
        sizes.push(size);
    }
    for words in ["", "+noedns", "+tcp"] {
        let said = dig(&mesh.lab.a, &format!("{words} +short many.service.consul"))?;
        let found = said
            .lines()
            .filter(|line| line.starts_with("192.0.2."))
            .count();
        ensure!(found == instances, "{words:?}: {found} addresses");
    }
    // Several queries at once over one connection.
    let batch = dig(
        &mesh.lab.a,
        "+tcp +keepopen +short many.service.consul A many.service.consul AAAA many.virtual.consul A",
    )?;
    ensure!(batch.lines().count() > instances, "{batch}");
    Ok(Finding::new(
        true,
        format!("{instances} addresses: {sizes:?} bytes over UDP, all over TCP"),
    ))
}

/// The size that dig names.
fn size(said: &str) -> Result<usize> {
    let word = said
        .lines()
        .find_map(|line| line.split("MSG SIZE  rcvd: ").nth(1));
    match word.map(|word| word.trim().parse()) {
        Some(size) => Ok(size?),
        None => anyhow::bail!("no size in {said}"),
    }
}

/// Asks SERVER 1,000 times as fast as it goes; says how many answers came, and within how many seconds.
const FLOOD: &str = "import socket,struct,sys,time\n\
    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.connect((sys.argv[1],53)); s.settimeout(1)\n\
    q=struct.pack('>6H',7,0,1,0,0,0)+b'\\x03web\\x07virtual\\x06consul\\0'+struct.pack('>2H',1,1)\n\
    begun=time.monotonic()\n\
    for _ in range(1000): s.send(q)\n\
    n=0\n\
    try:\n\
    \twhile True: s.recv(512); n+=1\n\
    except TimeoutError: pass\n\
    print(n, time.monotonic()-begun-1)\n";

pub(super) fn nobody_else_gets_an_answer(_size: Size) -> Result<Finding> {
    let limit = 50_usize;
    let mut mesh = Mesh::new("names-gate")?;
    let address = mesh.lab.a.address();
    mesh.register("web", "web-1", vip(1, 80), local(8080));
    dns(
        &mut mesh.lab.a,
        &format!(
            "listen = [\"127.0.0.1:53\", \"{address}:53\"]\nupstreams = []\nqueries_per_second = {limit}"
        ),
    );
    mesh.lab.a.set_capture("dns = true");
    mesh.start()?;
    // Where captured queries are taken is no listener for anybody: neither for another node nor for who was not
    // captured.
    let (far, near) = (&mesh.lab.b, &mesh.lab.a);
    let (address, loopback) = (address.to_string(), "127.0.0.1");
    for (node, server, port) in [
        (far, address.as_str(), 53),
        (far, &address, CAPTURE_PORT),
        (near, &address, CAPTURE_PORT),
        (near, loopback, CAPTURE_PORT),
    ] {
        for transport in ["+notcp", "+tcp"] {
            let said = node
                .tool("dig")?
                .arg(format!("@{server}"))
                .args(["-p", &port.to_string(), "+tries=1", "+timeout=1", "+short"])
                .args([transport, "web.virtual.consul"])
                .output(SOON)?;
            // 9: no reply from server.
            ensure!(
                said.code() == Some(9),
                "{} asks {server}:{port} by {transport}: {said:?}",
                node.name()
            );
        }
    }
    // As fast as it goes, from an address that may ask, and captured.
    let listener = near.tool("python3")?.args(["-c", FLOOD, LISTENER]);
    let captured = mesh.shop.program("python3");
    let captured = captured.args(["-c", FLOOD, super::NOWHERE]);
    let mut holds = true;
    let mut answered = vec![];
    for flood in [listener, captured] {
        let limited = || near.metric("sidestep_dns_queries_total", &["outcome=\"rate_limited\""]);
        let before = limited()?;
        let said = flood.run(SOON)?;
        let mut numbers = said.split_whitespace().map(str::parse::<f64>);
        let (Some(Ok(answers)), Some(Ok(seconds))) = (numbers.next(), numbers.next()) else {
            anyhow::bail!("{said:?}");
        };
        // A second's worth at once, and its rate from then on.
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let most = limit as f64 * (seconds + 1.0) + 1.0;
        holds &= answers >= 1.0 && answers <= most && limited()? > before;
        answered.push(format!("{answers} within {seconds:.3} s"));
    }
    Ok(Finding::new(
        holds,
        format!(
            "of 1000 queries to the listener and of 1000 captured {answered:?} were answered, at a limit of {limit} per \
             second; none to another node, and none where captured queries are taken"
        ),
    ))
}
