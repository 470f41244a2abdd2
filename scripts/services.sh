#!/bin/sh
# Installs the programs that tests of discovery and of metrics start. Fails if one of them is missing afterwards.
set -eu

missing() {
    for each in redis-server:redis-server redis-cli:redis-tools etcd:etcd-server etcdctl:etcd-client \
        dnsmasq:dnsmasq-base prometheus:prometheus; do
        command -v "${each%%:*}" >/dev/null || printf ' %s' "${each##*:}"
    done
}

packages=$(missing)
if [ -n "$packages" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$packages"
    # A package starts its daemon if this allows it. Tests need none, and a file of the administrator is left alone.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    apt-get update -qq || true
    for package in $packages; do # one by one: a release that lacks one has the others
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$package" >/dev/null ||
            echo "$package could not be installed" >&2
    done
fi

packages=$(missing)
if [ -n "$packages" ]; then
    echo "missing:$packages (as root: apt-get install$packages)" >&2
    exit 1
fi
