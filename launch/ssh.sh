#!/usr/bin/env bash
# One run on several hosts that can be reached by ssh, without a scheduler:
#
#     launch/ssh.sh HOST1 HOST2 ... -- pretrain.py --config configs/pretrain/folder.yaml data.root=/data run=runs/photos
#
# HOST1 holds the rendezvous. Every host needs the same checkout and the data; the run's folder is on the host whose name
# sorts first, where torchrun puts rank 0, or on storage that all of them share.
# Ctrl-C (or SIGTERM) saves on all hosts and ends the run; a second one gives up at once. When a host fails, the others
# save what they can and end. The same command continues. When this script dies, or loses its connection, its hosts end
# too: run it in tmux.
#
# From the environment:
#     FOLDER    the checkout on every host (this one's path)
#     PYTHON    of every host, from FOLDER (.venv/bin/python)
#     RANKS     per host (gpu: one per GPU)
#     RESTARTS  of all ranks after one has died, from the last checkpoint (3)
#     PORT      on HOST1 (29500)
# Hosts must find each other by the names given here.
# OMP_NUM_THREADS and variables that begin with NCCL_ or GLOO_ are passed on.
set -euo pipefail

usage() {
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

hosts=()
while (($#)) && [[ $1 != -- ]]; do
    hosts+=("$1")
    shift
done
((${#hosts[@]} && $# > 1)) || usage
shift

FOLDER=${FOLDER:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
PYTHON=${PYTHON:-.venv/bin/python}
RANKS=${RANKS:-gpu}
RESTARTS=${RESTARTS:-3}
PORT=${PORT:-29500}

# What a host runs, for bash there to read. Its standard input stays open for as long as this script lives, and when it
# ends, so does torchrun: ssh itself takes nothing with it.
remote_script() {
    local name
    for name in OMP_NUM_THREADS ${!NCCL_@} ${!GLOO_@}; do
        if [[ -n ${!name:-} ]]; then
            printf 'export %s=%q\n' "$name" "${!name}"
        fi
    done
    # Ranks of a second attempt find the addresses of the first in a store that torchrun keeps: see docs/launching.md.
    printf 'export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n'
    printf 'cd %q || exit 1\n' "$FOLDER"
    printf 'command=('
    printf '%q ' "$PYTHON" -m torch.distributed.run "$@"
    printf ')\n'
    # In braces, so that bash has read all of it before it runs any.
    cat <<'END'
{
    "${command[@]}" </dev/null &
    agent=$!
    exec 4<&0
    { while read -r _; do :; done; kill -TERM "$agent" 2>/dev/null; } <&4 >/dev/null 2>&1 &
    lifeline=$!
    wait "$agent"
    code=$?
    kill "$lifeline" 2>/dev/null
    exit "$code"
}
END
}

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
mkfifo "$room/lifeline"
exec 3<>"$room/lifeline"

id=$(basename "$room")
started=()
signalled=0

let_go() {
    exec 3>&-
}

# shellcheck disable=SC2329 # by trap
on_signal() {
    if ((signalled)); then
        kill -KILL "${started[@]}" 2>/dev/null
        exit "$signalled"
    fi
    signalled=$1
    echo "ssh.sh: saving on ${hosts[*]}; once more to give up at once" >&2
    let_go
}
trap 'on_signal 130' INT
trap 'on_signal 143' TERM HUP

for number in "${!hosts[@]}"; do
    # Whether a host holds the rendezvous is said, because torchrun guesses it from names, of which a host has many.
    remote_script --nnodes="${#hosts[@]}" --nproc-per-node="$RANKS" --max-restarts="$RESTARTS" --rdzv-backend=c10d \
        --rdzv-id="$id" --rdzv-endpoint="${hosts[0]#*@}:$PORT" --rdzv-conf="is_host=$((number == 0))" \
        --local-addr="${hosts[number]#*@}" "$@" >"$room/$number"
    # In the background bash has its children ignore SIGINT, so Ctrl-C reaches this script alone.
    ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "${hosts[number]}" bash -s \
        < <(exec 3>&-; cat "$room/$number" "$room/lifeline") 3>&- &
    started+=("$!")
done

# The first failure counts: those after it are the others' being ended.
code=0
while ((${#started[@]})); do
    sleep 0.3 || true # which Ctrl-C cuts short
    for number in "${!started[@]}"; do
        kill -0 "${started[number]}" 2>/dev/null && continue
        ended=0
        wait "${started[number]}" || ended=$?
        unset "started[number]"
        if ((ended && !code)); then
            code=$ended
            ((signalled)) || echo "ssh.sh: ${hosts[number]} ended with $ended; ending the others" >&2
            let_go
        fi
    done
done
exit "$((signalled ? signalled : code))"
