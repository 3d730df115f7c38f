"""An export as a pipeline of diffusers, for programs that know those. In a copy of this repository:

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(EXPORT, custom_pipeline="extras/pipeline.py", trust_remote_code=True)
    images = pipe.to("cuda")(labels=["7"] * 16, seed=0).images                  # PIL images, as run.load draws them

EXPORT is a directory of sample.py --export, or OWNER/NAME on the hub. Its model_index.json lists no components: of the
hub, diffusers loads those by its own classes or by code that comes with the weights, and no code comes with these.
load_run finds the weights by the name that diffusers keeps, always of the newest revision.
"""

from functools import cached_property

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from run.load import Run, load_run


class LapFlowPipeline(DiffusionPipeline):
    """Draws what Run.sample draws, under the names of diffusers."""

    def __init__(self):                                     # diffusers reads the components from its arguments: none
        super().__init__()

    @cached_property
    def run(self) -> Run:
        """Loaded when it is first used."""
        return load_run(self.name_or_path, device="cpu")

    @property
    def device(self) -> torch.device:
        return self.run.device

    def to(self, device: torch.device | str) -> "LapFlowPipeline":
        """Moves the network; it stays in float32."""
        self.run.model.to(device=device)                    # a dtype is refused
        return self

    def __call__(self, num: int | None = None, *, labels: list | None = None, vectors: object = None, seed: int = 0,
                 guidance_scale: float | None = None, num_inference_steps: int | None = None, preview: bool = False,
                 output_type: str = "pil") -> ImagePipelineOutput:
        """Images of a seed: PIL, or with output_type="np" uint8 (N, R, R, C). See run.load.Run.sample."""
        images = self.run.sample(num, labels=labels, vectors=vectors, seed=seed, preview=preview,
                                 cfg_scale=guidance_scale, steps=num_inference_steps)
        if output_type == "pil":
            images = [Image.fromarray(image.squeeze()) for image in images]
        return ImagePipelineOutput(images=images)
