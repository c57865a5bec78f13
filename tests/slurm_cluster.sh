#!/usr/bin/env bash
# A Slurm cluster of the two hosts of two_hosts.sh, beside which it runs: tests/slurm_cluster.sh FOLDER
#
# FOLDER gets the cluster's files; "up" is there once it takes jobs. GPUS=1 gives each node two that are none. Its commands
# want SLURM_CONF=FOLDER/slurm.conf.
set -eu
folder="$(realpath "$1")"
mkdir -p "$folder"/{state,log,spool/n1,spool/n2,munge}
head -c 128 /dev/urandom >"$folder/munge/key"
chmod 700 "$folder/munge" && chmod 400 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --socket=/run/munge.socket --pid-file=/run/munged.pid \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed"

[ -z "${GPUS:-}" ] || echo "NodeName=n[1-2] Name=gpu File=/dev/tty[0-1]" >"$folder/gres.conf"
cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=controller(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=30
OverTimeLimit=0
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${GPUS:+GresTypes=gpu}
NodeName=n1 NodeAddr=10.77.0.1 CPUs=2 RealMemory=1000 ${GPUS:+Gres=gpu:2} State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.2 CPUs=2 RealMemory=1000 ${GPUS:+Gres=gpu:2} State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
END
export SLURM_CONF="$folder/slurm.conf"
slurmctld -D &
for node in n1 n2; do
    nsenter --net="/run/netns/$node" unshare --uts sh -c "hostname $node; exec slurmd -D -N $node" &
done
until [ "$(sinfo --noheader --nodes=n1,n2 --partition=main --states=idle --format=%D 2>/dev/null)" = 2 ]; do sleep 0.2; done
touch "$folder/up"
wait
