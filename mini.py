"""LapFlow on one page: trains on 8 x 8 digits in a minute, samples, and writes mini.png."""

import torch
from PIL import Image
from sklearn.datasets import load_digits

from model import MoTDiT
from pyramid import decompose, reconstruct
from schedule import Schedule

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images / 8 - 1).float()[:, None]               # (1797, 1, 8, 8) in [-1, 1]
labels = torch.from_numpy(digits.target)
schedule = Schedule(starts=(0.0, 0.5))                                          # band 0 starts at 0, band 1 at 0.5
model = MoTDiT(size=(96, 4, 3, 2), in_channels=1, resolution=8, num_scales=2, num_classes=10)
steps = 600
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0, fused=True)
annealing = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)

for step in range(steps):                                                       # Algorithm 1
    rows, stage = torch.randint(len(images), (128,)), step % 2                  # in turn; the paper draws the stage
    x1 = decompose(images[rows], 2)[: stage + 1]                                # stage s trains bands 0..s
    x0 = decompose(torch.randn(128, 1, 8, 8), 2)[: stage + 1]
    t = schedule.starts[stage] + (1 - schedule.starts[stage]) * torch.rand(128)
    xt, v = schedule.interpolate(x1, x0, t)
    loss = sum((v_pred - target).square().mean() for v_pred, target in zip(model(xt, t, labels[rows]), v))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    annealing.step()

y, bands = torch.arange(100) % 10, []                                           # Algorithm 2, with Euler steps
noise = decompose(torch.randn(100, 1, 8, 8), 2)
with torch.no_grad():
    for j, (start, end) in enumerate(schedule.segments):
        bands = schedule.enter(j, bands, noise[j])                              # band j joins as noise
        for t in torch.linspace(start, end, 21)[:-1]:
            bands = [x + (end - start) / 20 * v for x, v in zip(bands, model(bands, t.expand(100), y))]
grid = reconstruct(bands).view(10, 10, 8, 8).transpose(1, 2).reshape(80, 80)    # ten rows of ten digits
Image.fromarray((127.5 * grid + 128).clamp(0, 255).byte().numpy()).resize((640, 640), 0).save("mini.png")
