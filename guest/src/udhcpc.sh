#!/bin/sh
# What busybox's udhcpc does by a lease: the interface's address, the way out, and whom to ask for names. The event is the argument;
# what the server says comes in variables, of which those may be missing that it does not tell.

case "$1" in
deconfig)
    ip link set dev "$interface" up
    ip -4 addr flush dev "$interface"
    ;;
bound | renew)
    ip addr replace "$ip/${mask:-24}" ${broadcast:+broadcast "$broadcast"} dev "$interface"
    [ -z "$mtu" ] || ip link set dev "$interface" mtu "$mtu"
    # Several routers are alternatives, the best first.
    [ -z "$router" ] || ip route replace default via "${router%% *}" dev "$interface"
    # A switch's lease has none, and leaves those of the user network.
    if [ -n "$dns" ]; then
        names=${search:-$domain}
        {
            [ -z "$names" ] || echo "search $names"
            for server in $dns; do echo "nameserver $server"; done
        } >/etc/resolv.conf
    fi
    ;;
esac
