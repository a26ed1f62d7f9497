#!/bin/sh
# First process of the guest: runs the tests named in /tests (one a line, with arguments) and switches off.
# What it says about them is read by kernels.rs from the console.
export PATH=/bin:/sbin RUST_BACKTRACE=0
# The shell prefers its own, which knows no network namespaces.
ip() {
    /sbin/ip "$@"
}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /run/netns
for module in /modules/*; do
    [ -e "$module" ] && insmod "$module"
done
ip link set lo up

while read -r test arguments; do
    # Without quotes: words.
    "/tests.d/$test" --test-threads=1 --nocapture $arguments </dev/null
    echo "guest: $test ended with $?"
done </tests

# The agent as it is deployed, on the sample objects, without a cluster. One device leads to the outside; one namespace has
# the addresses of all pods, and one is a client out there.
lb_agent() {
    ip link add up0 type veth peer name eth0 netns client && ip link add pods0 type veth peer name eth0 netns pods
    ip addr add 172.18.0.11/24 dev up0 && ip addr add 10.244.0.1/32 dev pods0
    ip link set up0 up && ip link set pods0 up
    echo 1 >/proc/sys/net/ipv4/ip_forward
    for ns in client pods; do ip -n $ns link set lo up && ip -n $ns link set eth0 up; done
    ip -n client addr add 172.18.0.99/24 dev eth0 && ip -n client route add default via 172.18.0.11
    for pod in 10.244.1.10 10.244.1.11 10.244.2.10 10.244.2.11; do
        ip -n pods addr add $pod/32 dev eth0 && ip route add $pod dev pods0
    done
    ip -n pods route add 10.244.0.1 dev eth0 && ip -n pods route add default via 10.244.0.1
    echo echo >/tmp/index.html
    ip netns exec pods httpd -p 8080 -h /tmp
    lb-agent run --source manifests:/manifests --hostname-override node1 --xdp off \
        --healthz-bind-address 127.0.0.1:10256 >/tmp/agent.log 2>&1 &
    agent=$!
    tries=0
    until wget -q -O /dev/null http://127.0.0.1:10256/readyz; do
        tries=$((tries + 1))
        [ $tries -lt 60 ] && kill -0 $agent || return
        sleep 1
    done
    # From the outside by ClusterIP and NodePort (tc), and from the node itself (connect hook): each backend a few times.
    for i in 1 2 3 4 5 6 7 8; do
        for at in 10.96.0.80:80 172.18.0.11:30080; do
            ip netns exec client timeout 20 wget -q -O /dev/null http://$at/ || return
        done
        timeout 20 wget -q -O /dev/null http://10.96.0.80/ || return
    done
}
ip netns add client && ip netns add pods && lb_agent
echo "guest: agent ended with $?"
[ -e /tmp/agent.log ] && cat /tmp/agent.log

echo "guest: done"
poweroff -f
