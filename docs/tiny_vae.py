"""Latents without a download: the digits as RGB files, and a small AutoencoderKL (diffusers) trained on them.

    python -m docs.tiny_vae --out out/compare             a minute: digits-rgb/, digits-vae/, and its picture
    python -m data.latents --res 8 --data out/compare/digits-rgb --vae out/compare/digits-vae --out DIR

8 x 8 x 3 pixels become 4 x 4 x 4 latents: half of the side, a third of the numbers. It stands for the autoencoders of
the paper (side / 8, 1/48 of the numbers), which cannot be trained in a minute.
"""

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import config
from config import Config
from data.batches import load, to_images, to_uint8
from run import pictures


def write_digits(folder: Path) -> torch.Tensor:
    """DIR/CLASS/NUMBER.png, and all of them as x1 (N, 3, 8, 8)."""
    digits = load(Config())
    x1 = digits.x1(torch.from_numpy(digits.pixels)).expand(-1, 3, -1, -1)           # (N, 3, 8, 8)
    for i, (image, label) in enumerate(zip(to_images(x1), digits.labels, strict=True)):
        (folder / digits.classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / digits.classes[label] / f"{i:04d}.png")
    return x1


def train(x1: torch.Tensor, steps: int) -> torch.nn.Module:
    """Squared error plus 1e-4 of the KL divergence; the scaling factor makes the latents' standard deviation 1."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, sample_size=8, block_out_channels=(32, 64),
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        layers_per_block=1, norm_num_groups=8)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="autoencoder", unit="step"):
        x = x1[torch.randint(len(x1), (64,))]
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(x1).latent_dist.sample().std().item())
    return vae.eval()


def main() -> None:
    parser = config.parser(__doc__, "python -m docs.tiny_vae [--out DIR] [--steps N]")
    parser.add_argument("--out", default="out/compare", help="directory to write [out/compare]")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the autoencoder [1500]")
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "digits-vae" / "config.json").exists():
        print(f"{out}/digits-vae is there already")
        return
    shutil.rmtree(out / "digits-rgb", ignore_errors=True)
    x1 = write_digits(out / "digits-rgb")
    vae = train(x1, args.steps)
    with torch.no_grad():
        again = vae.decode(vae.encode(x1).latent_dist.mode()).sample
    error = (to_uint8(again).float() - to_uint8(x1).float()).square().mean().sqrt().item()
    pictures.draw_images(out / "digits-vae.png", [list(to_images(x[:10])) for x in (x1, again)], [], None,
                         ["image", "decoded"])
    vae.save_pretrained(out / "digits-vae")
    print(f"wrote      {out}/digits-rgb, digits-vae, digits-vae.png; images decoded again differ by {error:.1f} of 255 "
          "(root mean square)")


if __name__ == "__main__":
    config.run(main)
