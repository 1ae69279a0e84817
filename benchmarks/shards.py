"""A model in shards that is larger than the memory it may have: what compressing it takes, by part.

    python benchmarks/shards.py --folder seven --layers 2 --memory 6GB
    python benchmarks/shards.py --folder small --layers 24 --width 1024 --inner 2752 --heads 16 --memory 1.2GB

By default the widths are those of a Llama of seven billion parameters, in bfloat16; the weights are random. The folder
is made shard by shard, and deleted at the end. Times are CPU time of this process. The memory is the most that the
process had by then, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import gramian as gm
from gramian.bench.machine import features
from gramian.compression.sharded.streaming import compress_shards


def make(folder: Path, given: argparse.Namespace) -> None:
    """Writes the model, a file for each block."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=given.width,
        intermediate_size=given.inner,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        vocab_size=given.vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    generator, d, inner = torch.Generator().manual_seed(0), given.width, given.inner
    places: dict[str, str] = {}
    drawn = torch.randn(2**24 + 1, generator=generator)  # weights are parts of it, over and over

    def weight(m: int, n: int) -> torch.Tensor:
        scale = torch.arange(1, n + 1).float().rsqrt()[torch.randperm(n, generator=generator)]
        scale = scale / scale.norm()  # some columns are larger, as in trained models
        num = -(-m * n // len(drawn))
        begin = int(torch.randint(len(drawn), (), generator=generator))
        return (drawn.roll(begin).repeat(num)[: m * n].view(m, n) * scale).bfloat16()

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    head = {"model.embed_tokens.weight": weight(given.vocabulary, d), "lm_head.weight": weight(given.vocabulary, d)}
    write("outside.safetensors", {**head, "model.norm.weight": torch.ones(d).bfloat16()})
    for i in range(given.layers):
        tensors = {f"self_attn.{name}_proj": weight(d, d) for name in "qkvo"}
        tensors |= {"mlp.gate_proj": weight(inner, d), "mlp.up_proj": weight(inner, d)}
        tensors |= {"mlp.down_proj": weight(d, inner)}
        tensors |= {name: torch.ones(d).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")}
        write(f"block-{i}.safetensors", {f"model.layers.{i}.{k}.weight": t for k, t in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--memory", default=None)
    sizes = {"layers": 2, "width": 4096, "inner": 11008, "heads": 32, "vocabulary": 32_000}
    for name, size in (sizes | {"batches": 8, "samples": 4, "tokens": 64}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--include", nargs="*", default=None)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--make", action="store_true", help="Write the model, and stop.")
    given = parser.parse_args()
    if given.make:
        make(given.folder, given)
        return
    out = given.folder.with_name(f"{given.folder.name}-compressed")
    try:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)  # its memory is not this one's
        size = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
        about = features()
        print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}; weights {size / 1e9:.2f} GB")
        generator = torch.Generator().manual_seed(1)
        shape = (given.samples, given.tokens)
        batches = [
            {"input_ids": torch.randint(given.vocabulary, shape, generator=generator)} for _ in range(given.batches)
        ]
        last = [time.process_time()]

        def tell(stage: str, share: float, remark: str) -> None:
            now = time.process_time()
            print(f"{stage} {share:4.0%} {remark}: {now - last[0]:.1f} s, peak {peak():.2f} GB", flush=True)
            last[0] = now

        print(f"before: peak {peak():.2f} GB", flush=True)
        plan = compress_shards(
            given.folder,
            batches,
            gm.Objective.next_token(),
            keep=given.keep,
            of="factorable",
            include=given.include,
            memory=given.memory,
            scratch=given.folder.parent,
            tell=tell,
        )
        print(plan.told)
        print(plan)
        plan.write(out, lambda part: tell("Write", 1.0, part))
        print(f"all: {time.process_time():.0f} s, peak {peak():.2f} GB; written {bytes_in(out) / 1e9:.2f} GB")
    finally:
        for folder in (given.folder, out):
            shutil.rmtree(folder, ignore_errors=True)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
