"""Draws images with an exported model. Needs torch and diffusers only: `export` puts a copy of this file into each directory it writes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class ClassConditionalPipeline(DiffusionPipeline):
    """Images by class, with classifier-free guidance.

    Args:
        network: UNet2DModel or DiTTransformer2DModel on images whose space_to_depth x space_to_depth blocks of pixels are channels.
        scheduler: that takes the steps; None for a network that goes to clean data in each call.
        num_classes: index of the null class in the network's label embedding; None = the network takes no labels.
        class_names: {"0": name of class 0, ...}.
        guidance_scale, num_inference_steps: what calls use unless they say otherwise.
        timestep_scale: the network is given the scheduler's timesteps times this.
        init_noise_sigma: factor of the noise at the start; None = the scheduler's.
        calls: of a network that goes to clean data in each call: with x = alpha clean + sigma noise, where nothing is clean at first,
            it goes to x_weight x + output_weight network(input_scale x, timestep).
    """

    _optional_components = ["scheduler"]

    def __init__(
        self,
        network: UNet2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin | None = None,
        num_classes: int | None = None,
        class_names: dict[str, str] | None = None,
        space_to_depth: int = 1,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 20,
        timestep_scale: float = 1.0,
        init_noise_sigma: float | None = None,
        calls: list[dict[str, float]] | None = None,
    ):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(
            num_classes=num_classes,
            class_names=class_names,
            space_to_depth=space_to_depth,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            timestep_scale=timestep_scale,
            init_noise_sigma=init_noise_sigma,
            calls=calls,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        batch_size: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws one image for each label.

        Args:
            class_labels: class numbers or names, one or a list of them; None = no class, `batch_size` images.
            guidance_scale: null + guidance_scale (conditional - null); 1 = conditional only.
            num_inference_steps: more are slower and more exact.
            generator: of the noise.
            noise: standard normal numbers [B, C, H, W] to start from, in place of the generator's; calls after the first draw more.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]) or "pt" ([B, C, H, W] in [0, 1]).
        """
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        labels = self._label_indices(class_labels)
        block, config = self.config.space_to_depth, self.network.config
        if noise is None:
            size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
            batch_size = batch_size if labels is None else len(labels)
            shape = (batch_size, config.in_channels // block**2, size[0] * block, size[1] * block)
            noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        noise = noise.to(self._execution_device)
        if self.config.calls is None:
            x = self._solve(noise, labels, steps, guidance_scale)
        else:
            x = self._call(noise, labels, steps, guidance_scale, generator)
        x = (x / 2 + 0.5).clamp(0, 1)
        images: Any = x if output_type == "pt" else x.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _label_indices(self, class_labels: int | str | list[int | str] | None) -> torch.Tensor | None:
        if class_labels is None:
            return None
        class_labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        names = {name: int(index) for index, name in (self.config.class_names or {}).items()}
        indices = [names.get(label, -1) if isinstance(label, str) else int(label) for label in class_labels]
        for label, index in zip(class_labels, indices, strict=True):
            if not 0 <= index < (self.config.num_classes or 0):
                raise ValueError(f"no class {label!r}; the classes are {', '.join(names) or 'none'} (0 to {len(names) - 1})")
        return torch.tensor(indices, device=self._execution_device)

    def _solve(self, noise: torch.Tensor, labels: torch.Tensor | None, steps: int, guidance_scale: float) -> torch.Tensor:
        self._set_timesteps(steps)
        start = self.config.init_noise_sigma
        x = noise * (getattr(self.scheduler, "init_noise_sigma", 1.0) if start is None else start)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.step(self._guided(x, t, labels, guidance_scale), t, x).prev_sample
        return x

    def _call(self, noise: torch.Tensor, labels: torch.Tensor | None, steps: int, guidance_scale: float, generator: Any) -> torch.Tensor:
        calls = self.config.calls
        if steps != len(calls) or guidance_scale != 1:
            many = f"{len(calls)} step{'s' if len(calls) > 1 else ''}"
            raise ValueError(f"this network draws in {many} without guidance, got {steps} steps and guidance_scale {guidance_scale}")
        x = calls[0]["sigma"] * noise
        for index, numbers in enumerate(calls):
            if index > 0:
                fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
                x = numbers["alpha"] * x + numbers["sigma"] * fresh
            t = torch.tensor(numbers["timestep"], device=x.device)
            output = self._guided(numbers["input_scale"] * x, t, labels, 1.0)
            x = numbers["x_weight"] * x + numbers["output_weight"] * output
        return x

    def _set_timesteps(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        if "FlowMatch" in type(self.scheduler).__name__:
            # its own spacing ends at the last training timestep; equal steps down to 0 were used in training's samples
            self.scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=self._execution_device)
        else:
            self.scheduler.set_timesteps(steps, device=self._execution_device)

    def _guided(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float) -> torch.Tensor:
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, t)
        if self.config.num_classes is None:
            return self._predict(x, t, None)
        null = torch.full((len(x),), self.config.num_classes, device=x.device)
        if labels is None or guidance_scale == 1:
            return self._predict(x, t, null if labels is None else labels)
        conditional, unconditional = self._predict(torch.cat([x, x]), t, torch.cat([labels, null])).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        block = self.config.space_to_depth
        timestep = (t * self.config.timestep_scale).to(x.device).expand(len(x))
        hidden = pixel_unshuffle(x.to(self.network.dtype), block)
        return pixel_shuffle(self.network(hidden, timestep, class_labels=labels, return_dict=False)[0], block).float()
