//! Hosts with a name server of their own, and what is connected to.

use std::future::Future;

use hickory_proto::{
    op::{Message, MessageType, OpCode},
    rr::{RData, Record, rdata::A},
};
use tokio::net::{TcpListener, UdpSocket as NameSocket};

use super::*;
use crate::{
    catalog::{
        model::{Ports, ServiceDefaults},
        store::CatalogStore,
        vip::VipAllocator,
    },
    dns::forward::{Forwarder, Upstreams},
};

const LIMIT: Duration = Duration::from_secs(10);

#[expect(
    clippy::disallowed_methods,
    reason = "ends with the runtime of its test"
)]
fn in_background(task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(task);
}

/// A name server that tells these addresses for a second, for every name; silent while there are none.
struct NameServer {
    address: SocketAddr,
    told: Arc<Mutex<Option<Vec<Ipv4Addr>>>>,
}

impl NameServer {
    async fn start(addresses: &[&str]) -> Self {
        let socket = NameSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let told = Arc::new(Mutex::new(Some(parse(addresses))));
        let inner = Arc::clone(&told);
        in_background(async move {
            let mut buffer = [0; 1500];
            loop {
                let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
                let Some(addresses) = inner.lock().clone() else {
                    continue;
                };
                let answer = answer(&buffer[..length], &addresses);
                socket.send_to(&answer, client).await.unwrap();
            }
        });
        Self { address, told }
    }

    fn tell(&self, addresses: Option<&[&str]>) {
        *self.told.lock() = addresses.map(parse);
    }
}

fn parse(addresses: &[&str]) -> Vec<Ipv4Addr> {
    addresses.iter().map(|a| a.parse().unwrap()).collect()
}

fn answer(query: &[u8], addresses: &[Ipv4Addr]) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut message = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    let question = query.queries[0].clone();
    message.add_queries(query.queries);
    if question.query_type == hickory_proto::rr::RecordType::A {
        for address in addresses {
            let data = RData::A(A(*address));
            message.add_answer(Record::from_rdata(question.name.clone(), 1, data));
        }
    }
    message.to_vec().unwrap()
}

fn pools() -> VipPools {
    VipPools {
        ipv4: "240.0.0.0/4".parse().unwrap(),
        ipv6: "fd00::/64".parse().unwrap(),
    }
}

fn outside(name: &str, addresses: &[&str], port: u16) -> Service {
    let addresses: Vec<String> = addresses.iter().map(|a| (*a).to_owned()).collect();
    let destination = Destination::read(&addresses, port.into()).unwrap();
    let defaults = ServiceDefaults {
        destination: Some(Arc::new(destination.clone())),
        ..ServiceDefaults::default()
    };
    Service::outside(name.parse().unwrap(), &destination, defaults)
}

fn catalog(services: Vec<Service>) -> Arc<Catalog> {
    let store = CatalogStore::new(VipAllocator::new(pools(), None, Duration::ZERO).0);
    let services = services.into_iter().map(|s| (s.name.clone(), Arc::new(s)));
    let problems = store.publish(Snapshot {
        services: services.collect(),
        ..Snapshot::default()
    });
    assert!(problems.is_empty(), "{problems:?}");
    store.current()
}

fn destinations(server: SocketAddr, ports: &[u16]) -> Destinations {
    let own = Own {
        virtual_ranges: pools(),
        ports: ports.iter().copied().collect(),
    };
    let lookup = Lookup::new(Forwarder::new(Upstreams::Configured(vec![server])));
    Destinations::new(lookup, own, Shutdown::default())
}

async fn endpoints(
    destinations: &Destinations,
    catalog: &Catalog,
    dialled: Option<&str>,
) -> Result<Vec<String>, String> {
    let service = catalog.service(&"api".parse().unwrap()).unwrap();
    let dialled = dialled.map(|address| address.parse().unwrap());
    let found = destinations.endpoints(service, dialled, LIMIT).await?;
    let instances = found.instances.iter();
    Ok(instances.map(|i| i.tunnel.to_string()).collect())
}

/// Waits until the endpoints are these.
async fn wait_for(destinations: &Destinations, expected: &[&str]) -> Arc<Endpoints> {
    let waiting = async {
        loop {
            let all = destinations.all();
            let now = Arc::clone(&all[&"api".parse().unwrap()]);
            let addresses: Vec<String> = now.addresses().iter().map(ToString::to_string).collect();
            if addresses == expected {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, waiting).await.unwrap()
}

#[tokio::test]
async fn a_host_is_followed_and_kept_while_nobody_answers() {
    let server = NameServer::start(&["192.0.2.1", "192.0.2.2", "127.0.0.1", "240.0.0.9"]).await;
    let destinations = destinations(server.address, &[]);
    let catalog = catalog(vec![outside("api", &["api.test"], 443)]);
    destinations.follow(&catalog);
    let first = endpoints(&destinations, &catalog, Some("240.0.0.7")).await;
    assert_eq!(first.unwrap(), ["192.0.2.1:443", "192.0.2.2:443"]);
    let all = destinations.all();
    let problem = all.values().next().unwrap().problem.clone().unwrap();
    for refused in [
        "api.test, the destination of api",
        "127.0.0.1 is refused",
        "240.0.0.9",
    ] {
        assert!(problem.contains(refused), "{problem}");
    }

    server.tell(Some(&["192.0.2.3"]));
    let now = wait_for(&destinations, &["192.0.2.3:443"]).await;
    assert_eq!(now.problem, None);
    // The same destination is not begun anew.
    server.tell(None);
    destinations.follow(&catalog);
    wait_for(&destinations, &["192.0.2.3:443"]).await;
    let is_told = async {
        while destinations.all().values().all(|it| it.problem.is_none()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, is_told).await.unwrap();
    let kept = endpoints(&destinations, &catalog, None).await;
    assert_eq!(kept.unwrap(), ["192.0.2.3:443"]);

    server.tell(Some(&[]));
    wait_for(&destinations, &[]).await;
    let error = endpoints(&destinations, &catalog, None).await.unwrap_err();
    assert!(error.contains("no such host"), "{error}");

    destinations.follow(&Catalog::default());
    let error = endpoints(&destinations, &catalog, None).await.unwrap_err();
    assert_eq!(error, "the destination of api is gone");
}

#[tokio::test]
async fn an_address_that_is_called_is_where_it_goes() {
    let nobody = "127.0.0.1:9".parse().unwrap();
    let destinations = destinations(nobody, &[]);
    let catalog = catalog(vec![outside("api", &["192.0.2.7", "2001:db8::7"], 443)]);
    destinations.follow(&catalog);
    let table = [
        (Some("192.0.2.7"), &["192.0.2.7:443"][..]),
        (Some("::ffff:192.0.2.7"), &["192.0.2.7:443"]),
        (Some("2001:db8::7"), &["[2001:db8::7]:443"]),
        // By an explicit upstream.
        (None, &["192.0.2.7:443", "[2001:db8::7]:443"]),
    ];
    for (dialled, expected) in table {
        let found = endpoints(&destinations, &catalog, dialled).await;
        assert_eq!(found.unwrap(), expected, "{dialled:?}");
    }
}

#[tokio::test]
async fn an_address_of_a_virtual_range_is_no_endpoint() {
    let destinations = destinations("127.0.0.1:9".parse().unwrap(), &[]);
    let service = outside("api", &["192.0.2.7", "fd00::7"], 443);
    let mut catalog = Catalog::default();
    catalog
        .snapshot
        .services
        .insert(service.name.clone(), service.into());
    destinations.follow(&catalog);
    let found = endpoints(&destinations, &catalog, None).await;
    assert_eq!(found.unwrap(), ["192.0.2.7:443"]);
}

#[tokio::test]
async fn nothing_leads_to_the_agent_or_around_the_mesh() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = listener.local_addr().unwrap();
    let nobody = "127.0.0.1:9".parse().unwrap();
    let dial = async |ports: &[u16], catalog: &Catalog, address: SocketAddr| {
        let destinations = destinations(nobody, ports);
        destinations.dial(address, catalog, LIMIT).await
    };
    let empty = Catalog::default();
    let stream = dial(&[], &empty, taken).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), taken);
    let own = dial(&[taken.port()], &empty, taken).await.unwrap_err();
    assert!(matches!(own, DialError::Own(address) if address == taken));

    let in_mesh = Service {
        explicit_addresses: ["10.96.0.5".parse().unwrap()].into(),
        ports: Ports::Listed([443].into()),
        defaults: ServiceDefaults::default(),
        ..outside("db", &["192.0.2.7"], 443)
    };
    let catalog = catalog(vec![in_mesh]);
    let address = "10.96.0.5:443".parse().unwrap();
    let error = dial(&[], &catalog, address).await.unwrap_err();
    assert!(error.to_string().contains("an address of db"), "{error}");

    // Nor to an instance, where connections to these are captured.
    let service = catalog.service(&"db".parse().unwrap()).unwrap();
    let endpoints = with_endpoints(service, 5432, &["192.0.2.9".parse().unwrap()].into());
    let mut instance = (*endpoints.instances[0]).clone();
    instance.tunnel.set_port(15_443);
    let in_mesh = Service {
        instances: vec![instance.into()],
        ..(**service).clone()
    };
    let allocator = VipAllocator::new(pools(), None, Duration::ZERO).0;
    let store = CatalogStore::new(allocator).with_instances(pools());
    store.publish(Snapshot {
        services: [(in_mesh.name.clone(), in_mesh.into())].into(),
        ..Snapshot::default()
    });
    let address = "192.0.2.9:5432".parse().unwrap();
    let error = dial(&[], &store.current(), address).await.unwrap_err();
    assert!(error.to_string().contains("an address of db"), "{error}");
}

#[tokio::test]
async fn what_is_gone_is_forgotten() {
    let server = NameServer::start(&["192.0.2.1"]).await;
    let destinations = destinations(server.address, &[]);
    let catalog = catalog(vec![outside("api", &["api.test"], 443)]);
    destinations.follow(&catalog);
    endpoints(&destinations, &catalog, None).await.unwrap();
    let service = Arc::clone(&destinations.all()[&"api".parse().unwrap()].service);
    drop(destinations.balancer.choose(&service, &[]).unwrap());
    assert_eq!(destinations.balancer.remembered(), 1);
    server.tell(Some(&["192.0.2.2"]));
    wait_for(&destinations, &["192.0.2.2:443"]).await;
    let forgotten = async {
        while destinations.balancer.remembered() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, forgotten).await.unwrap();
}
