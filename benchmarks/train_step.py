"""Measures a training step beside a PyTorch loop: tokens a second, utilisation and memory.

The two take turns. Prints one JSON line for each model, for training all parameters and for LoRA
(PyTorch with PEFT). Shapes, batch and optimizer (AdamW with clipping) are the same, in float32.
Compilation is not counted. It needs the `parity` extra.

    python benchmarks/train_step.py [--model nano 31M] [--train full lora] [--rounds 10]
    python benchmarks/train_step.py --memory    # peak memory, one process for each measurement
    python benchmarks/train_step.py --device    # in bfloat16 on an accelerator, without PyTorch
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import shapes

from mistral_jax.base.memory import peak as peak_memory
from mistral_jax.config import ModelConfig
from mistral_jax.training import flops as counts

MODELS = shapes.MODELS | {
    "31M": ModelConfig(
        vocab_size=8192,
        num_layers=8,
        embed_dim=512,
        mlp_dim=1408,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e4,
        sliding_window=None,
    ),
    "1B": ModelConfig(
        vocab_size=32000,
        num_layers=22,
        embed_dim=2048,
        mlp_dim=5632,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        rope_theta=1e4,
        sliding_window=None,
    ),
}
RANK, ALPHA, RATE, CLIP = 16, 32.0, 1e-4, 1.0
ADAMW = {"weight_decay": 0.1}
BETAS = (0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", help="nano, 31M or 229M; with --device also 1B")
    parser.add_argument("--train", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--context", type=int, nargs="+", help="default: 512; 2048 and 4096")
    parser.add_argument("--rows", type=int, help="default: 4; 1 with --device")
    parser.add_argument("--rounds", type=int, default=10)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true")
    kind.add_argument("--device", action="store_true")
    kind.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device:
        for name in arguments.model or ["mistral-7b-v0.3"]:
            for train in arguments.train if arguments.model else ("lora",):
                for context in arguments.context or [2048, 4096]:
                    found = on_device(name, train, context, arguments.rows or 1, arguments.rounds)
                    print(json.dumps(found), flush=True)
        return
    for name in arguments.model or ("nano", "31M"):
        for train in arguments.train:
            for context in arguments.context or [512]:
                about = {"model": name, "train": train, "rows": arguments.rows or 4}
                about |= {"context": context}
                if arguments.worker:
                    print(json.dumps(memory(arguments.worker, about)))
                elif arguments.memory:
                    print(json.dumps({"benchmark": "train_step", **about} | memories(about)))
                else:
                    compare(about, arguments.rounds)


def compare(about: dict, rounds: int) -> None:
    """Measures both programs in turns, and prints their rates; the first round compiles."""
    config = MODELS[about["model"]]
    flops = counts.per_token(config, about["context"], adapters=about["train"] == "lora") / (
        counts.peak() or float("nan")
    )
    steps = [PROGRAMS[name](about) for name in ("ours", "torch")]
    tokens = about["rows"] * about["context"]
    times = [[seconds(step) for step in steps] for _ in range(rounds + 1)][1:]
    ours, theirs = (tokens / statistics.median(column) for column in zip(*times, strict=True))
    ratios = [b / a for a, b in times]
    line = {
        "tokens_per_second": round(ours, 1),
        "torch": round(theirs, 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "mfu": round(ours * flops, 3),
        "torch_mfu": round(theirs * flops, 3),
    }
    print(json.dumps({"benchmark": "train_step", **about} | line), flush=True)


def seconds(step: Callable[[], float]) -> float:
    """Returns the seconds of a step."""
    start = time.perf_counter()
    assert np.isfinite(step())
    return time.perf_counter() - start


def ours(about: dict) -> Callable[[], float]:
    """Makes a training step of this package, which returns its loss."""
    import jax

    from mistral_jax.model.transformer import Transformer
    from mistral_jax.training.pretraining import initial_params

    model = Transformer(MODELS[about["model"]])
    params = initial_params(model, 0)
    step = jax_step(model, params, about)
    return lambda: float(jax.device_get(step()["loss"]))


def jax_step(model, params, about: dict) -> Callable[[], dict]:
    """Makes a training step of this package on one batch, which returns its metrics."""
    import jax
    import jax.numpy as jnp

    from mistral_jax.checkpoint.lora import Lora, attach, init_adapters
    from mistral_jax.training.loss import everything, make_loss_fn
    from mistral_jax.training.optimizers import make_optimizer
    from mistral_jax.training.states import create_state
    from mistral_jax.training.step import Batch, make_train_step

    frozen, assemble = {}, everything
    if about["train"] == "lora":
        lora = Lora(rank=RANK, alpha=ALPHA)
        draw = jax.jit(lambda params: init_adapters(lora, params, jax.random.key(1)))
        frozen, params = params, draw(params)

        def assemble(trainable, frozen):
            return attach(frozen, trainable, lora.scale)

    b1, b2 = BETAS
    optimizer = make_optimizer("adamw", RATE, clip_norm=CLIP, b1=b1, b2=b2, **ADAMW)
    state = create_state(optimizer, params, frozen)
    train_step = make_train_step(make_loss_fn(model, assemble), optimizer)
    tokens, targets = batch(model.config, about)
    positions = np.broadcast_to(np.arange(about["context"], dtype=np.int32), tokens.shape)
    rows = jax.tree.map(jnp.asarray, Batch(tokens, positions, targets))

    def step():
        nonlocal state
        state, metrics = train_step(state, rows)
        return metrics

    return step


def torch(about: dict) -> Callable[[], float]:
    """Makes a training step of PyTorch with Transformers' model, which returns its loss."""
    import torch
    import transformers
    from mistral_jax.convert import architecture

    config = MODELS[about["model"]]
    fields = architecture.to_hf(config) | {"dtype": "float32"}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).train()
    if about["train"] == "lora":
        import peft

        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
            ),
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    # fused=True is faster than the default.
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, fused=True, **ADAMW)
    tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in batch(config, about))

    def step():
        optimizer.zero_grad()
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.item()

    return step


PROGRAMS = {"ours": ours, "torch": torch}


def batch(config: ModelConfig, about: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns random tokens and targets [B, T]."""
    shape = about["rows"], about["context"] + 1
    ids = np.random.default_rng(0).integers(3, config.vocab_size, shape, dtype=np.int32)
    return ids[:, :-1], ids[:, 1:]


def memories(about: dict) -> dict:
    """Calls `memory` for each program in a process of its own, because a peak never decreases."""
    found = {}
    for name in PROGRAMS:
        command = [sys.executable, __file__, "--worker", name]
        for field, value in about.items():
            command += [f"--{field}", str(value)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(out.splitlines()[-1])
    return found


def memory(program: str, about: dict) -> dict:
    """Returns the peak memory of this process, in bytes above the memory of its imports."""
    for module in ("jax", "optax") if program == "ours" else ("torch", "transformers", "peft"):
        __import__(module)
    before = peak_memory()
    step = PROGRAMS[program](about)
    for _ in range(3):
        step()
    return {"peak_bytes": peak_memory() - before, "imports_bytes": before}


def on_device(name: str, train: str, context: int, rows: int, rounds: int) -> dict:
    """Measures rate, utilisation and memory with random weights, in bfloat16 if they are frozen."""
    import jax
    import jax.numpy as jnp

    from mistral_jax.model.transformer import Transformer
    from mistral_jax.parallel.sharding import abstract_params

    config = MODELS.get(name) or ModelConfig.from_name(name)
    model = Transformer(config, jnp.bfloat16, remat="nothing_saveable")
    dtype = jnp.float32 if train == "full" else jnp.bfloat16
    leaves, tree = jax.tree.flatten(abstract_params(model))

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        return [
            jnp.ones(x.shape, dtype)
            if len(x.shape) == 1
            else jax.random.normal(k, x.shape, dtype) * x.shape[-1] ** -0.5
            for k, x in zip(keys, leaves, strict=True)
        ]

    about = {"model": name, "train": train, "rows": rows, "context": context}
    step = jax_step(model, tree.unflatten(draw(jax.random.key(0))), about)
    began = time.perf_counter()
    jax.block_until_ready(step())
    compiling = time.perf_counter() - began
    rate = (
        rows
        * context
        / min(seconds(lambda: float(jax.device_get(step()["loss"]))) for _ in range(rounds))
    )
    peak = counts.peak()
    flops = counts.per_token(config, context, adapters=train == "lora")
    return {
        "benchmark": "train_step",
        "device": jax.devices()[0].device_kind,
        **about,
        "dtype": "bfloat16",
        "tokens_per_second": round(rate, 1),
        "mfu": peak and round(rate * flops / peak, 3),
        "peak_bytes": peak_memory(),
        "compile_seconds": round(compiling, 1),
    }


if __name__ == "__main__":
    main()
