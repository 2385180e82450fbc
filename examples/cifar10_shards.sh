#!/usr/bin/env bash
# CIFAR-10 from a folder of JPEGs to a sparse model that plain timm loads: packed into shards, pruned at 95 %,
# trained on two ranks, killed in the middle, resumed, exported, evaluated. Two to ten minutes on two cores.
#
#     examples/cifar10_shards.sh [OUT]        # data/cifar10 holds train/CLASS/*.jpg and test/CLASS/*.jpg
set -euo pipefail
out=${1:-cifar10_example}
data=${DATA:-data/cifar10}
epochs=${EPOCHS:-3}
if [ ! -e /dev/nvidia0 ]; then export DS_ACCELERATOR=cpu; fi

step() { printf '\n== %s\n' "$*"; }

step "pack into shards (finished shards are found and kept)"
autosparse shards pack "$data" "$out/shards"
autosparse shards verify "$out/shards"

train() {
    deepspeed --num_accelerators 2 --log_level error launch/train_sparse.py \
        --prune.model.name test_resnet --prune.criterion snip --prune.sparsity 0.95 \
        --prune.data.name shards --prune.data.root "$out/shards" --prune.data.image_size 32 \
        --training.epochs "$epochs" --training.batch_size 128 --training.learning_rate 0.003 \
        --training.checkpoint_epochs 1 --training.checkpoint_steps 50 \
        --tracking false --out "$out/trained"
}

step "train on two ranks, and kill everything once two checkpoints are there"
setsid bash -c "$(declare -f train); out='$out' epochs='$epochs' train" &
job=$!
until [ "$(find "$out/trained" -name checkpoint.json 2>/dev/null | wc -l)" -ge 2 ]; do
    kill -0 "$job" 2>/dev/null || { wait "$job"; break; }
    sleep 1
done
kill -KILL -- "-$job" 2>/dev/null && echo "killed after $(find "$out/trained" -name checkpoint.json | tail -1)"
wait "$job" 2>/dev/null || true

step "the same command goes on"
train

step "export, and evaluate with nothing but timm"
autosparse export --ticket "$(dirname "$out"/trained/*/result.json)" --out "$out/model.safetensors"
python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

import timm, torch
from safetensors.torch import load_file

from autosparse.data import sets
from autosparse.data.config import DataConfig

out = Path(sys.argv[1])
source = sets.load(DataConfig(name="shards", root=str(out / "shards"), image_size=32))
model = timm.create_model("test_resnet", num_classes=10)
model.load_state_dict(load_file(out / "model.safetensors"))
model.eval()
with torch.no_grad():
    right = sum(int((model(source.prepare(images)).argmax(1) == labels).sum())
                for images, labels in source.test.once(256))
result = json.loads(next(out.glob("trained/*/result.json")).read_text())
zeros = sum(int((weight == 0).sum()) for weight in model.state_dict().values())
print(f"test accuracy of the exported model: {right / len(source.test):.4f}; "
      f"when it was trained: {result['test_accuracy']:.4f}; {zeros:,} zeros")
PYTHON
