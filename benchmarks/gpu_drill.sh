#!/usr/bin/env bash
# Measure what needs a GPU, in minutes, on a bare machine with torch and no network:
#
#   benchmarks/gpu_drill.sh WHEELS DATA OUT [STAGE…]
#
# WHEELS  folder of wheels that are missing there (see docs/performance.md); - for none
# DATA    folder with cifar10-train.tar.xz and cifar10-test.tar.xz (CLASS/NNNN.jpg); - for none
# OUT     folder for drill.json (all figures, written after every stage) and drill.log
# STAGE…  of `python -m benchmarks.gpu --help`, in this order; by default all. Two more: `paper` is
#         benchmarks/paper_cifar10.py for PAPER_MINUTES (4), its rows go to OUT/paper.json;
#         `topologies` is configs/compare/moving_topologies_gpu.yaml in 14 processes for
#         TOPOLOGY_MINUTES (4), its rows go to OUT/topologies.json
#
# A stage has its own time limit, so that one that hangs or fails costs itself only. In the
# environment: PYTHON, the interpreter; DRILL_FLAGS, given to every stage (`--tiny` tries the whole
# thing on a CPU); DRILL_WORK, a folder that is kept, with what was installed, unpacked and
# trained, so that the next call goes on from there.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 3 ]; then
    echo "usage: benchmarks/gpu_drill.sh WHEELS DATA OUT [STAGE…]" >&2
    exit 2
fi
wheels=$1 data=$2 out=$3
shift 3
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(probe tests flat irp scoring resnet50 deepspeed shards two_four)
python=${PYTHON:-python3}
paper_minutes=${PAPER_MINUTES:-4}
topology_minutes=${TOPOLOGY_MINUTES:-4}
read -r -a flags <<<"${DRILL_FLAGS:-}"

declare -A limit=(
    [probe]=50 [tests]=150 [flat]=60 [irp]=150 [scoring]=110 [resnet50]=140 [deepspeed]=90
    [shards]=100 [two_four]=40 [paper]=$((paper_minutes * 60 + 45))
    [topologies]=$((topology_minutes * 60 + 30))
)

mkdir -p "$out"
log=$out/drill.log
: >"$log"
note() { echo "[${SECONDS}s] $*" | tee -a "$log"; }
work=${DRILL_WORK:-$(mktemp -d)}
mkdir -p "$work/figures"
[ -n "${DRILL_WORK:-}" ] || trap 'rm -rf "$work"' EXIT

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [ "$wheels" != - ]; then
    if [ ! -d "$work/site" ] && ! "$python" -m pip install -q --no-index --no-deps --no-compile \
        --no-cache-dir --disable-pip-version-check --target "$work/site" "$wheels"/*.whl \
        >>"$log" 2>&1; then
        note "the wheels of $wheels could not be installed:"
        tail -n 5 "$log"
        rm -rf "$work/site"
        exit 1
    fi
    PYTHONPATH=$PWD:$work/site
    note "wheels installed"
fi
if [ "$data" != - ]; then
    for part in train test; do
        [ ! -d "$work/cifar10/$part" ] || continue
        mkdir -p "$work/unpacked-$part"
        tar xJf "$data/cifar10-$part.tar.xz" -C "$work/unpacked-$part" || exit 1
        mkdir -p "$work/cifar10"
        mv "$work/unpacked-$part" "$work/cifar10/$part"
    done
    flags+=(--data "$work/cifar10")
    note "CIFAR-10 unpacked"
fi

run() {
    if [ "$1" = paper ]; then
        set -- -m benchmarks.paper_cifar10 --out "$work/paper" --minutes "$paper_minutes" \
            --data "$work/cifar10" --json "$out/paper.json"
    elif [ "$1" = topologies ]; then
        set -- -m benchmarks.beside --config configs/compare/moving_topologies_gpu.yaml \
            --out "$work/topologies" --minutes "$topology_minutes" --processes 14 \
            --data "$work/cifar10" --json "$out/topologies.json" --tracking false
    else
        set -- -m benchmarks.gpu "$1" --json "$work/figures/$1.json" "${flags[@]}"
    fi
    timeout --kill-after=5 "${limit[$stage]:-60}" "$python" "$@" >"$work/$stage.log" 2>&1
}

for stage in "${stages[@]}"; do
    begun=$SECONDS
    run "$stage"
    ended=$?
    { echo "=== $stage"; cat "$work/$stage.log"; } >>"$log"
    case $ended in
        0) note "$stage: done in $((SECONDS - begun)) s" ;;
        124 | 137) note "$stage: cut after $((SECONDS - begun)) s" ;;
        *) note "$stage: failed ($ended) after $((SECONDS - begun)) s" ;;
    esac
    case $ended-$stage in
        *-paper | *-topologies | [!0]*) tail -n 6 "$work/$stage.log" ;;
    esac
    written=("$work"/figures/*.json)
    [ ! -e "${written[0]}" ] ||
        "$python" -m benchmarks.gpu.table "${written[@]}" --json "$out/drill.json" --quiet
done

[ ! -e "$out/drill.json" ] || "$python" -m benchmarks.gpu.table "$out/drill.json"
