#!/usr/bin/env bash
# Measure everything that needs a GPU, in minutes, on a bare machine with torch and no network:
#
#   benchmarks/gpu_drill.sh WHEELS DATA OUT [STAGE…]
#
# WHEELS  folder of wheels that are missing there (see docs/performance.md); - for none
# DATA    folder with cifar10-train.tar.xz and cifar10-test.tar.xz (CLASS/NNNN.jpg); - for none
# OUT     folder for drill.json (all figures, written after every stage) and drill.log
# STAGE…  of `python -m benchmarks.gpu --help`, in this order; by default all
#
# A stage has its own time limit, so that one that hangs or fails costs itself only. PYTHON names
# the interpreter, DRILL_FLAGS goes to every stage (`--tiny` tries the whole thing on a CPU).
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 3 ]; then
    echo "usage: benchmarks/gpu_drill.sh WHEELS DATA OUT [STAGE…]" >&2
    exit 2
fi
wheels=$1 data=$2 out=$3
shift 3
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(probe tests flat irp scoring resnet50 deepspeed shards)
python=${PYTHON:-python3}
read -r -a flags <<<"${DRILL_FLAGS:-}"

declare -A limit=(
    [probe]=40 [tests]=110 [flat]=50 [irp]=120 [scoring]=75 [resnet50]=130 [deepspeed]=80 [shards]=80
)

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/drill.log
: >"$log"
note() { echo "[${SECONDS}s] $*" | tee -a "$log"; }

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [ "$wheels" != - ]; then
    if ! "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --target "$work/site" "$wheels"/*.whl >>"$log" 2>&1; then
        note "the wheels of $wheels could not be installed:"
        tail -n 5 "$log"
        exit 1
    fi
    PYTHONPATH=$PWD:$work/site
    note "wheels installed"
fi
if [ "$data" != - ]; then
    for part in train test; do
        mkdir -p "$work/cifar10/$part"
        tar xJf "$data/cifar10-$part.tar.xz" -C "$work/cifar10/$part" || exit 1
    done
    flags+=(--data "$work/cifar10")
    note "CIFAR-10 unpacked"
fi

for stage in "${stages[@]}"; do
    begun=$SECONDS
    timeout --kill-after=5 "${limit[$stage]:-60}" \
        "$python" -m benchmarks.gpu "$stage" --json "$work/$stage.json" "${flags[@]}" \
        >"$work/$stage.log" 2>&1
    ended=$?
    { echo "=== $stage"; cat "$work/$stage.log"; } >>"$log"
    case $ended in
        0) note "$stage: done in $((SECONDS - begun)) s" ;;
        124 | 137) note "$stage: cut after $((SECONDS - begun)) s" ;;
        *) note "$stage: failed ($ended) after $((SECONDS - begun)) s" && tail -n 4 "$work/$stage.log" ;;
    esac
    written=("$work"/*.json)
    [ ! -e "${written[0]}" ] ||
        "$python" -m benchmarks.gpu.table "${written[@]}" --json "$out/drill.json" --quiet
done

[ ! -e "$out/drill.json" ] || "$python" -m benchmarks.gpu.table "$out/drill.json"
