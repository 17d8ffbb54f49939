#!/bin/busybox sh
# The whole system of the machine in `bench/watchdog.rs`: loads the watchdog's driver, starts the guard, does to it what the kernel's
# command line says, and tells on the console. Times are seconds since the kernel's start.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /run/mainstay/guard /run/libvirt/qemu /var/lib/mainstay /etc/mainstay
ip link set lo up
# The guard's warnings go through the console, too; the kernel's would only disturb them.
dmesg -n 1
say() { read -r now rest < /proc/uptime; echo "watchdog-test: $now $*"; }
tell_all() { echo "watchdog-test: $(cat /sys/class/watchdog/watchdog0/identity), state $(cat /sys/class/watchdog/watchdog0/state)"; }

for module in /modules/*.ko; do insmod "$module" || say "no $module"; done

# Starts the guard and waits until parent and child are there.
start() {
    mainstay-guard &
    parent=$!
    child=
    while [ -z "$child" ] || ! [ -S /run/mainstay/guard.sock ]; do
        child=$(cat /proc/$parent/task/$parent/children)
        usleep 20000
    done
}

read -r words < /proc/cmdline
case " $words " in
*" test=kill "*)  end() { kill -9 $child $parent; } ;;
*" test=hang "*)  end() { kill -STOP $child $parent; } ;;
*" test=stop "*)  end() { kill -TERM $parent; wait $parent; } ;;
esac
start
say up
tell_all
sleep "$(echo " $words " | sed 's/.* rest=\([0-9]*\) .*/\1/')"
say alive
end
say ended
tell_all
while :; do sleep 1; say waits; done
