"""The reference of training: PyTorch's own optimizer in a plain loop around Transformers' model.

Needs PyTorch. It runs the training that `training_case.py` describes, and shares no code with our
training.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mistral_jax.training.step import Batch


def train(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    rates: Sequence[float],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    microbatches: int,
    loss_fn: Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, int]] | None = None,
) -> list[float]:
    """Trains all parameters that require gradients; returns the loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(b1, b2), eps=eps)
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total, count = 0.0, 0
        for part in split(batch, microbatches):
            loss, targets = (loss_fn or cross_entropy)(model, part)
            loss.backward()
            total, count = total + loss.item(), count + targets
        for p in trained:
            p.grad /= count
        torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        optimizer.step()
        losses.append(total / count)
    return losses


def cross_entropy(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Returns the summed loss of the targets, and their number."""
    targets = to_torch(batch.targets)
    loss = torch.nn.functional.cross_entropy(
        logits(model, batch).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    return loss, int((targets >= 0).sum())


def preference(beta: float):
    """Returns the loss of DPO, equation 7 of arXiv 2305.18290, for a PEFT model and its base."""

    def answers(model, batch):
        flat = Batch(
            *(x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.positions, batch.targets))
        )
        targets = to_torch(flat.targets)
        logprobs = torch.log_softmax(logits(model, flat), dim=-1)
        chosen = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (chosen * (targets >= 0)).sum(-1).view(-1, 2)

    def loss_fn(model, batch):
        with torch.no_grad(), model.disable_adapter():
            reference_w, reference_l = answers(model, batch).unbind(-1)
        policy_w, policy_l = answers(model, batch).unbind(-1)
        margin = beta * (policy_w - reference_w) - beta * (policy_l - reference_l)
        return -torch.log(torch.sigmoid(margin)).sum(), len(batch.targets)

    return loss_fn


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the logits [B, T, V] of rows with one text each, padded at the end."""
    mask = to_torch(batch.positions) >= 0
    return model(to_torch(batch.tokens), attention_mask=mask.long(), use_cache=False).logits


def split(batch: Batch, parts: int) -> list[Batch]:
    """Splits a batch into microbatches."""
    arrays = [np.split(x, parts) for x in (batch.tokens, batch.positions, batch.targets)]
    return [Batch(*part) for part in zip(*arrays, strict=True)]


def to_torch(x: np.ndarray) -> torch.Tensor:
    """Returns ids as int64, which PyTorch needs for an index."""
    return torch.from_numpy(np.asarray(x, np.int64))
