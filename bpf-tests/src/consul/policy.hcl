# Certificates, registrations and intentions of every service that may run on the node.
service_prefix "" {
  policy     = "write"
  intentions = "read"
}

# Addresses of the nodes.
node_prefix "" {
  policy = "read"
}

# What Consul's agent says of itself: name, datacenter.
agent_prefix "" {
  policy = "read"
}
