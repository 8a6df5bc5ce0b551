# Runs as proof.service, which is captured like everything in system.slice. Each check is a line of the report:
# "ok  WHAT" or "FAIL WHAT: WHY". Waits for states, each with a limit; emulation is slow.
trap 'systemctl reboot --force --force' EXIT
export LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
VIP=240.0.0.5
SAID=/proof/said

# check WHAT COMMAND...: the command must succeed.
check() {
    what=$1
    shift
    if "$@" >$SAID 2>&1; then
        echo "ok   $what"
    else
        echo "FAIL $what: $* ended with $?: $(tail -n 4 $SAID | tr '\n' '|')"
        journalctl -u sidestep -n 15 --no-pager -o cat | sed 's/^/       | /'
    fi
}
fails() { ! "$@"; }
# within SECONDS COMMAND...: it succeeds at some time before.
within() {
    end=$(($(date +%s) + $1))
    shift
    until "$@" >$SAID 2>&1; do
        [ "$(date +%s)" -lt $end ] || return 1
        sleep 0.2
    done
}
show() { systemctl show --value --property "$1" sidestep; }
is() { [ "$(show "$1")" = "$2" ]; }
is_not() { ! is "$@"; }
active() { systemctl is-active sidestep; }
inactive() { fails systemctl is-active sidestep; }
call() { curl --silent --show-error --max-time "${1:-20}" http://$VIP/; }
# What curl says of the connection that it could not make.
refused() { curl --silent --verbose --max-time 20 http://$VIP/ 2>&1 | grep 'Connection refused'; }
unreachable() { curl --silent --verbose --max-time 20 http://$VIP/ 2>&1 | grep 'Network is unreachable'; }
gone() { ! [ -e "$1" ]; }
nobody_calls() { systemd-run --quiet --wait --collect curl --silent --max-time 20 http://$VIP/; }

# Calls, a connection each, until /proof/calling is gone.
call_on() {
    while [ -e /proof/calling ]; do
        if call 30; then echo ok; else echo failed; fi
    done >/proof/calls 2>&1
}
calling() {
    touch /proof/calling
    call_on &
    caller=$!
    within 60 calls 3
}
calls() { [ "$(grep -c '^ok' /proof/calls)" -ge "$1" ]; }
stop_calling() {
    rm /proof/calling
    wait $caller
}
none_failed() { calls 3 && ! grep -v -e '^ok' -e '^served' /proof/calls; }

configure() {
    cd /etc/sidestep
    sidestep ca init --trust-domain example.test --directory /proof/ca >&2 || return
    sidestep ca intermediate --trust-domain example.test --directory /proof/ca --node a >&2 || return
    cp /proof/ca/a.pem /proof/ca/a-key.pem /proof/ca/root.pem .
    cat >sidestep.toml <<'END'
[node]
name = "a"
address = "192.0.2.1"
[capture]
cgroups = ["/system.slice"]
# An emulated machine takes its time to start another agent.
hung_after = "20s"
[identity]
trust_domain = "example.test"
[identity.ca]
certificate = "/etc/sidestep/a.pem"
key = "/etc/sidestep/a-key.pem"
roots = ["/etc/sidestep/root.pem"]
[[workload]]
service = "client"
unit = "proof.service"
[[workload]]
service = "blue"
netns = "/run/netns/blue"
END
    cat >catalog/web.yaml <<'END'
service:
  name: web
  port: 8080
  tagged_addresses: { virtual: { address: 240.0.0.5, port: 80 } }
---
Kind: service-intentions
Name: web
Sources:
  - { Name: client, Action: allow }
  - { Name: blue, Action: allow }
END
    sidestep validate
}

ip address add 192.0.2.1/32 dev lo
echo "note $(systemctl --version | head -n 1), $(grep -c . /proc/self/cgroup) cgroup hierarchy: $(stat -fc %T /sys/fs/cgroup)"

check "the package installs" dpkg -i /proof/1.deb
check "unconfigured it is not started" inactive
check "and enabled" systemctl is-enabled sidestep
check "a configuration is accepted" configure
check "systemctl start" systemctl start sidestep
check "sidestep check finds nothing wrong" sidestep check
echo "note $(systemd-analyze security sidestep --no-pager | tail -n 1 | tr -d '→🙂😀')"
check "a unit of system.slice calls a service" call
check "a unit without a rule does not" fails nobody_calls
check "there are sockets in the descriptor store" is_not NFileDescriptorStore 0

# Made while the agent runs: the mount has to come into its view.
ip netns add blue
ip -n blue link set lo up
check "a network namespace in /run/netns calls it" within 60 ip netns exec blue curl --silent --show-error --max-time 10 http://$VIP/

calling
if is Type notify-reload; then
    check "systemctl reload" systemctl reload sidestep
else
    check "reload by signal" systemctl kill --signal HUP --kill-whom main sidestep
fi
check "calls go on" within 60 calls 6
stop_calling
check "no call failed at the reload" none_failed

main=$(show MainPID)
kill -KILL "$main"
within 20 is_not MainPID "$main"
check "a call waits while a killed agent is away" call 90
check "systemd has started another" is NRestarts 1
check "it took over from the store" sh -c "! journalctl -u sidestep | grep 'not taken over'"
check "calls in the namespace too" within 60 ip netns exec blue curl --silent --show-error --max-time 10 http://$VIP/

main=$(show MainPID)
kill -STOP "$main"
check "a call waits while a hung agent is replaced" call 120
check "the watchdog has replaced it" is NRestarts 2

curl --silent --show-error --no-buffer --max-time 120 http://$VIP/cgi-bin/slow >/proof/slow 2>&1 &
slow=$!
calling
main=$(show MainPID)
check "an upgrade installs" dpkg -i /proof/2.deb
check "another process is the main process" is_not MainPID "$main"
check "the service is active" active
check "systemd has not restarted it" is NRestarts 2
more=$(($(grep -c '^ok' /proof/calls) + 3))
check "calls go on" within 60 calls $more
stop_calling
check "no call failed at the upgrade ($(grep -c '^ok' /proof/calls) calls)" none_failed
wait $slow
check "a connection older than the upgrade ends well" grep -x 25 /proof/slow
check "the agent before ends" within 60 gone "/proc/$main"
check "the agent runs the new file" cmp /usr/bin/sidestep "/proc/$(show MainPID)/exe"

main=$(show MainPID)
kill -KILL "$main"
within 20 is_not MainPID "$main"
check "a call waits while the upgraded agent is away" call 90

# systemd has to see the end of a process that it did not start.
curl --silent --no-buffer --max-time 120 http://$VIP/cgi-bin/slow >/proof/slow 2>&1 &
slow=$!
within 60 grep -q 1 /proof/slow
before=$(show MainPID)
check "sidestep upgrade" sidestep upgrade
main=$(show MainPID)
check "the agent before still drains" [ -e "/proc/$before" ]
start=$(date +%s)
kill -KILL "$main"
check "a call waits while an upgraded agent is away and the one before drains" call 90
# systemd ends the one before with it, in place of waiting for that.
echo "note it waited for $(($(date +%s) - start)) s"
wait $slow

check "systemctl restart" systemctl restart sidestep
check "a call is served again" within 30 call
check "systemctl stop" systemctl stop sidestep
check "a call is refused while the agent is stopped" refused
check "an upgrade leaves it stopped" dpkg -i /proof/1.deb
check "so it is" inactive
check "systemctl start" systemctl start sidestep
check "a call is served again" call

check "the package is removed" dpkg -r sidestep
check "no process is left" fails pgrep -x sidestep
check "nothing is pinned" gone /sys/fs/bpf/sidestep/links
check "a call is not captured any more: the address leads nowhere" unreachable
check "its state is kept" [ -d /var/lib/sidestep ]
check "the package is purged" dpkg -P sidestep
check "its state is gone" gone /var/lib/sidestep
check "the configuration is the administrator's" [ -e /etc/sidestep/sidestep.toml ]
echo done
