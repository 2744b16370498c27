#!/usr/bin/env bash
# Start-up script of the TPU VMs (runs as root at every boot, from the instance's metadata, which
# anyone on the machine can read: no secrets here). It only clears the way; what the job needs is
# installed by scripts/worker_setup.sh once the source has arrived.
set -uo pipefail

# Unattended upgrades hold the package lock and can restart the machine under a running job.
systemctl disable --now unattended-upgrades apt-daily.timer apt-daily-upgrade.timer || true

# Storage reads that hang are given up after a minute below 1 kB/s.
for line in TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024; do
  grep -qxF "$line" /etc/environment || printf '%s\n' "$line" >>/etc/environment
done

# A lock file left by a job that died with the machine keeps libtpu from starting.
rm -f /tmp/libtpu_lockfile

# Transparent huge pages make large host buffers (batches, checkpoints) faster on v5 and later.
if [ -w /sys/kernel/mm/transparent_hugepage/enabled ]; then
  printf always >/sys/kernel/mm/transparent_hugepage/enabled || true
fi
exit 0
