//! `sidestep connections`

use std::process::ExitCode;

use super::{
    output,
    status::{StatusArgs, ask},
};
use crate::admin::status::ConnectionStatus;

/// Shows the live connections, oldest first.
pub(super) fn connections(args: &StatusArgs) -> ExitCode {
    match ask::<Vec<ConnectionStatus>>(args, "/connections") {
        Ok(connections) if args.json => output::print_json(&connections),
        Ok(connections) => output::print(&render(&connections)),
        Err(code) => code,
    }
}

fn render(connections: &[ConnectionStatus]) -> String {
    let heading = [
        "ID",
        "DIRECTION",
        "SOURCE",
        "DESTINATION",
        "INSTANCE",
        "SENT",
        "RECEIVED",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(connections.iter().map(|connection| {
        let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        vec![
            connection.id.to_string(),
            connection.direction.clone(),
            known(&connection.source),
            known(&connection.destination),
            known(&connection.instance),
            connection.bytes_sent.to_string(),
            connection.bytes_received.to_string(),
        ]
    }));
    output::table(&rows)
}
