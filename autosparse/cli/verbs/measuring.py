"""`autosparse measure`: what a ticket or a timm model costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosparse.core.errors import UsageError
from autosparse.core.files import check_file, place, write_json
from autosparse.core.progress import print_table
from autosparse.study.config import MeasureConfig


def print_costs(source: str, config: MeasureConfig) -> None:
    """Print the table of a ticket (dense, pruned, slimmed) or of a timm model; write the JSON."""
    from autosparse.study import measure as measuring

    if config.runs < 1 or not config.batches or min(config.batches) < 1:
        raise UsageError("autosparse measure: runs and batches are at least 1")
    if config.json is not None:
        check_file(config.json)
    models, shape = _networks(source, config)
    figures = measuring.measured(models, shape, config.batches, config.runs)
    title = f"{source}, images of {'x'.join(map(str, shape))}; ± half the quartiles' distance"
    print_table(measuring.table(figures), title=title)
    if not any("onnx_bytes" in row for row in figures["rows"].values()):
        print("ONNX was not measured: pip install 'autosparse[onnx]'")
    if config.json is not None:
        write_json(config.json, {"source": source, "shape": list(shape), **figures})
        print(f"all figures, and those of each layer: {config.json}")
    if config.tracking:
        from autosparse.integrations.measured import log_measured

        print(f"logged to MLflow run {log_measured(source, figures)}")


def _networks(source: str, config: MeasureConfig) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Return the networks by name, the dense one first, and [C, H, W] of their images."""
    import timm
    import torch

    from autosparse.models import zoo
    from autosparse.models.config import ModelConfig
    from autosparse.sparsity.slim import slim
    from autosparse.study import export

    if source.startswith("models:/") or place(source).exists():
        from autosparse.cli.verbs import _local_ticket

        ticket = export.trained_ticket(Path(_local_ticket(source)))
        recipe = ticket.card["model"]
        shape = (recipe["in_chans"], recipe["image_size"], recipe["image_size"])
        pruned = export.dense_model(ticket)
        slimmed = slim(pruned, torch.zeros(2, *shape))
        return {
            "dense": zoo.from_recipe(recipe).eval(), "pruned": pruned, "slimmed": slimmed
        }, shape  # fmt: skip
    if not timm.is_model(source) and (source.endswith(".safetensors") or "/" in source):
        raise UsageError(f"{source} is no file")
    known = timm.get_pretrained_cfg(source, allow_unregistered=True)
    side = config.image_size or (known.input_size[-1] if known is not None else 224)
    model = zoo.create(
        ModelConfig(source), num_classes=config.num_classes, in_chans=3, image_size=side, seed=0
    )
    return {"dense": model.eval()}, (3, side, side)
