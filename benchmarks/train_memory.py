"""Memory that a training step keeps for its backward pass: Mixer-B/16, batch 32, bfloat16 autocast; ours and timm's.

    python benchmarks/train_memory.py            # two minutes

Measured with torch's saved-tensor hooks: the storages of all tensors that autograd keeps from the forward pass, each
counted once, without the parameters. Ours is compiled, as in long runs, and eager; with recomputation, `--recompute` is
compared with timm's set_grad_checkpointing.
"""

import argparse
from collections.abc import Callable

import torch
from common import machine, print_table, write_results
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import allmlp
from allmlp.training.compilation import compile_model
from allmlp.training.losses import softmax
from allmlp.training.memory import recompute_blocks

CPU = torch.device("cpu")


def kept_bytes(forward: Callable[[Tensor], Tensor], model: nn.Module, batch: int) -> int:
    """By autograd, from one forward pass and its loss."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, labels = torch.zeros(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(images)
        loss = softmax(logits.float(), labels).mean()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def ours(recompute: bool, compile_it: bool, batch: int) -> int:
    model = allmlp.create("B/16", num_classes=1000, seed=0)
    if recompute:
        recompute_blocks(model)
    mode = "on" if compile_it else "off"
    forward, _ = compile_model(model, mode, batch_size=batch, training_flop=1.0, device=CPU, precision=torch.bfloat16)
    keys = torch.zeros(batch, dtype=torch.long)
    return kept_bytes(lambda images: forward(images, keys), model.train(), batch)


def timms(recompute: bool, compile_it: bool, batch: int) -> int:
    model = MlpMixer(num_classes=1000, img_size=224, patch_size=16, num_blocks=12, embed_dim=768, mlp_ratio=(0.5, 4.0))
    model.set_grad_checkpointing(recompute)
    return kept_bytes(torch.compile(model) if compile_it else model, model.train(), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    batch = parser.parse_args().batch
    results, rows = {}, []
    for recompute in (False, True):
        reference = timms(recompute, False, batch)
        for name, measure, compile_it in (
            ("ours, compiled", ours, True),
            ("ours, eager", ours, False),
            ("timm, compiled", timms, True),
            ("timm, eager", timms, False),
        ):
            kept = measure(recompute, compile_it, batch)
            word = "on" if recompute else "off"
            results[f"{name}, recomputation {word}"] = kept
            rows.append([word, name, f"{kept / 2**20:,.0f} MiB", f"{kept / reference:.3f} ×"])
    write_results("train_memory", {"machine": machine(CPU), "batch": batch, "bytes": results})
    print_table(["recomputation", "contestant", "kept for the backward pass", "of timm's eager"], rows)


if __name__ == "__main__":
    main()
