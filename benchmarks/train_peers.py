"""The peers of `microtome bench train`: SAELens, dictionary_learning and sparsify, each with its own training step, on the
same batches with the same learning rates. A peer that is not installed is left out.
"""

from typing import Any

import torch

from benchmarks.train_sides import Rows, Task
from microtome.common.device import parse_device
from microtome.dictionary.config import JumpReLUConfig
from microtome.dictionary.statistics import input_scales
from microtome.dictionary.trainer import STATISTICS_BATCHES


class SAELens:
    """SAELens's training SAEs in its SAETrainer."""

    def __init__(self, task: Task, rows: Rows, *, sparse: bool = False, autocast: bool = False) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(task.seed)
        config, device = task.config, str(parse_device(task.config.device))
        sae = _saelens_sae(task, rows.shape[1], device, sparse=sparse)
        settings = SAETrainerConfig(
            total_training_samples=config.n_tokens,
            train_batch_size_samples=config.batch_size,
            lr=config.lr,
            lr_end=config.lr / 10,  # must be given, and is not used by the constant scheduler
            lr_warm_up_steps=config.warmup_steps,
            lr_decay_steps=int(config.steps * config.decay_fraction),
            device=device,
            autocast=autocast,
            dead_feature_window=config.dead_after // config.batch_size,
        )
        self.trainer = SAETrainer(cfg=settings, sae=sae, data_provider=task.batches(rows))
        sae.to(device)
        self.trainer.activation_scaler.estimate_scaling_factor(
            rows.shape[1], task.batches(rows), n_batches_for_norm_estimate=STATISTICS_BATCHES
        )

    def step(self) -> object:
        """What the loop of `SAETrainer.fit` does, less its logs and progress bar."""
        self.trainer.maybe_reset_sparsity()
        output = self.trainer.step(next(self.trainer.data_provider))
        self.trainer.n_training_steps += 1
        return output

    @torch.no_grad()
    def reconstruct(self, x: Rows) -> tuple[Rows, int]:
        sae, scaler = self.trainer.sae, self.trainer.activation_scaler
        sae.eval()
        codes = sae.encode(scaler(x))
        dense = codes.to_dense() if codes.is_sparse else codes
        return scaler.unscale(sae.decode(codes)), int((dense > 0).sum())

    def n_dead(self) -> int:
        return int(self.trainer.dead_neurons.sum())


def _saelens_sae(task: Task, d_in: int, device: str, *, sparse: bool) -> Any:
    import sae_lens

    config = task.config
    warmup = config.steps // 20
    classes = {"topk": "TopK", "batchtopk": "BatchTopK", "relu": "Standard", "jumprelu": "JumpReLU"}
    settings: dict[str, dict[str, Any]] = {
        # Its sparse codes cannot be rescaled in training.
        "topk": {"k": config.k, "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse},
        "batchtopk": {"k": float(config.k), "rescale_acts_by_decoder_norm": True},
        "relu": {"l1_coefficient": config.relu_coefficient, "l1_warm_up_steps": warmup},
        "jumprelu": {
            "l0_coefficient": config.jumprelu_coefficient,
            "l0_warm_up_steps": warmup,
            **_near_start(task),
        },
    }
    name = f"{classes[task.architecture]}TrainingSAE"
    made = getattr(sae_lens, f"{name}Config")(
        d_in=d_in,
        d_sae=config.d_sae,
        device=device,
        normalize_activations="expected_average_only_in",
        **settings[task.architecture],
    )
    return getattr(sae_lens, name)(made)


def _near_start(task: Task) -> dict[str, float]:
    """Decoder rows of norm one and thresholds near where both sides end, √λ, with our bandwidth. Its default threshold is 0.01,
    and Adam moves one by the learning rate a step. Nothing for other architectures, or where its defaults are wanted."""
    ours = task.dictionary()
    if not isinstance(ours, JumpReLUConfig) or not task.config.jumprelu_near_start:
        return {}
    return {
        "decoder_init_norm": 1.0,
        "jumprelu_init_threshold": task.coefficient**0.5,
        "jumprelu_bandwidth": ours.bandwidth,
    }


class DictionaryLearning:
    """The trainers of dictionary_learning, which on a CPU compute in fp32; inputs scaled to a mean square of one, as its
    `normalize_activations` does."""

    def __init__(self, task: Task, rows: Rows) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        config = task.config
        self.batches = task.batches(rows)
        self.scale = float(rows.float().square().sum(1).mean().rsqrt())
        self.trainer: Any = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[task.architecture](
            steps=config.steps,
            activation_dim=rows.shape[1],
            dict_size=config.d_sae,
            k=config.k,
            layer=config.layer,
            lm_name=config.model,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            decay_start=config.steps - max(1, int(config.steps * config.decay_fraction)),
            seed=task.seed,
            device=str(parse_device(config.device)),
        )
        self.trainer.dead_feature_threshold = config.dead_after
        self.done = 0

    def step(self) -> object:
        loss = self.trainer.update(self.done, next(self.batches) * self.scale)
        self.done += 1
        return loss

    @torch.no_grad()
    def reconstruct(self, x: Rows) -> tuple[Rows, int]:
        ae = self.trainer.ae
        codes = ae.encode(x * self.scale, use_threshold=False)
        return ae.decode(codes) / self.scale, int((codes > 0).sum())

    def n_dead(self) -> int:
        return int((self.trainer.num_tokens_since_fired >= self.trainer.dead_feature_threshold).sum())


class Sparsify:
    """sparsify's SparseCoder with the steps of its trainer's loop, which needs a model to run by itself; with Adam, so that all
    sides have the same learning rates."""

    def __init__(self, task: Task, rows: Rows, *, autocast: bool = False) -> None:
        from sparsify import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(task.seed)
        config, self.device = task.config, parse_device(task.config.device)
        made = SparseCoderConfig(num_latents=config.d_sae, k=config.k)
        self.coder: Any = SparseCoder(rows.shape[1], made, self.device, torch.float32)
        self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=config.lr)
        self.config, self.autocast, self.batches, self.done = config, autocast, task.batches(rows), 0
        first = torch.cat([next(self.batches) for _ in range(STATISTICS_BATCHES)])
        self.scale = float(input_scales(first, (rows.shape[1],))[0])
        self.coder.b_dec.data = first.mean(0).to(self.device) * self.scale
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=self.device)

    def step(self) -> object:
        coder, config = self.coder, self.config
        coder.set_decoder_norm_to_unit_norm()
        x = next(self.batches).to(self.device) * self.scale
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out = coder(x, dead_mask=self.silent >= config.dead_after)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        rise = min(1.0, (self.done + 1) / (config.warmup_steps + 1))
        fall = min(1.0, (config.steps - self.done) / max(1, int(config.steps * config.decay_fraction)))
        self.optimiser.param_groups[0]["lr"] = config.lr * rise * fall
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.silent += len(x)
        self.silent[out.latent_indices.flatten()] = 0
        self.done += 1
        return out.fvu

    @torch.no_grad()
    def reconstruct(self, x: Rows) -> tuple[Rows, int]:
        out = self.coder(x * self.scale)
        return out.sae_out / self.scale, int((out.latent_acts > 0).sum())

    def n_dead(self) -> int:
        return int((self.silent >= self.config.dead_after).sum())
